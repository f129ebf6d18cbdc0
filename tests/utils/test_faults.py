"""Full disks, failing evaluations and kills: nothing that was there is harmed, and the same command ends as if nothing
had happened."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from qat.analysis.compare import comparison_of
from qat.cli import runner
from qat.cli.runner import evaluate_and_compare as evaluate
from qat.config import TaskConfig
from qat.data import heldout
from qat.eval import benchmarks
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of
from qat.train import checkpoint, loop
from qat.utils import files
from tests.conftest import ROOT, RUNS
from tests.helpers.torture import left

WORDS = ("experiment=exp8", "budget.accumulation=1", "budget.steps=5", "budget.checkpoint_every=2", "model.blocks=2")
WORDS += ("model.architecture.num_hidden_layers=2", "quant.bf16_blocks=0", "warmup.bf16=0.2")
TASKS = {"hellaswag": TaskConfig(limit=2)}


@pytest.fixture(scope="module")
def trained(configure, tmp_path_factory):
    """The configuration of a run that is finished, as its baseline is."""
    cfg = configure(tmp_path_factory.mktemp("trained"), *WORDS, **{"benchmark.tasks": TASKS})
    runner.train_with_baseline(cfg)
    return cfg


def moved(cfg, folder: Path):
    """The same in a copy of its runs."""
    shutil.copytree(getattr(cfg, RUNS), folder)
    return dataclasses.replace(cfg, **{RUNS: str(folder)})


# ----------------------------------------------------------------------------------------------------------- full disks


class Disk:
    """Counts what is written, by file; and is full from a given write on, which it takes half of."""

    def __init__(self, patch: pytest.MonkeyPatch, room: int | None = None):
        self.written, self.room, self.failed = [], room, set()
        opened, save_file = Path.open, checkpoint.save_file
        replace, rename, flush = os.replace, os.rename, os.fsync

        def writing(real):
            def write(path, content, **how):
                if self.full(path):
                    real(path, content[: len(content) // 2], **how)
                    raise self.error()
                return real(path, content, **how)

            return write

        def appending(path, mode="r", *rest, **how):
            file = opened(path, mode, *rest, **how)
            return Appended(self, path, file) if mode == "a" else file

        def tensors(content, path):
            save_file(content, path)
            if self.full(path):
                os.truncate(path, path.stat().st_size // 2)
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        def moving(real):
            def move(source, target):
                removed = Path(target).name.startswith(files.REMOVING)  # needs no room
                if not removed and self.full(Path(target), Path(source)):
                    raise self.error(source)
                return real(source, target)

            return move

        def flushing(descriptor):
            if self.full(Path("flush")):
                raise self.error()
            return flush(descriptor)

        patch.setattr(Path, "write_text", writing(Path.write_text))
        patch.setattr(Path, "write_bytes", writing(Path.write_bytes))
        patch.setattr(Path, "open", appending)
        patch.setattr(checkpoint, "save_file", tensors)
        patch.setattr(os, "replace", moving(replace))
        patch.setattr(os, "rename", moving(rename))
        patch.setattr(files.os, "fsync", flushing)

    def full(self, path: Path, named: Path | None = None) -> bool:
        """Return whether the write to `path` fails, which is to be told by the name of `named`."""
        self.written.append(path.name)
        full = self.room is not None and len(self.written) > self.room
        self.failed |= {(named or path).name} if full else set()
        return full

    @staticmethod
    def error(*name) -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *name)


class Appended:
    """A file opened for appending, of which a full disk takes half a write."""

    def __init__(self, disk: Disk, path: Path, file):
        self.disk, self.path, self.file = disk, path, file

    def write(self, text: str) -> None:
        full = text and self.disk.full(self.path)
        self.file.write(text[: len(text) // 2] if full else text)
        if full:
            self.file.flush()
            raise self.disk.error()

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def last(written: list[str]) -> list[int]:
    """The position of the last write of each file."""
    return sorted({name: number for number, name in enumerate(written)}.values())


def refused(room: int, work) -> None:
    """Work on a disk that is full after so many writes: the error names a file that was not written."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(OSError, match="No space left on device") as caught:
        disk = Disk(patch, room)
        work()
    assert caught.value.errno == errno.ENOSPC
    assert "flush" in disk.failed or Path(caught.value.filename).name in disk.failed


def test_a_disk_that_is_full_at_any_write_costs_no_number(trained, configure, tmp_path, capsys):
    def fresh(name: str):
        return configure(tmp_path / name, *WORDS)

    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        loop.train(fresh("counted"))
    named = {
        "config.yaml",
        "environment.json",
        "sources.json",
        "status.json",
        "coverage.json",
        "metrics.jsonl",
        "telemetry.jsonl",
    }
    named |= {"model.safetensors", "optimizer.safetensors", "rng.safetensors", "scales.safetensors", "facts.json"}
    assert {name.removeprefix(".").removesuffix(".writing") for name in disk.written} >= named
    wanted = left(Run.of(trained))
    for room in last(disk.written):
        cfg = fresh(str(room))
        run = Run.of(cfg)
        refused(room, lambda cfg=cfg: loop.train(cfg))
        assert run.status().get("state") in (None, "running") and len(run.metrics()) <= cfg.steps
        saved = sorted(run.checkpoints.glob("step-*"))
        assert all(checkpoint.load(path) for path in saved)
        loop.train(cfg)
        assert left(run) == wanted, disk.written[room]


