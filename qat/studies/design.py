"""The runs of a study: which there are, and of which cell each is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qat.config import Config
from qat.errors import ConfigError
from qat.runs.job import Job

Key = tuple[str, ...]  # the levels of a cell, one a factor
# (experiment, command-line overrides, changes) -> its job: `qat.cli.experiments.variant`
Compose = Callable[[str, Sequence[str], Sequence[str]], Job]


@dataclass
class Cell(Job):
    """One run of a study. Cells of one key differ in their seed."""

    key: Key

    @property
    def name(self) -> str:
        return ", ".join(self.key) + ("" if self.cfg.benchmark.tasks else f", {self.cfg.benchmark.name} alone")

    @property
    def label(self) -> str:
        return f"{self.name}, {of_seeds([self.cfg.seed])}"


def with_seeds(cells: Sequence[Cell], seeds: Iterable[int]) -> list[Cell]:
    """Return every cell with every seed, one seed after the other."""
    seeded = []
    for seed in seeds:
        for cell in cells:
            cfg = copy.deepcopy(cell.cfg)
            cfg.seed = seed
            seeded.append(Cell(cfg, [*cell.overrides, f"seed={seed}"], cell.key))
    return seeded


def of_seeds(seeds: Sequence[int]) -> str:
    """Name the seeds."""
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds)) or 'none'}"


def need_other_text(cfg: Config) -> None:
    """Raise `ConfigError` where no text of another kind is measured, which claims are about."""
    if cfg.validation is None:
        raise ConfigError("validation=none: claims are about text of another kind than that of training; name one")


def refuse(overrides: Iterable[str], own: Sequence[str], study: str) -> None:
    """Raise `ConfigError` when the command line sets what the study itself sets."""
    for override in overrides:
        if override.lstrip("+").partition("=")[0] in own:
            raise ConfigError(f"{override}: the {study} sets this itself; leave it out")
