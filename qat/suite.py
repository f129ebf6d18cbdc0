"""The experiments as configurations: what `experiment=expN` stands for, its own sweep expanded."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hydra import compose

from qat.cli import typed
from qat.config import Config

_OWN = ("experiment=", "report.", "bench.", "study.", "run=", "runs=")


def cells(experiment: str, overrides: list[str], seeds: Sequence[int] | None = None) -> list[Config]:
    """Every configuration of an experiment under the given command-line overrides, inside a Hydra entry; with each of
    `seeds` in the place of the overrides' own."""
    words = _shared(overrides)
    if seeds:
        words = [word for word in words if not word.startswith("seed=")]
    base = compose("train", [f"experiment={experiment}", *words], return_hydra_config=True)
    sweep = base.hydra.sweeper.params or {}
    given = {word.partition("=")[0] for word in words}  # what the command line sets is not swept
    axes = [[f"{key}={value}" for value in str(values).split(",")] for key, values in sweep.items() if key not in given]
    axes += [[f"seed={seed}" for seed in seeds]] if seeds else []
    return [_compose([f"experiment={experiment}", *words, *cell]) for cell in itertools.product(*axes)]


def variant(experiment: str, overrides: list[str], changes: list[str]) -> Config:
    """An experiment under command-line overrides and then `changes`, without its own sweep, inside a Hydra entry."""
    return _compose([f"experiment={experiment}", *_shared(overrides), *changes])


def _shared(overrides: list[str]) -> list[str]:
    """The overrides that are about the runs."""
    return [word for word in overrides if not word.startswith(_OWN)]


def _compose(words: list[str]) -> Config:
    return typed(compose("train", words))