def test_a_full_disk_is_said_in_one_line(trained, texts, main, tmp_path, monkeypatch):
    words = ["model=tiny", "budget=smoke", "logger=local", *WORDS, "data.source=files", f"data.path={texts}"]
    shutil.copytree(getattr(trained, RUNS), tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs" / Run.of(trained).id)
    Disk(monkeypatch, 60)
    code, _, stderr = main("train.py", *words)
    *_, line = stderr.splitlines()
    assert code == 2 and line.startswith(f"error: runs/{Run.of(trained).id}/"), stderr
    assert line.endswith(": No space left on device") and "Traceback" not in stderr


# ----------------------------------------------------------------------------------------------------------- evaluation


class Fault(Exception):
    pass


@pytest.fixture(scope="module")
def once():
    """Work out once for all tests: the scores that all models get, and what an evaluation leaves."""
    return {}


@pytest.fixture
def scoring(monkeypatch, once):
    """Score all models alike; the call of number `score.fails` raises, `score.calls` has an entry a call."""
    calls, real = [], benchmarks.score

    def score(*given, **how):
        calls.append(None)
        if len(calls) == score.fails:
            raise score.error
        if "scores" not in once:
            once["scores"] = real(*given, **how)
        return once["scores"]

    score.fails, score.error, score.calls = None, Fault("in a benchmark"), calls
    monkeypatch.setattr(benchmarks, "score", score)
    return score


def results(cfg) -> dict:
    """Return what scoring left, without the clock."""
    found = {}
    for each in (cfg, baseline_of(cfg), pretrained_of(cfg)):
        run = Run.of(each)
        records = run.evaluations()
        for modes in records.values():
            for record in modes.values():
                for clock in ("seconds", "calibration_seconds"):
                    record.pop(clock, None)
        found[run.id] = records, comparison_of(run, "smoke"), run.samples("smoke", "bf16", "hellaswag")
    return found


def training(cfg) -> dict:
    """Return what training left."""
    paths = [Run.of(each).path for each in (cfg, baseline_of(cfg))]
    kept = [file for path in paths for file in (*path.glob("checkpoints/*/*"), *path.glob("*.jsonl"))]
    return {str(file): (file.read_bytes(), file.stat().st_mtime_ns) for file in kept}


@pytest.fixture
def wanted(trained, scoring, once, tmp_path):
    """Return what an undisturbed evaluation leaves."""
    if "results" not in once:
        cfg = moved(trained, tmp_path / "undisturbed")
        evaluate(cfg)
        scoring.calls.clear()
        once["results"] = results(cfg)
    return once["results"]


@pytest.mark.parametrize("error", [Fault("in a benchmark"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("fails", [1, 2, 5])
def test_an_evaluation_that_fails_goes_on_with_what_is_missing(trained, scoring, wanted, tmp_path, fails, error):
    cfg = moved(trained, tmp_path / "runs")
    before = training(cfg)
    scoring.fails, scoring.error = fails, error
    with pytest.raises(type(error)):
        evaluate(cfg)
    assert sum(len(modes) for found, *_ in results(cfg).values() for modes in found.values()) == fails - 1
    scoring.calls.clear()
    scoring.fails = None
    evaluate(cfg)
    assert len(scoring.calls) == 5 - (fails - 1)
    assert results(cfg) == wanted and training(cfg) == before


def test_a_held_out_text_that_fails_leaves_no_half_record(trained, scoring, wanted, tmp_path, monkeypatch):
    cfg = moved(trained, tmp_path / "runs")

    def fail(*_):
        raise Fault

    with monkeypatch.context() as patch, pytest.raises(Fault):
        patch.setattr(heldout, "load_heldout", fail)
        evaluate(cfg)
    assert all(found == {} and samples == [] for found, _, samples in results(cfg).values())
    evaluate(cfg)
    assert results(cfg) == wanted


def test_a_disk_that_is_full_while_scoring_harms_nothing(trained, scoring, wanted, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(patch)
        evaluate(moved(trained, tmp_path / "counted"))
    assert {".hellaswag.jsonl.writing", ".eval.json.writing"} <= set(disk.written)
    for room in last(disk.written):
        cfg = moved(trained, tmp_path / str(room))
        before = training(cfg)
        refused(room, lambda cfg=cfg: evaluate(cfg))
        results(cfg)  # all can be read
        evaluate(cfg)
        assert results(cfg) == wanted and training(cfg) == before


def test_a_stop_while_other_questions_are_written_leaves_no_old_scores_beside_new_answers(trained, scoring, tmp_path):
    cfg = moved(trained, tmp_path / "runs")
    evaluate(cfg)
    before = Run.of(cfg).evaluations()
    cfg.benchmark = dataclasses.replace(cfg.benchmark, split="validation")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "write_samples", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        evaluate(cfg)
    pretrained = Run.of(pretrained_of(cfg))
    assert not pretrained.evaluations()["smoke"]
    assert Run.of(cfg).evaluations() == before  # not reached


# ------------------------------------------------------------------------------------------------------------- kills


@pytest.mark.slow
def test_a_command_that_is_killed_again_and_again_loses_nothing_but_time(texts):
    """Do what `make torture` does, for half a minute."""
    words = ["data.source=files", f"data.path={texts}", "budget.steps=16"]
    command = [sys.executable, "-m", "tests.helpers.torture", "--warm", "--kills", "4", "--seed", "3", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills, 1 runs finished, 0 differences" in done.stdout
