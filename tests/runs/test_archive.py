"""Records: what goes in comes back, but for the weights, and a suite goes on from there."""

import json
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from qat.analysis.compare import pretrained_run
from qat.errors import UserError
from qat.report import record
from qat.report.experiment import Experiment
from qat.report.page import write_report
from qat.runs import archive
from qat.runs.folder import Run
from qat.runs.identity import run_id
from tests.conftest import ROOT
from tests.helpers.synthetic_runs import HIF8, compared_pair, config, edit, pretrained_beside, suite, write_run


@dataclass
class Kept:
    runs: Path
    experiments: list[Experiment]
    report: Path
    record: Path
    names: list[str]
    unfinished: list[str]


RECORDS = sorted(path.parent for path in (ROOT / "experiments" / "records").glob("*/runs.csv"))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Kept:
    """A suite that was run, reported and kept as a record."""
    root = tmp_path_factory.mktemp("suite")
    experiments = suite(root / "runs")[-2:]
    write_report(experiments, root / "report")
    weights = root / "runs" / "exp8-max" / "checkpoints" / "step-00000036" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"w" * 1000)
    runs = {run.id: run for e in experiments for run in (*e.runs, *e.baselines)}
    runs |= {origin.id: origin for run in runs.values() if (origin := pretrained_run(run))}
    half = Run(write_run(root / "runs" / "half", config(), [2.0], state="running"))
    record.keep_report(root / "report", root / "record")
    told = record.keep_runs([*runs.values(), half, Run(root / "runs" / "never")], root / "record")
    return Kept(root / "runs", experiments, root / "report", root / "record", *told)


def members(archive: Path) -> set[str]:
    with tarfile.open(archive) as tar:
        return set(tar.getnames())


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_record_has_the_report_and_the_small_parts_of_finished_runs(kept):
    assert len(kept.names) == 5 and set(kept.unfinished) == {"half", "never"}
    assert content(kept.record).keys() - content(kept.report).keys() == {"runs.csv", "runs-seed0.tar.xz"}
    assert dict(content(kept.report).items() - content(kept.record).items()).keys() == {"report.html"}
    names = members(kept.record / "runs-seed0.tar.xz")
    assert {name.partition("/")[0] for name in names} == set(kept.names)
    files = {name.partition("/")[2] for name in names if name.startswith("exp8-max/") and "samples" not in name}
    assert files == {"config.yaml", "environment.json", "status.json", "metrics.jsonl", "telemetry.jsonl", "eval.json"}


def test_the_table_of_runs_says_what_each_is_and_what_it_scored(tmp_path):
    made = [Run(path.rename(path.with_name(run_id(Run(path).typed_config())))) for path in compared_pair(tmp_path)]
    answers = {"arc_easy": [True, False] * 20, "mmlu": [True] * 30 + [False] * 10}
    texts = {"bf16": {"wikipedia": [3.0, 3.1, 3.2]}}
    start = config(**{"budget.steps": 0})
    origin = write_run(pretrained_beside(made[0].path), start, [], {"bf16": answers}, texts)
    text = {"loss": 3.21, "document_losses": [3.01, 3.21, 3.41]}
    edit(made[0].path / "eval.json", lambda entry: entry["quick"]["w8a8"]["heldout"]["wikipedia"].update(text))
    record.keep_runs([*made, Run(origin)], tmp_path / "record")
    rows = {row.pop("run"): " | ".join(row.values()) for row in archive.table(tmp_path / "record")}
    run = "exp8 | 0 | hif8 | max | 64 | 1e-05 | 0 | 36 |  | 5.0000 | +0.0100 [+0.0100, +0.0100] | 100.0 | 50.0"
    assert rows == {
        made[0].id: run,
        made[1].id: "exp8 | 0 | bf16 |  |  | 1e-05 |  | 36 |  |  |  | 100.0 | 50.0",
        origin.name: "exp8 | 0 | bf16 |  |  |  |  | 0 |  |  |  | 75.0 | 50.0",
    }


