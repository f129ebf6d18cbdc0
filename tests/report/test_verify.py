"""A record beside its repetition: what differs is named, and what lies outside of the stated intervals is an error."""

import shutil
from pathlib import Path

import pytest

from qat.runs import archive
from qat.runs.folder import Run
from qat.runs.identity import run_id
from tests.helpers.synthetic_runs import compared_pair, edit


@pytest.fixture
def repeated(tmp_path) -> tuple[Path, Path]:
    """A record of a run and its baseline, and the same two repeated: (record, run folder)."""
    made = compared_pair(tmp_path / "made")
    made = [path.rename(path.with_name(run_id(Run(path).typed_config()))) for path in made]
    edit(made[0] / "eval.json", lambda record: [_shift(each, 0.01) for each in record["quick"].values()])
    archive.keep(map(Run, made), tmp_path / "record")
    shutil.copytree(tmp_path / "made", tmp_path / "runs")
    for path in (tmp_path / "runs").iterdir():
        edit(path / "metrics.jsonl", lambda row: row.update(seconds=1.5))
    return tmp_path / "record", tmp_path / "runs" / made[0].name


def _shift(scored: dict, nats: float) -> None:
    text = scored["heldout"]["wikipedia"]
    text["document_losses"] = [loss + nats * k for k, loss in enumerate(text["document_losses"])]
    text["loss"] += nats


def test_the_same_runs_are_the_same_bit_for_bit(repeated, main):
    code, stdout, _ = main("verify.py", f"record={repeated[0]}", f"runs_dir={repeated[1].parent}")
    assert code == 0 and stdout.count("bit-identical: every loss equal") == 2
    (row,) = [line for line in stdout.splitlines() if "inside" in line]
    assert "nothing is said of the others" not in stdout
    assert f"| {repeated[1].name} | wikipedia" in row and "+0.0100 [-0.0148, +0.0348]" in row and "| +0.0100 |" in row


@pytest.mark.parametrize(("nats", "told"), [(0.02, "inside"), (-0.05, "outside")])
def test_a_difference_is_held_against_the_records_interval(repeated, main, nats, told):
    edit(repeated[1] / "eval.json", lambda record: _shift(record["quick"]["w8a8"], nats))
    code, stdout, stderr = main("verify.py", f"record={repeated[0]}", f"runs_dir={repeated[1].parent}")
    assert (
        f"{0.01 + nats:+.4f} | powerless, powerless | {told}" in " ".join(stdout.split())
        and "not bit-identical" in stdout
    )
    assert (code, stderr) == (
        (2, "error: 1 of the rows above: outside of the record's intervals, or not comparable with it\n")
        if told == "outside"
        else (0, "")
    )


def test_a_baseline_that_was_not_repeated_leaves_the_run_itself(repeated, main):
    for path in repeated[1].parent.iterdir():
        if path != repeated[1]:
            shutil.rmtree(path)
    code, stdout, _ = main("verify.py", f"record={repeated[0]}", f"runs_dir={repeated[1].parent}")
    assert code == 0 and stdout.count("| bit-identical: every loss equal |") == 1 and "inside" not in stdout
    assert "1 of the record's 2 runs were repeated here; nothing is said of the others" in stdout


def test_what_differs_and_has_no_baseline_here_is_not_passed_over(repeated, main):
    for path in repeated[1].parent.iterdir():
        if path != repeated[1]:
            shutil.rmtree(path)
    edit(repeated[1] / "eval.json", lambda record: _shift(record["quick"]["w8a8"], 1.0))
    code, stdout, stderr = main("verify.py", f"record={repeated[0]}", f"runs_dir={repeated[1].parent}")
    assert code == 2 and "1 of the rows above" in stderr
    assert f"| {repeated[1].name} | - " in stdout and "not comparable with the record: " in stdout


def test_a_run_that_was_scored_in_another_way_does_not_hide_the_others(repeated, main):
    edit(repeated[1] / "eval.json", lambda record: record["quick"]["w8a8"].update(lm_eval="9"))
    code, stdout, _ = main("verify.py", f"record={repeated[0]}", f"runs_dir={repeated[1].parent}")
    assert code == 2 and "not comparable with the record: lm-eval version differs: 9" in stdout
    assert stdout.count("| bit-identical: every loss equal") == 1


def test_what_was_put_back_is_no_repetition(repeated, main, tmp_path):
    archive.restore(repeated[0], tmp_path / "back")
    code, _, stderr = main("verify.py", f"record={repeated[0]}", f"runs_dir={tmp_path / 'back'}")
    assert (code, stderr.count("\n")) == (2, 1) and "as they were put back, none repeated; repeat its" in stderr


def test_without_a_run_in_both_the_command_to_repeat_is_named(repeated, main, tmp_path):
    code, _, stderr = main("verify.py", f"record={repeated[0]}", f"runs_dir={tmp_path / 'none'}")
    assert (code, stderr.count("\n")) == (2, 1) and "has none of the 2 runs of" in stderr and "README.md" in stderr
