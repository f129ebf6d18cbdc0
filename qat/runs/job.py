"""A run that is to be made: its configuration, and the command-line overrides that describe it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from qat.config import Config
from qat.runs.identity import baseline_of, run_id


@dataclass
class Job:
    """Hold a run's configuration and the overrides of conf/train.yaml that compose to it."""

    cfg: Config
    overrides: list[str]

    @property
    def baseline(self) -> Job:
        """Its matched BF16 baseline; of a BF16 run, itself."""
        return Job(baseline_of(self.cfg), [*self.overrides, "quant.format=none"]) if self.cfg.quantized else self


def with_baselines(jobs: Iterable[Job]) -> dict[tuple[str, str], Job]:
    """Return the jobs and their baselines by (run id, benchmark), each once, each after its baseline."""
    jobs = list(jobs)
    ordered = {_key(one.cfg): one for job in jobs for one in (job.baseline, job)}
    return ordered | {_key(job.cfg): job for job in jobs}  # an experiment's own run is described as its own


def _key(cfg: Config) -> tuple[str, str]:
    return run_id(cfg), cfg.benchmark.name
