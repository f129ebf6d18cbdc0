"""The experiments as jobs: what `experiment=expN` stands for, its own sweep expanded, with several seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hydra import compose
from hydra.core.override_parser.overrides_parser import OverridesParser

from qat.cli.entry import path_of, typed_config
from qat.config import COMMAND_GROUPS, COMMAND_KEYS
from qat.report.experiment import Experiment
from qat.runs.folder import Run
from qat.runs.identity import run_id
from qat.runs.job import Job

_OF_COMMANDS = {*COMMAND_GROUPS, *COMMAND_KEYS, "experiment"} - {"ptq"}  # which says how a run's PTQ is calibrated


def jobs_of(experiment: str, overrides: Sequence[str], seeds: Sequence[int] | None = None) -> list[Job]:
    """Return every run of an experiment under command-line overrides, inside a Hydra entry.

    seeds: in the place of the overrides' own. Cells of its sweep that the overrides make one run are there once.
    """
    overrides = _of_runs(overrides)
    if seeds:
        overrides = [override for override in overrides if not override.startswith("seed=")]
    base = compose("train", [f"experiment={experiment}", *overrides], return_hydra_config=True)
    sweep = base.hydra.sweeper.params or {}
    given = {override.partition("=")[0] for override in overrides}  # what the command line sets is not swept
    swept = OverridesParser.create().parse_overrides([f"{key}={sweep[key]}" for key in sweep if key not in given])
    axes = [
        [f"{axis.get_key_element()}={value}" for value in axis.sweep_string_iterator()]
        if axis.is_sweep_override()
        else [axis.input_line]
        for axis in swept
    ]
    axes += [[f"seed={seed}" for seed in seeds]] if seeds else []
    jobs = [variant(experiment, overrides, cell) for cell in itertools.product(*axes)]
    return list({run_id(job.cfg): job for job in jobs}.values())


def variant(experiment: str, overrides: Sequence[str], changes: Sequence[str]) -> Job:
    """Return an experiment under command-line overrides and then `changes`, without its own sweep, inside a Hydra
    entry."""
    overrides = [f"experiment={experiment}", *_of_runs(overrides), *changes]
    return Job(typed_config(compose("train", overrides)), overrides)


def command(experiment: str, overrides: Sequence[str], seeds: Sequence[int] | None = None) -> str:
    """Return what makes an experiment under command-line overrides, with each of `seeds`."""
    overrides = _of_runs(overrides)
    named = {"budget": ("BUDGET", "laptop"), "protocol": ("PROTOCOL", "paper"), "seed": ("SEEDS", "0")}
    pairs = [override.partition("=")[::2] for override in overrides]
    given = {key: value for key, value in pairs if key in named}
    given |= {"seed": ",".join(map(str, seeds))} if seeds else {}
    parts = [f"{named[key][0]}={value}" for key, value in given.items() if value != named[key][1]]
    rest = " ".join(override for override in overrides if override.partition("=")[0] not in named)
    return " ".join(["make", experiment, *parts, *([f'ARGS="{rest}"'] if rest else [])])


def _of_runs(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that are about the runs."""
    return [override for override in overrides if path_of(override)[0] not in _OF_COMMANDS]


def described(names: Sequence[str], overrides: Sequence[str], seeds: Sequence[int] | None) -> list[Experiment]:
    """Return the runs of experiments under overrides, made or not, with each of `seeds`, inside a Hydra entry."""
    experiments = []
    for name in names:
        jobs = jobs_of(name, overrides, seeds)
        runs = [Run.of(job.cfg) for job in jobs]
        baselines = [Run.of(job.baseline.cfg) for job in jobs if job.cfg.quantized]
        experiments.append(Experiment(name, runs, baselines, jobs[0].cfg.benchmark, command(name, overrides, seeds)))
    return experiments
