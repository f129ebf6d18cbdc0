"""The runs of a study: which there are, and training and scoring those that are missing."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qat.config import Config
from qat.errors import ConfigError

Key = tuple[str, ...]  # the levels of a cell, one a factor
# (experiment, command-line words, changes) -> its configuration: `qat.cli.experiments.variant`.
Compose = Callable[[str, list[str], list[str]], Config]


@dataclass
class Cell:
    """One run of a study. Cells of one key differ in their seed."""

    key: Key
    cfg: Config

    @property
    def label(self) -> str:
        return f"{', '.join(self.key)}, seed {self.cfg.seed}"


def replicated(cells: Sequence[Cell], seeds: Iterable[int]) -> list[Cell]:
    """Return every cell at every seed, one seed after the other."""
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
