"""Records: what goes in comes back, but for the weights, and a suite goes on from there."""

import json
import re
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from qat.errors import UserError
from qat.report import record
from qat.report.experiment import Experiment, pretrained
from qat.report.page import write_report
from qat.runs import archive
from qat.runs.folder import Run
from tests.helpers.synthetic_runs import config, suite, write_run


@dataclass
class Kept:
    runs: Path
    experiments: list[Experiment]
    report: Path
    record: Path
    names: list[str]
    unfinished: list[str]


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Kept:
    """A suite that was run, reported and kept as a record."""
    root = tmp_path_factory.mktemp("suite")
    experiments = suite(root / "runs")[-2:]
    write_report(experiments, root / "report", {})
    weights = root / "runs" / "exp8-max" / "checkpoints" / "step-00000036" / "model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"w" * 1000)
    runs = {run.id: run for e in experiments for run in (*e.runs, *e.baselines)}
    runs |= {origin.id: origin for run in runs.values() if (origin := pretrained(run))}
    half = Run(write_run(root / "runs" / "half", config(), [2.0], state="running"))
    record.keep_report(root / "report", root / "record")
    told = archive.keep([*runs.values(), half, Run(root / "runs" / "never")], root / "record")
    return Kept(root / "runs", experiments, root / "report", root / "record", *told)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_record_has_the_report_and_the_small_parts_of_finished_runs(kept):
    assert len(kept.names) == 5 and set(kept.unfinished) == {"half", "never"}
    assert {path.name for path in (kept.record / "runs").iterdir()} == set(kept.names)
    assert content(kept.report).items() <= content(kept.record).items()
    files = {path.name for path in (kept.record / "runs" / "exp8-max").iterdir()}
    assert files == {"config.yaml", "environment.json", "status.json", "metrics.jsonl", "eval.json", "raw.tar.xz"}


def test_the_same_runs_make_the_same_record(kept, tmp_path):
    for path in kept.runs.rglob("*.jsonl"):
        path.touch()
    record.keep_report(kept.report, tmp_path / "again")
    archive.keep([Run(kept.runs / name) for name in kept.names], tmp_path / "again")
    assert content(tmp_path / "again") == content(kept.record)


def test_what_is_restored_makes_the_same_report(kept, tmp_path):
    put, there = archive.restore(kept.record, tmp_path / "runs")
    assert set(put) == set(kept.names) and not there
    for name in kept.names:
        ours, theirs = content(tmp_path / "runs" / name), content(kept.runs / name)
        assert ours == {file: text for file, text in theirs.items() if not file.startswith("checkpoints")}

    def moved(group: list[Run]) -> list[Run]:
        return [Run(tmp_path / "runs" / run.id) for run in group]

    restored = [Experiment(e.name, moved(e.runs), moved(e.baselines)) for e in kept.experiments]
    write_report(restored, tmp_path / "report", {})
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
    with pytest.raises(UserError, match=r"raw\.tar\.xz is damaged .*; take it from git again"):
        archive.restore(tmp_path / "record", tmp_path / "runs")
    assert not list((tmp_path / "runs").iterdir())


def test_an_archive_writes_nothing_outside_of_its_run(kept, tmp_path):
    run = tmp_path / "record" / "runs" / kept.names[0]
    shutil.copytree(kept.record / "runs" / kept.names[0], run)
    with tarfile.open(run / "raw.tar.xz", "w:xz") as tar:
        tar.addfile(tarfile.TarInfo("../../escaped"))
    with pytest.raises(UserError, match=r"raw\.tar\.xz is damaged \(\.\./\.\./escaped is no file of a run\)"):
        archive.restore(tmp_path / "record", tmp_path / "runs")
    assert not (tmp_path / "escaped").exists() and not list((tmp_path / "runs").iterdir())


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
    origin = pretrained(Run(kept.runs / "exp8-max")).id
    assert {path.name for path in (tmp_path / "record" / "runs").iterdir()} == {"exp8-max", "exp8-bf16", origin}
    assert [path.name for path in (tmp_path / "record").iterdir()] == ["runs"]


def test_a_study_is_kept_without_a_report(kept, main, tmp_path):
    found = {"claims": [], "runs": [{"run": "exp8-max", "baseline": "exp8-bf16", "seed": 0}]}
    (tmp_path / "report" / "audit").mkdir(parents=True)
    (tmp_path / "report" / "audit" / "audit.json").write_text(json.dumps(found))
    words = f"record={tmp_path / 'record'}", f"report.out={tmp_path / 'report'}", f"runs_dir={kept.runs}"
    code, stdout, _ = main("record.py", *words)
    assert code == 0 and ", 3 runs" in stdout and "left out" not in stdout
    assert {path.name for path in (tmp_path / "record").iterdir()} == {"audit", "runs"}


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
