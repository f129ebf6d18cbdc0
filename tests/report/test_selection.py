"""Reports of any runs: grouped by experiment, paired with the baseline that fits, refused in one line."""

import pytest
from omegaconf import OmegaConf

from qat.report.page import write_report
from qat.report.selection import selected
from qat.runs.identity import baseline_of, run_id
from tests.conftest import typed
from tests.helpers.synthetic_runs import HIF8, answers, config, losses, write_run


def made(folder, settings):
    modes = ["bf16"] if settings["quant"]["format"] == "none" else ["bf16", "w8a8"]
    scored, texts = (dict.fromkeys(modes, found) for found in (answers(0), {"wikipedia": [3.0, 3.1, 3.2]}))
    return write_run(folder, settings, losses(1, 36, 1e-5), scored, texts)


@pytest.fixture
def folders(tmp_path) -> dict[str, str]:
    """A BF16 run, and quantized ones: of two experiments with the same settings, and of none with another rate."""
    base = {"base": {}, "exp8": HIF8, "exp3": HIF8 | {"experiment": "exp3", "scaling.algo": "most_recent"}}
    own = {"own": HIF8 | {"experiment": None, "optim.lr": 3e-5}}
    return {name: str(made(tmp_path / name, config(**changes))) for name, changes in (base | own).items()}


def test_runs_are_grouped_by_experiment_and_paired_with_the_listed_baseline(folders):
    found = selected([folders[name] for name in ("exp8", "base", "exp3", "exp8")])
    assert [experiment.name for experiment in found] == ["exp8", "exp3"]
    for experiment in found:
        (pair,) = experiment.pairs
        assert (pair.run.id, pair.baseline.id, pair.comparison["baseline"]) == (experiment.name, "base", "base")


def test_a_run_without_a_baseline_says_why(folders, tmp_path):
    (alone,) = selected([folders["exp8"]])
    made_by = "make it: python scripts/train.py experiment=exp8"
    assert alone.pairs[0].missing == f"exp8 has no BF16 baseline yet; {made_by}"
    _, own = selected([folders["base"], folders["own"]])
    html, markdown = write_report([own], tmp_path / "out")
    assert own.name == "custom"
    for page in (html.read_text(), markdown.read_text()):
        assert "base is no matched baseline of own: optim.lr=1e-05 there, optim.lr=3e-05 here" in page
        assert "Not compared: custom" in page or "No quantized run has been compared" in page


def test_a_baseline_in_the_folder_beside_a_run_is_found(tmp_path):
    cfg = typed(tmp_path, "experiment=exp8", "benchmark=quick")
    beside, run = (
        made(tmp_path / run_id(side), OmegaConf.to_container(OmegaConf.structured(side)))
        for side in (baseline_of(cfg), cfg)
    )
    (pair,) = selected([str(run)])[0].pairs
    assert pair.baseline.id == beside.name == pair.comparison["baseline"]


def test_the_command_shows_any_runs(main, folders, tmp_path):
    code, stdout, stderr = main("report.py", f"runs=[exp8,{folders['base']},own/]", "report.out=out")
    assert (code, stderr, stdout) == (0, "", "report: out/report.html and out/report.md\n")
    tables = (tmp_path / "out" / "report.md").read_text()
    assert "exp8 against base" in tables and "base is no matched baseline of own" in tables and "## exp3" not in tables


def test_the_command_shows_runs_on_the_benchmark_that_is_asked_for(main, folders, tmp_path):
    code, *_ = main("report.py", f"runs=[exp8,{folders['base']}]", "report.out=out", "benchmark=paper")
    assert code == 0 and "has no paper evaluation in mode" in (tmp_path / "out" / "report.md").read_text()


def test_the_differences_of_two_runs_are_printed(main, folders):
    code, stdout, stderr = main("diff.py", "runs=[exp3,exp8]")
    assert (code, stderr) == (0, "")
    assert stdout == "exp3  exp8\n  experiment: exp3 -> exp8\n  scaling.algo: most_recent -> max\n"
    code, _, stderr = main("diff.py", "runs=[exp3]")
    assert code == 2 and "runs=['exp3']: name two, as in runs=[runs/a,runs/b]" in stderr


@pytest.mark.parametrize(
    ("word", "wanted"),
    [
        ("runs=[]", "runs=[]: name at least one run folder, as in runs=[runs/a,runs/b]"),
        ("runs=exp8", "Error merging override runs=exp8 Invalid value assigned: str is not a ListConfig"),
        ("runs=[exp8,nowhere]", "nowhere is not a run folder (no config.yaml); see `ls "),
        ("runs=[exp8,exp8/samples]", "samples is not a run folder (no config.yaml); see `ls "),
        ("runs=[exp8,copy/exp8]", "copy/exp8 have one name; list one of them, or rename one"),
    ],
)
def test_what_is_no_selection_is_refused_in_one_line(main, folders, tmp_path, word, wanted):
    made(tmp_path / "copy" / "exp8", config(**HIF8))
    code, stdout, stderr = main("report.py", word, "report.out=out")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1) and wanted in stderr
    assert not (tmp_path / "out").exists()