def test_the_table_of_runs_names_settings_that_few_have(tmp_path):
    wide, own = {"quant.scope": ["mlp.*", "self_attn.*"]}, {"model.architecture": {"vocab_size": 64}}
    changes = ({}, {}, {}, wide, {"data.label_shift": "twice"}, {"quant.bf16_also": [9, 11]}, own)
    for number, change in enumerate(changes):
        write_run(tmp_path / "runs" / f"run{number}", config(**HIF8, **change))
    record.keep_runs(map(Run, sorted((tmp_path / "runs").iterdir())), tmp_path / "record")
    others = [row["other_settings"] for row in archive.table(tmp_path / "record")]
    assert others[3:] == [
        "quant.scope=[mlp.*,self_attn.*]",
        "data.label_shift=twice",
        "quant.bf16_also=[9,11]",
        "model.architecture.vocab_size=64",
    ]
    assert others[:3] == ["", "", ""]


def test_the_same_runs_make_the_same_record(kept, tmp_path):
    for path in kept.runs.rglob("*.jsonl"):
        path.touch()
    record.keep_report(kept.report, tmp_path / "again")
    record.keep_runs([Run(kept.runs / name) for name in reversed(kept.names)], tmp_path / "again")
    assert content(tmp_path / "again") == content(kept.record)


def test_runs_of_other_seeds_and_commands_are_added_to_a_record(kept, tmp_path):
    """And a run that is kept once more, trained again, takes the place of its first one."""
    first = Run(kept.runs / "exp8-max")
    archive.keep([first, Run(kept.runs / "exp8-bf16")], tmp_path / "record")
    again = write_run(tmp_path / "again" / "exp8-max", first.config(), [9.0])
    other = write_run(tmp_path / "again" / "other", config(seed=3))
    archive.keep([Run(again), Run(other)], tmp_path / "record")
    assert {path.name for path in (tmp_path / "record").iterdir()} == {"runs-seed0.tar.xz", "runs-seed3.tar.xz"}
    put, _ = archive.restore(tmp_path / "record", tmp_path / "runs")
    assert put == ["exp8-bf16", "exp8-max", "other"]
    assert content(tmp_path / "runs" / "exp8-max") == content(again)


def test_what_is_restored_makes_the_same_report(kept, tmp_path):
    put, there = archive.restore(kept.record, tmp_path / "runs")
    assert set(put) == set(kept.names) and not there
    for name in kept.names:
        ours, theirs = content(tmp_path / "runs" / name), content(kept.runs / name)
        assert ours == {file: text for file, text in theirs.items() if not file.startswith("checkpoints")}

    def moved(group: list[Run]) -> list[Run]:
        return [Run(tmp_path / "runs" / run.id) for run in group]

    restored = [Experiment(e.name, moved(e.runs), moved(e.baselines)) for e in kept.experiments]
    write_report(restored, tmp_path / "report")
    before, after = ((folder / "report.md").read_text() for folder in (kept.report, tmp_path / "report"))
    assert re.sub(r"\S*/runs/", "", after) == re.sub(r"\S*/runs/", "", before)


def test_what_is_there_is_left_alone(kept, tmp_path):
    mine = tmp_path / "runs" / kept.names[0]
    mine.mkdir(parents=True)
    put, there = archive.restore(kept.record, tmp_path / "runs")
    assert there == [kept.names[0]] and len(put) == len(kept.names) - 1 and not list(mine.iterdir())


def test_a_damaged_archive_puts_back_no_half_run(kept, tmp_path):
    for name, text in content(kept.record).items():
        path = tmp_path / "record" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text[:-40] if name.endswith(".xz") else text)
    with pytest.raises(UserError, match=r"^[^\n]*runs-seed0\.tar\.xz is damaged .*; take it from git again$"):
        archive.restore(tmp_path / "record", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_an_archive_that_is_missing_is_named(tmp_path):
    runs = [Run(write_run(tmp_path / "made" / f"s{seed}", config(seed=seed))) for seed in (0, 1)]
    record.keep_runs(runs, tmp_path / "record")
    (tmp_path / "record" / "runs-seed1.tar.xz").unlink()
    with pytest.raises(UserError, match=r"^[^\n]*/runs-seed1\.tar\.xz lacks s1; take it from git again$"):
        archive.restore(tmp_path / "record", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["../escaped", "run/../../escaped", "/escaped/run", "config.yaml"])
def test_an_archive_writes_nothing_outside_of_its_run(tmp_path, name):
    (tmp_path / "record").mkdir()
    with tarfile.open(tmp_path / "record" / "runs-seed0.tar.xz", "w:xz") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=rf"runs-seed0\.tar\.xz is damaged \({re.escape(name)} is no file of a run\)"):
        archive.restore(tmp_path / "record", tmp_path / "runs")
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_the_runs_of_a_study_are_found_through_its_result(tmp_path):
    assert record.of_studies(tmp_path) == set()
    (tmp_path / "audit").mkdir()
    found = {"claims": [], "runs": [{"run": "a", "baseline": "b", "seed": 0}]}
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(found))
    assert record.of_studies(tmp_path) == {"a", "b"}


