"""The floor: which folders are repetitions, what two of them differ by, and how the report says it."""

from __future__ import annotations

import numpy as np
import pytest

from qat.analysis.rerun_noise import original, rerun_noise, reruns
from qat.analysis.stats import student
from qat.errors import UserError
from qat.report import uncertainty
from qat.report.experiment import Experiment
from qat.report.page import write_report
from qat.runs import archive
from qat.runs.folder import Run
from qat.runs.identity import run_id
from tests.helpers.synthetic_runs import HIF8, RIGHT, config, edit, write_run

TEXT = [3.0, 3.2, 3.4]


def write_repeat(root, repeat: int, losses=(2.5, 2.0), right=RIGHT, text=TEXT, **more) -> Run:
    """A quantized run in the folder of its own name."""
    settings = config(**HIF8, repeat=repeat)
    named = Run(write_run(root / "unnamed", settings)).typed_config()
    answers, texts = (dict.fromkeys(("bf16", "w8a8"), given) for given in ({"arc_easy": right}, {"t": text}))
    return Run(write_run(root / run_id(named), settings, losses, answers, texts, **more))


def test_repeats_are_numbered_from_one_and_finished(tmp_path):
    first = write_repeat(tmp_path, 0)
    assert reruns(first) == []
    again = [write_repeat(tmp_path, k, state="finished" if k < 3 else "running") for k in (1, 2, 3)]
    assert [each.path for each in reruns(first)] == [each.path for each in again[:2]]
    assert [original(each).path for each in again] == [first.path] * 3
    assert reruns(again[0]) == []


def test_a_repetition_that_differs_by_hand(tmp_path):
    first = write_repeat(tmp_path, 0)
    right = [False] * 2 + RIGHT[2:99] + [True]
    again = write_repeat(tmp_path, 1, (2.0, 2.0), right, [3.1, 3.4, 3.4])
    found = rerun_noise(first, again, "quick")
    assert (found["run"], found["repeat"], found["mode"], found["steps"]) == (first.id, 1, "w8a8", 2)
    assert (found["ape"], found["largest"]) == pytest.approx((10, 0.5)) and not found["identical"]
    assert (found["flipped"], found["n"]) == (3, 100)
    (text,) = found["heldout"]
    ends = student(np.array([0.1, 0.2, 0.0])).interval()
    assert text["difference"] == pytest.approx(0.1) and text["ci"] == pytest.approx(ends)


@pytest.mark.parametrize(
    ("losses", "text", "identical"),
    [((2.5, 2.0), TEXT, True), ((2.5, 2.0 + 2**-22), TEXT, False), ((2.5, 2.0), [3.0, 3.4, 3.2], False)],
)
def test_identical_means_every_loss(tmp_path, losses, text, identical):
    found = rerun_noise(write_repeat(tmp_path, 0), write_repeat(tmp_path, 1, losses, text=text), "quick")
    assert found["identical"] == identical


def test_the_report_lists_what_was_repeated(tmp_path):
    first = write_repeat(tmp_path, 0)
    experiment = Experiment("exp8", [first], [Run(write_run(tmp_path / "base", config()))])
    assert uncertainty.rerun_noise([experiment]).rows == []
    write_repeat(tmp_path, 1)
    again = write_repeat(tmp_path, 2, (2.0, 2.0))
    (again.path / "eval.json").unlink()
    edit(write_repeat(tmp_path, 3).path / "metrics.jsonl", lambda row: row.update(step=row["step"] + 1))
    html, markdown = write_report([experiment], tmp_path / "out")
    for text in (html.read_text(), markdown.read_text()):
        assert "Rerun noise" in text and "bit-identical: every loss equal" in text and "0 of 100" in text
        assert "not bit-identical; not scored" in text and "record different steps in metrics.jsonl" in text
    assert [str(row[1]) for row in uncertainty.rerun_noise([experiment]).rows] == ["1", "2", "3"]


def test_other_questions_are_refused(tmp_path):
    first, again = write_repeat(tmp_path, 0), write_repeat(tmp_path, 1)
    edit(again.path / "eval.json", lambda record: record["quick"]["w8a8"].update(lm_eval="old"))
    with pytest.raises(UserError, match="lm-eval version differs: old in"):
        rerun_noise(first, again, "quick")


def test_a_record_keeps_the_repetitions_that_its_report_shows(tmp_path, main):
    write_run(tmp_path / "base", config(), (2.4, 2.0))
    first, again = write_repeat(tmp_path, 0), write_repeat(tmp_path, 1)
    code, _, _ = main("record.py", f"record={tmp_path}/kept", f"runs=[{first.path},{tmp_path}/base]")
    assert code == 0 and {first.id, again.id} <= {row["run"] for row in archive.table(tmp_path / "kept")}
