"""Train and score many runs: what is missing, baselines first, and what became of each."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence

from qat.analysis.compare import against_baseline
from qat.analysis.rerun_noise import original, rerun_noise
from qat.cli import preflight
from qat.config import Config
from qat.errors import UserError
from qat.eval.evaluate import evaluate
from qat.report.text import RERUN_HEADER, markdown, rerun_cells, table
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.studies.design import Cell
from qat.train import wandb_log
from qat.train.loop import train
from qat.utils import distributed, environment


def complete(cells: Sequence[Cell]) -> dict[str, str]:
    """Train and score what is missing of `cells`, all baselines first; returns {run id: why it failed}.

    A run that fails stops no other, save those whose baseline it is. Under torchrun runs are only trained, and the
    first failure ends it all: the ranks must not part.
    """
    jobs = {run_id(cfg): cfg for cfg in (*(baseline_of(cell.cfg) for cell in cells), *(cell.cfg for cell in cells))}
    missing = [name for name, cfg in jobs.items() if not Run.of(cfg).finished]
    failed, started = {}, time.monotonic()
    for number, (name, cfg) in enumerate(jobs.items(), start=1):
        left = sum(each in missing for each in list(jobs)[number - 1 :])
        print(f"\n[{number} of {len(jobs)}] {name}{_estimate(started, len(missing) - left, left)}", flush=True)
        cause = failed.get(run_id(baseline_of(cfg)))
        reason = f"its baseline failed: {cause}" if cause else _attempt(cfg)
        if reason:
            failed[name] = reason
            print(f"failed: {reason}", flush=True)
    return failed


def trained_only() -> bool:
    """Return whether this is one of many ranks, which train and leave the rest to a single process."""
    return environment.world_size() > 1


def report(failed: Mapping[str, str]) -> None:
    """Print every failed run with its reason, and raise `UserError` when there is one."""
    for name, reason in failed.items():
        print(f"  failed  {name}  {reason}")
    if failed:
        raise UserError(f"{len(failed)} runs failed; the same command runs only what is missing")


def _estimate(started: float, done: int, left: int) -> str:
    if not done or not left:
        return ""
    return f", about {(time.monotonic() - started) / done * left / 60:.0f} min left"


def _attempt(cfg: Config) -> str:
    """Train and score one run; returns why that failed, or nothing."""
    try:
        train_with_baseline(cfg)
        if not trained_only():
            evaluate_and_compare(cfg)
    except Exception as error:
        if trained_only():
            raise
        if isinstance(error, UserError):
            return str(error)
        traceback.print_exc()  # a defect of ours, to be seen whole
        return " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return ""


def train_with_baseline(cfg: Config) -> list[Run]:
    """Train the matched BF16 baseline and then the run, skipping what is finished. Returns [baseline, run] or [run]."""
    distributed.check_world_size(cfg)
    plan = [baseline_of(cfg), cfg] if cfg.quantized else [cfg]
    if not all(Run.of(each).finished for each in plan):
        distributed.init()
        preflight.check(cfg)
    return [train(each) for each in plan]


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
    repeats = [each for each in dict.fromkeys((baseline, run)) if cfg.repeat and original(each).finished]
    if repeats:
        rows = [rerun_cells(rerun_noise(original(each), each, cfg.benchmark.name)) for each in repeats]
        print(f"\n{markdown(RERUN_HEADER, rows)}", flush=True)
    return comparison
