"""Sweeps under each launcher: no job stops or hides another, nothing runs twice, a preempted job is requeued."""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from qat.errors import UserError
from qat.runs.folder import Run
from qat.train import loop
from qat.train.step import Trainer
from tests.conftest import ROOT, TINY
from tests.helpers.torture import left

BF16 = (*TINY, "quant=bf16", "budget.accumulation=1")
TRAIN = [sys.executable, str(ROOT / "scripts" / "train.py"), "-m"]


def table(out: str) -> list[str]:
    """The rows of the table of a sweep or of runs: what is indented below its heading at the end of the output."""
    return re.sub(" +", " ", re.split("\n(?:sweep|runs):", out)[-1]).splitlines()[1:]


def starts(lines: list[str], wanted: list[str]) -> bool:
    return [line[: len(start)] for line, start in zip(lines, wanted, strict=True)] == wanted


# --------------------------------------------------------------------------------------------------- one after another


def asked_to_stop(_):
    os.kill(os.getpid(), signal.SIGTERM)


def stopped_by_the_user(_):
    raise KeyboardInterrupt


def wrong(_):
    raise UserError("optim.lr=0.1: too high; lower it")


def refused(_):
    raise OSError(28, "No space left on device", "runs")


def defective(_):
    raise ValueError("a defect\nof two lines")


# (what job 1 of 0, 1, 2 does, the exit code, what becomes of jobs 1 and 2, the end of stderr)
ENDS = [
    (wrong, 2, ["failed seed=1 optim.lr=0.1: too high; lower it", "done seed=2"], "error: 1 of 3 runs failed"),
    (refused, 2, ["failed seed=1 runs: No space left on device", "done seed=2"], "error: 1 of 3 runs failed"),
    (defective, 2, ["failed seed=1 ValueError: a defect of two lines", "done seed=2"], "error: 1 of 3 runs failed"),
    (asked_to_stop, 75, ["preempted seed=1 SIGTERM", "preempted seed=2 not begun"], "2 of 3 runs preempted"),
    (stopped_by_the_user, 130, ["stopped seed=1 Ctrl-C"], "stopped; the same command continues"),
]


@pytest.mark.parametrize(("does", "code", "rows", "last"), ENDS, ids=[each[0].__name__ for each in ENDS])
def test_a_table_says_what_became_of_every_job(main, monkeypatch, does, code, rows, last):
    monkeypatch.setattr("qat.cli.runner.train_with_baseline", lambda cfg: does(cfg) if cfg.seed == 1 else None)
    left, out, stderr = main("train.py", "-m", *TINY, "seed=0,1,2")
    assert left == code and stderr.splitlines()[-1].startswith(last)
    assert table(out) == [f" {row}" for row in ["done seed=0", *rows]]
    assert ("Traceback" in stderr) == (does is defective)


@pytest.mark.parametrize(("does", "code"), [(refused, 2), (defective, 1)])
def test_ranks_do_not_part(main, monkeypatch, does, code):
    """End all ranks where one fails alone; were it to begin the next job, the others' collectives would meet another
    run's."""
    begun = []
    monkeypatch.setattr("qat.cli.runner.train_with_baseline", lambda cfg: (begun.append(cfg.seed), does(cfg)))
    monkeypatch.setattr("qat.cli.sweep.environment.world_size", lambda: 2)
    assert main("train.py", "-m", *TINY, "seed=0,1")[0] == code and begun == [0]


def test_a_configuration_that_every_rank_refuses_stops_no_other_job(main, monkeypatch):
    monkeypatch.setattr("qat.cli.sweep.environment.world_size", lambda: 2)
    monkeypatch.setattr("qat.cli.runner.train_with_baseline", lambda cfg: None)
    left, out, _ = main("train.py", "-m", *TINY, "optim.lr=1e-4,-1")
    assert left == 2 and [row.split()[0] for row in table(out)] == ["done", "failed"]


# -------------------------------------------------------------------------------------------------------- side by side


@pytest.mark.slow
def test_jobs_side_by_side_wait_for_each_other(texts, configure, tmp_path):
    """Half a minute, in processes of joblib's. Two jobs of one run, as two of one baseline, and two that fail."""
    overrides = [*BF16, "data.source=files", f"data.path={texts}"]
    run = Run.of(configure(tmp_path / "runs", *BF16))
    with run.lock():
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        cells = ["seed=0,-1", "data.tokenizer_threads=1,2"]
        sweep = subprocess.Popen([*TRAIN, "hydra/launcher=local", *overrides, *cells], cwd=tmp_path, **streams)
        waiting = (line for line in sweep.stdout if f"{run.id}: waiting for process {os.getpid()} on " in line)
        assert len(list(itertools.islice(waiting, 2))) == 2
    with sweep:
        out = sweep.stdout.read()
    done = [f" done seed=0 data.tokenizer_threads={threads}" for threads in (1, 2)]
    failed = [f" failed seed=-1 data.tokenizer_threads={threads} seed=-1: must lie in" for threads in (1, 2)]
    assert starts(table(out), [*done, *failed]) and sweep.returncode == 2
    assert run.finished and out.count(f"{run.id}: finished already") == 1


