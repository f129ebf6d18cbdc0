"""The experiments as configurations: what `experiment=expN` stands for, its own sweep expanded. And as jobs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hydra import compose

from qat.cli.entry import typed_config
from qat.config import Config
from qat.report.experiment import Experiment
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id
from qat.utils import distributed

_OWN = ("experiment=", "report.", "bench.", "study.", "run=", "runs=", "record=")


def configs_of(experiment: str, overrides: list[str], seeds: Sequence[int] | None = None) -> list[Config]:
    """Return every configuration of an experiment under the given command-line overrides, inside a Hydra entry; with
    each of `seeds` in the place of the overrides' own. Where overrides make cells of its sweep one run, it is there
    once."""
    found = map(_compose, _lines(experiment, overrides, seeds))
    return list({run_id(cfg): cfg for cfg in found}.values())


def jobs(
    experiments: Sequence[str], overrides: list[str], seeds: Sequence[int] | None = None
) -> tuple[list[list[str]], list[list[str]]]:
    """Return (baselines, quantized runs) of experiments, each as the overrides that train it alone, inside a Hydra
    entry. What experiments share is there once. Errors: ConfigError for what these ranks cannot train."""
    baselines, runs = {}, {}
    for experiment in experiments:
        for words in _lines(experiment, overrides, seeds):
            cfg = _compose(words)
            distributed.check_world_size(cfg)
            baselines.setdefault(run_id(baseline_of(cfg)), [*words, "quant=bf16"] if cfg.quantized else words)
            if cfg.quantized:
                runs.setdefault(run_id(cfg), words)
    return list(baselines.values()), list(runs.values())


def _lines(experiment: str, overrides: list[str], seeds: Sequence[int] | None) -> list[list[str]]:
    """Return the words of each configuration of an experiment."""
    words = _shared(overrides)
    if seeds:
        words = [word for word in words if not word.startswith("seed=")]
    base = compose("train", [f"experiment={experiment}", *words], return_hydra_config=True)
    sweep = base.hydra.sweeper.params or {}
    given = {word.partition("=")[0] for word in words}  # what the command line sets is not swept
    axes = [[f"{key}={value}" for value in str(values).split(",")] for key, values in sweep.items() if key not in given]
    axes += [[f"seed={seed}" for seed in seeds]] if seeds else []
    return [[f"experiment={experiment}", *words, *cell] for cell in itertools.product(*axes)]


def command(experiment: str, overrides: list[str], seeds: Sequence[int] | None = None) -> str:
    """Return what makes an experiment under command-line overrides, with each of `seeds`."""
    words = _shared(overrides)
    given = dict(word.split("=", 1) for word in words if word.startswith(("budget=", "protocol=", "seed=")))
    given |= {"seed": ",".join(map(str, seeds))} if seeds else {}
    named = {"budget": ("BUDGET", "laptop"), "protocol": ("PROTOCOL", "paper"), "seed": ("SEEDS", "0")}
    parts = [f"{named[key][0]}={value}" for key, value in given.items() if value != named[key][1]]
    rest = " ".join(word for word in words if word.partition("=")[0] not in given)
    return " ".join(["make", experiment, *parts, *([f'ARGS="{rest}"'] if rest else [])])


def variant(experiment: str, overrides: list[str], changes: list[str]) -> Config:
    """Return an experiment under command-line overrides and then `changes`, without its own sweep, inside a Hydra
    entry."""
    return _compose([f"experiment={experiment}", *_shared(overrides), *changes])


def _shared(overrides: list[str]) -> list[str]:
    """Return the overrides that are about the runs."""
    return [word for word in overrides if not word.startswith(_OWN)]


def _compose(words: list[str]) -> Config:
    return typed_config(compose("train", words))


def described(names: Sequence[str], words: list[str], seeds: Sequence[int] | None) -> list[Experiment]:
    """Return the runs of experiments under overrides, made or not, with each of `seeds`, inside a Hydra entry."""
    found = []
    for name in names:
        configs = configs_of(name, words, seeds)
        runs = [Run.of(cell) for cell in configs]
        baselines = [Run.of(baseline_of(cell)) for cell in configs if cell.quantized]
        found.append(Experiment(name, runs, baselines, configs[0].benchmark, command(name, words, seeds)))
    return found
