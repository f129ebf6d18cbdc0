"""The trace of amaxes: readable at any time, and the same file however often its rows were written."""

import numpy as np
import pytest
from safetensors.numpy import load_file

from qat.errors import UserError
from qat.runs import trace
from qat.runs.folder import ReadOnlyRun, Run

NAMES = ["model.layers.0.mlp.up_proj/weight", "model.layers.0.mlp.up_proj/gradient"]


def row(step: int) -> np.ndarray:
    return np.array([step, -step / 3], "<f4")


def test_a_trace_can_be_read_while_it_grows(tmp_path):
    run = Run(tmp_path)
    with run.traced(NAMES, 4) as write:
        write(1, row(1))
        write(3, np.array([np.nan, np.inf], "<f4"))
        names, amax = run.amaxes()
        assert names == NAMES
        np.testing.assert_array_equal(amax, [row(1), [0, 0], [np.nan, np.inf], [0, 0]])
    np.testing.assert_array_equal(load_file(tmp_path / trace.NAME)["amax"], amax)  # by others, too


def test_rows_written_again_leave_the_same_file(tmp_path):
    for name, sessions in (("once", [(1, 4)]), ("resumed", [(1, 3), (2, 4)])):
        (tmp_path / name).mkdir()
        for first, last in sessions:
            with Run(tmp_path / name).traced(NAMES, 4) as write:
                for step in range(first, last + 1):
                    write(step, row(step))
    once, resumed = ((tmp_path / name / trace.NAME).read_bytes() for name in ("once", "resumed"))
    assert once == resumed


def test_a_trace_of_other_tensors_or_steps_is_begun_anew(tmp_path):
    for names, steps in ((NAMES, 4), (NAMES, 3), (NAMES[::-1], 3)):
        with Run(tmp_path).traced(names, steps) as write:
            write(1, row(1))
        np.testing.assert_array_equal(Run(tmp_path).amaxes()[1], [row(1), *[[0, 0]] * (steps - 1)])


def test_only_the_first_rank_writes_and_a_bf16_run_has_none(tmp_path):
    with ReadOnlyRun(tmp_path).traced(NAMES, 4) as write, Run(tmp_path).traced([], 4):
        write(1, row(1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "says"), [(None, "has no trace of its amaxes"), (b"\0" * 40, "is damaged")])
def test_a_missing_or_damaged_trace_is_refused_in_one_line(tmp_path, content, says):
    if content:
        (tmp_path / trace.NAME).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        Run(tmp_path).amaxes()
    assert "\n" not in str(caught.value)