def test_a_repeated_sweep_runs_what_is_missing(main, texts, configure, tmp_path, monkeypatch):
    overrides = [*BF16, "data.source=files", f"data.path={texts}"]
    loop.train(configure(tmp_path / "runs", *BF16, "seed=0"))
    missing = Run.of(configure(tmp_path / "runs", *BF16, "seed=1"))
    trained, step = [], Trainer.step

    def counted(self, number, batches, **how):
        trained.append(number)
        return step(self, number, batches, **how)

    monkeypatch.setattr(Trainer, "step", counted)
    code, out, _ = main("train.py", "-m", *overrides, "seed=0,1,-1")
    assert code == 2 and starts(table(out), [" done seed=0", " done seed=1", " failed seed=-1 seed=-1: must lie in"])
    assert missing.finished and trained == list(range(1, 13))


# -------------------------------------------------------------------------------------------------- under a scheduler


def until(true, process) -> None:
    deadline = time.monotonic() + 240
    while not true() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)


@pytest.mark.slow
def test_a_preempted_job_saves_is_requeued_and_ends_like_an_uninterrupted_one(texts, configure, tmp_path):
    """submitit's signals in its local executor: SIGTERM, which it only notes, and then the one that it requeues on."""
    words = [*BF16, "budget.steps=40", "budget.checkpoint_every=1000"]  # nothing but the signals makes it save
    cfg = configure(tmp_path / "runs", *words)
    run = Run.of(cfg)
    command = [*TRAIN, "hydra/launcher=submitit_local", *words, "data.source=files", f"data.path={texts}"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # jobs import qat, installed or not
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **streams) as sweep:
        until(lambda: len(run.metrics()) >= 3, sweep)
        job = int(re.match(r"process (\d+) on ", (run.path / ".lock").read_text())[1])
        os.kill(job, signal.SIGTERM)
        until(lambda: saved(run) and len(run.metrics()) >= saved(run) + 3, sweep)
        os.kill(job, signal.SIGUSR2)
        out = sweep.stdout.read()
    assert sweep.returncode == 0 and table(out)[0].startswith(" done"), out
    (log,) = tmp_path.rglob("*_log.out")
    happened = re.findall(
        "Bypassing signal SIGTERM|Requeued|resuming after step|completed successfully", log.read_text()
    )
    resumed = "resuming after step"
    assert happened == ["Bypassing signal SIGTERM", resumed, "Requeued", resumed, "completed successfully"]
    assert [row["step"] for row in run.metrics()] == list(range(1, 41))
    assert left(run) == left(loop.train(configure(tmp_path / "uninterrupted", *words)))


def saved(run: Run) -> int:
    """The step of the newest checkpoint, or 0."""
    return max((int(path.name.removeprefix("step-")) for path in run.checkpoints.glob("step-*")), default=0)


@pytest.mark.parametrize("launcher", ["slurm", "local", "joblib"])
def test_a_launcher_that_is_not_installed_is_answered_with_the_command(main, monkeypatch, launcher):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    line = f"error: hydra/launcher={launcher}: its plugin is not installed; pip install -e '.[launchers]'\n"
    assert main("train.py", "-m", f"hydra/launcher={launcher}", *TINY) == (2, "", line)


def test_the_slurm_launcher_asks_for_what_its_configuration_says(main, monkeypatch, tmp_path):
    """The batch file that SLURM would get, by an sbatch that keeps it and refuses."""
    for name, does in {"srun": "", "sbatch": f'cp "$1" {tmp_path}/batch; echo "no such account" >&2; exit 1'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    words = ["hydra/launcher=slurm", "hydra.launcher.account=lab", "hydra.launcher.setup=[module load cuda]"]
    code, _, stderr = main("train.py", "-m", *words, *TINY, "seed=0,1")
    assert code == 2 and stderr.splitlines()[-1].startswith("error: ") and "no such account" in stderr.splitlines()[-1]
    batch = (tmp_path / "batch").read_text().splitlines()
    wanted = {"account=lab", "array=0-1%2", "gpus-per-node=1", "mem=32GB", "requeue", "signal=USR2@180", "time=720"}
    assert {f"#SBATCH --{each}" for each in wanted} <= set(batch) and "module load cuda" in batch
    assert not [line for line in batch if "None" in line or "null" in line]