def test_runs_are_kept_without_a_report_where_they_are_named(kept, main, tmp_path):
    named = ",".join(str(kept.runs / name) for name in ("exp8-max", "exp8-bf16"))
    code, stdout, _ = main("record.py", f"record={tmp_path / 'record'}", f"runs=[{named}]")
    assert code == 0 and stdout.startswith(f"record: {tmp_path / 'record'}, 3 runs")
    origin = pretrained_run(Run(kept.runs / "exp8-max")).id
    assert {row["run"] for row in archive.table(tmp_path / "record")} == {"exp8-max", "exp8-bf16", origin}
    assert {path.name for path in (tmp_path / "record").iterdir()} == {"runs.csv", "runs-seed0.tar.xz"}


def test_studies_are_kept_without_a_report(kept, main, tmp_path):
    other = next(name for name in kept.names if name.startswith("exp7"))
    found = {"claims": [], "runs": [{"run": "exp8-max", "baseline": "exp8-bf16", "seed": 0}]}
    for name, content in (("audit/audit", found), ("sensitivity/exp7/sensitivity", {"request": {"run": other}})):
        path = tmp_path / "report" / f"{name}.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(content))
    words = f"record={tmp_path / 'record'}", f"report.out={tmp_path / 'report'}", f"runs_dir={kept.runs}"
    code, stdout, _ = main("record.py", *words)
    assert code == 0 and ", 4 runs" in stdout and "left out" not in stdout
    files = {"audit", "sensitivity", "runs.csv", "runs-seed0.tar.xz"}
    assert {path.name for path in (tmp_path / "record").iterdir()} == files


@pytest.mark.parametrize("script", ["record.py", "restore.py"])
def test_a_record_has_a_name(main, script):
    code, _, stderr = main(script)
    assert code == 2 and stderr.startswith("error: record=null: name a folder, as in record=experiments/records/")


def test_only_records_are_restored_and_only_reports_kept(main, tmp_path):
    code, _, stderr = main("restore.py", "record=nowhere")
    assert (code, stderr.count("\n")) == (2, 1) and "record=nowhere: not a record" in stderr
    with pytest.raises(UserError, match=r"has no report\.md and no study; write it first: make report"):
        record.keep_report(tmp_path / "report", tmp_path / "record")
    assert not (tmp_path / "record").exists()


# --------------------------------------------------------------------------------------------- the records in git


@pytest.mark.parametrize("folder", RECORDS, ids=lambda folder: folder.name)
def test_recorded_runs_keep_their_names(folder, tmp_path):
    """Keep what is part of a run's name, and the defaults that are left out of it, as they are."""
    contents = {name: files for path in folder.glob("runs-seed*") for name, files in archive._read(path).items()}
    assert sorted(contents) == [row["run"] for row in archive.table(folder)]
    for name, files in contents.items():
        (tmp_path / "config.yaml").write_bytes(files["config.yaml"])
        assert run_id(Run(tmp_path).typed_config()) == name


def test_a_recorded_table_is_that_of_its_archives(tmp_path):
    (folder,) = [each for each in RECORDS if each.name.endswith("_released")]
    shutil.copytree(folder, tmp_path / "record")
    record.write_table(tmp_path / "record")
    assert (tmp_path / "record" / "runs.csv").read_bytes() == (folder / "runs.csv").read_bytes()
