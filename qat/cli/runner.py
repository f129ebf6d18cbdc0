"""Train and score many runs: what is missing, each after its baseline, and what became of each.

`make exp1` ... `exp8`, `suite`, `rerun_noise`, `decide`, `factorial` and `audit` all come here. With one rank, runs
are trained and scored in this process. With several, each is trained by a torchrun of its own and scored by a process
of its own, so that a failure ends only its run and this process holds no memory of a GPU.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from qat.analysis.compare import against_baseline
from qat.analysis.rerun_noise import original, rerun_noise
from qat.cli import preflight
from qat.cli.outcomes import Outcome, attempt, print_table, summarize
from qat.config import Config
from qat.errors import ConfigError, UserError
from qat.eval.evaluate import evaluate
from qat.report.text import RERUN_HEADER, markdown, rerun_cells, table
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.runs.job import Job, with_baselines
from qat.train import wandb_log
from qat.train.loop import train
from qat.utils import distributed, environment, signals
from qat.utils.environment import ROOT


def complete(jobs: Iterable[Job], ranks: int = 1, after: Callable[[], None] = lambda: None) -> list[Outcome]:
    """Train and score what is missing of `jobs` and their baselines, and print a table of what became of each.

    after: called when a quantized run that was missing has been trained and scored. A run that fails stops no other,
    save those whose baseline it is. A signal or Ctrl-C stops them all. Errors: ConfigError before anything is trained,
    for what so many ranks cannot train.
    """
    if environment.world_size() > 1:
        raise ConfigError(f"WORLD_SIZE={environment.world_size()}: start one process, with launch.ranks for many GPUs")
    jobs = with_baselines(jobs)
    for job in jobs.values():
        distributed.check_world_size(job.cfg, ranks)
    missing = {key for key, job in jobs.items() if _lacks(job.cfg)}
    preflight.check_room([jobs[key].cfg for key in missing])
    outcomes, started = {key: Outcome(key[0], "not begun") for key in jobs}, time.monotonic()
    try:
        for number, (key, job) in enumerate(jobs.items(), start=1):
            name, benchmark = key
            left = len(missing.intersection(list(jobs)[number - 1 :]))
            print(f"\n[{number} of {len(jobs)}] {name}{_estimate(started, len(missing) - left, left)}", flush=True)
            outcomes[key] = _outcome(name, job, outcomes[run_id(baseline_of(job.cfg)), benchmark], ranks)
            if outcomes[key].reason:
                print(f"failed: {outcomes[key].reason}", flush=True)
            elif job.cfg.quantized and key in missing:
                after()
    except signals.Preempted as stop:
        outcomes[key] = Outcome(name, "preempted", str(stop))
        raise
    except KeyboardInterrupt:
        outcomes[key] = Outcome(name, "stopped", "Ctrl-C")
        raise
    finally:
        print_table(list(outcomes.values()), "runs:")
    return list(outcomes.values())


def _lacks(cfg: Config) -> bool:
    """Return whether a run is not trained yet, or not scored on its benchmark."""
    run = Run.of(cfg)
    return not run.finished or cfg.benchmark.name not in run.evaluations()


def refuse_failed(outcomes: Sequence[Outcome]) -> None:
    """Raise `UserError` when a run failed: the last line of a command of many runs."""
    code, line = summarize(outcomes)
    if code:
        raise UserError(line)


def _estimate(started: float, done: int, left: int) -> str:
    if not done or not left:
        return ""
    return f", about {(time.monotonic() - started) / done * left / 60:.0f} min left"


def _outcome(name: str, job: Job, baseline: Outcome, ranks: int) -> Outcome:
    """Train and score one run, unless its baseline failed; returns what became of it."""
    if baseline.state == "failed":
        return Outcome(name, "failed", f"its baseline failed: {baseline.reason}")
    outcome, _ = attempt(name, lambda: _train_and_score(job, ranks))
    gc.collect()  # models and optimizers are in cycles; the next run needs their memory
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return outcome


def _train_and_score(job: Job, ranks: int) -> None:
    train_job(job, ranks)
    if ranks == 1:
        evaluate_and_compare(job.cfg)
    else:
        _call([ROOT / "scripts" / "eval.py"], job)


def train_job(job: Job, ranks: int) -> None:
    """Train a run and its baseline where they are missing, in this process or by torchrun."""
    if ranks == 1:
        train_with_baseline(job.cfg)
    elif job.cfg.retrain or not Run.of(job.cfg).finished:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        _call([*torchrun, ROOT / "scripts" / "train.py"], job)


def _call(command: Sequence[str | Path], job: Job) -> None:
    """Run a command of this interpreter on a job's overrides, and forward to it what stops this process.

    Errors: UserError when it ends with another exit code than 0.
    """
    # Experiments that are sweeps of their own would otherwise be one here, too.
    command = [sys.executable, *command, "hydra.mode=RUN", *job.overrides]
    # In a process group of its own, so that Ctrl-C reaches it once, from here.
    how = {"env": torchrun_environment(), "stdin": subprocess.DEVNULL, "process_group": 0}
    with subprocess.Popen(command, **how) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt as stop:
            preempted = isinstance(stop, signals.Preempted)
            process.send_signal(signal.Signals[str(stop)] if preempted else signal.SIGINT)
            process.wait()  # while it saves
            raise
    if code:
        raise UserError(Run.of(job.cfg).status().get("reason") or f"exit code {code}; the lines above say why")


def torchrun_environment() -> dict[str, str]:
    """Return the environment with what torchrun needs to forward a scheduler's signals and to wait for a checkpoint."""
    needs = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"}
    return needs | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "600"} | os.environ


def train_with_baseline(cfg: Config) -> list[Run]:
    """Train the matched BF16 baseline and then the run, skipping what is finished. Returns [baseline, run] or [run]."""
    distributed.check_world_size(cfg)
    plan = [baseline_of(cfg), cfg] if cfg.quantized else [cfg]
    if not all(Run.of(one).finished for one in plan):
        distributed.init()
        preflight.check(cfg)
    return [train(one) for one in plan]


def evaluate_and_compare(cfg: Config) -> dict | None:
    """Score a run and what it is compared with, print the comparison, and mirror what is new.

    Returns the comparison with the baseline; None for a BF16 run.
    """
    scored = evaluate(cfg)
    run, baseline, comparison = Run.of(cfg), Run.of(baseline_of(cfg)), None
    if any(subject.run.id == baseline.id for subject in scored):
        wandb_log.send(baseline, baseline_of(cfg))
    if cfg.quantized:
        comparison = against_baseline(run, cfg.benchmark.name)
        wandb_log.send(run, cfg, comparison)
        print(f"\n{table(comparison)}", flush=True)
    pairs = [(original(repeat), repeat) for repeat in (baseline, run)] if cfg.repeat else []
    rows = [rerun_cells(rerun_noise(*pair, cfg.benchmark.name)) for pair in pairs if pair[0].finished]
    if rows:
        print(f"\n{markdown(RERUN_HEADER, rows)}", flush=True)
    return comparison
