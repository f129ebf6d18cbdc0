"""The runs of a study: which there are, and training and scoring those that are missing."""

from __future__ import annotations

import copy
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qat import ranks
from qat.config import Config, ConfigError, UserError
from qat.evaluate import evaluate
from qat.identity import baseline_of, run_id
from qat.loop import train_with_baseline
from qat.runs import Run

Key = tuple[str, ...]  # the levels of a cell, one a factor


@dataclass
class Cell:
    """One run of a study. Cells of one key differ in their seed."""

    key: Key
    cfg: Config

    @property
    def label(self) -> str:
        return f"{', '.join(self.key)}, seed {self.cfg.seed}"


def replicated(cells: Sequence[Cell], seeds: Iterable[int]) -> list[Cell]:
    """Every cell at every seed, one seed after the other."""
    found = []
    for seed in seeds:
        for cell in cells:
            cfg = copy.deepcopy(cell.cfg)
            cfg.seed = seed
            found.append(Cell(cell.key, cfg))
    return found


def refuse(words: Iterable[str], own: Sequence[str], study: str) -> None:
    """Raise `ConfigError` when the command line sets what the study itself sets."""
    for word in words:
        if word.lstrip("+").partition("=")[0] in own:
            raise ConfigError(f"{word}: the {study} sets this itself; leave it out")


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
    """Whether this is one of many ranks, which train and leave the rest to a single process."""
    return ranks.count() > 1


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
            evaluate(cfg)
    except Exception as error:
        if trained_only():
            raise
        if isinstance(error, UserError):
            return str(error)
        traceback.print_exc()  # a defect of ours, to be seen whole
        return " ".join(f"{type(error).__name__}: {error}".split())[:400]
    return ""
