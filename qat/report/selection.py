"""The runs of a report, by experiment: those that its words describe, or those that a user names."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from qat.analysis.compare import mismatches
from qat.config import BenchmarkConfig, Config
from qat.errors import ConfigError
from qat.report.experiment import Experiment
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, run_id

OF_NONE = "custom"  # runs of no experiment


def selected(folders: Sequence[str], benchmark: BenchmarkConfig | None = None) -> list[Experiment]:
    """Return the runs in `folders`, of any experiments or none, the quantized ones with their BF16 baselines.

    benchmark: as of `Experiment`. Errors: ConfigError for none, for what is no run folder, and for two of one name.
    """
    runs = run_folders(folders)
    configs = {run.id: run.typed_config() for run in runs}
    plain = {run: configs[run.id] for run in runs if not configs[run.id].quantized}
    groups = defaultdict(list)
    for run in runs:
        groups[configs[run.id].experiment or OF_NONE].append(run)
    experiments = []
    for name, members in groups.items():
        quantized = [run for run in members if configs[run.id].quantized]
        baselines = [baseline for run in quantized for baseline in _baselines(run, configs[run.id], plain)]
        experiments.append(Experiment(name, members, baselines, benchmark))
    return experiments


def run_folders(folders: Sequence[str]) -> list[Run]:
    """Return the run folders, each once. Errors: as of `selected`."""
    runs = {}
    for path in dict.fromkeys(Path(os.path.abspath(folder)) for folder in folders):
        if not (path / "config.yaml").is_file():
            raise ConfigError(f"runs: {path} is not a run folder (no config.yaml); see `ls {path.parent}`")
        if path.name in runs:
            raise ConfigError(f"runs: {runs[path.name].path} and {path} have one name; list one of them, or rename one")
        runs[path.name] = Run(path)
    if not runs:
        raise ConfigError("runs=[]: name at least one run folder, as in runs=[runs/a,runs/b]")
    return list(runs.values())


def _baselines(run: Run, config: Config, listed: dict[Run, Config]) -> list[Run]:
    """Return the listed BF16 runs that match `run`, else the one in the folder beside it, else all, which says what is
    wrong with them."""
    beside = Run(run.path.parent / run_id(baseline_of(config)))
    matching = [baseline for baseline, other in listed.items() if not mismatches(config, other)]
    return matching or ([beside] if beside.config() else list(listed))
