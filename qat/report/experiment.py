"""Arrange the runs of an experiment for the report: pairs of run and baseline, recipes over seeds, telemetry."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import yaml
from omegaconf import OmegaConf

from qat.analysis.compare import TASKS, aggregate, flat, match, mismatches, pretrained_run, train_command
from qat.analysis.results import Match
from qat.config import COMMAND_GROUPS, COMMAND_KEYS, BenchmarkConfig, Config
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import identity

PAPER = Path(__file__).resolve().parents[2] / "experiments" / "paper.yaml"
SHARES = ("tier3", "tier2", "tier1", "tier0", "underflow")  # of the nonzero elements; they add up to 1
_LABELS = {  # how a label puts a setting; the usual ones, and in this order before all others
    "scaling.algo": str,
    "scaling.window": "window {}".format,
    "optim.lr": lambda lr: f"lr {scientific(lr)}",
    "seed": "seed {}".format,
}
# What is about commands and folders, not about a run.
_OF_COMMANDS = {*COMMAND_GROUPS, *COMMAND_KEYS, "experiment", "runs_dir", "retrain"}


def published() -> dict:
    """Return the paper's results and where its text and code disagree (experiments/paper.yaml)."""
    return yaml.safe_load(PAPER.read_text(encoding="utf-8"))


@dataclass
class Experiment:
    """Runs of one experiment, which are compared on the way.

    benchmark: on which; None: each on the one of its own configuration. command: what makes those that are missing.
    """

    name: str
    runs: list[Run]
    baselines: list[Run]
    benchmark: BenchmarkConfig | None = None
    command: str = ""

    @cached_property
    def existing(self) -> dict[str, Run]:
        """Return its runs and baselines whose folder exists, by id."""
        return {run.id: run for run in (*self.runs, *self.baselines) if run.config()}

    @cached_property
    def typed(self) -> dict[str, Config]:
        """Return the configurations of `existing`, by id."""
        configs = {name: run.typed_config() for name, run in self.existing.items()}
        for config in configs.values():
            config.benchmark = self.benchmark or config.benchmark
        return configs

    @cached_property
    def configs(self) -> dict[str, dict]:
        """Return the same as plain dictionaries."""
        return {name: OmegaConf.to_container(OmegaConf.structured(config)) for name, config in self.typed.items()}

    @cached_property
    def absent(self) -> list[str]:
        """Return the ids of its runs whose folder does not exist yet."""
        return list(dict.fromkeys(run.id for run in (*self.runs, *self.baselines) if run.id not in self.configs))

    @cached_property
    def bf16(self) -> list[Run]:
        """Return its unquantized runs, wherever they are listed, without repetition."""
        return [run for run in self.existing.values() if not self._quantized(run)]

    @cached_property
    def pairs(self) -> list[Pair]:
        """Return its quantized runs with their baselines."""
        return [pair for recipe in self.recipes for pair in recipe.pairs]

    @cached_property
    def recipes(self) -> list[Recipe]:
        """Return its quantized runs, grouped by everything but their seed."""
        own = defaultdict(list)
        for run in (run for run in self.runs if self._quantized(run)):
            parts = identity(self.typed[run.id]) | {"seed": None}
            own[json.dumps(parts, sort_keys=True)].append(run)
        names = told_apart({key: self.configs[runs[0].id] | {"seed": None} for key, runs in own.items()})
        seeds = {run.id: self.configs[run.id]["seed"] for runs in own.values() for run in runs}
        recipes = []
        for key, runs in own.items():
            name = f"{self.name} {names[key]}".strip()
            labels = told_apart({run.id: {"seed": seeds[run.id]} for run in runs})
            if len(set(seeds.values())) > 1 and len(runs) == 1:
                labels = {runs[0].id: f"seed {seeds[runs[0].id]}"}
            recipes.append(Recipe(key, name, [self._pair(run, f"{name} {labels[run.id]}".strip()) for run in runs]))
        return recipes

    def _quantized(self, run: Run) -> bool | None:
        """Return whether a run is quantized; None where it does not exist yet."""
        return self.configs[run.id]["quant"]["format"] != "none" if run.id in self.configs else None

    def _pair(self, run: Run, label: str) -> Pair:
        """Return a run with the baseline that fits and their comparison, or why there is none."""
        config, pair = self.typed[run.id], Pair(label, run, self.configs[run.id])
        if not self.bf16:
            pair.missing = f"{run.id} has no BF16 baseline yet; make it: {train_command(run)}"
            return pair
        pair.baseline = next((b for b in self.bf16 if not mismatches(config, self.typed[b.id])), None)
        try:
            pair.match = match(run, pair.baseline or self.bf16[0], config.benchmark.name, pretrained_run(run))
            pair.comparison = aggregate([pair.match])
        except UserError as reason:
            pair.missing = str(reason)
        return pair


@dataclass
class Pair:
    """A quantized run and its baseline. `missing` says what stands in the way of a comparison."""

    label: str
    run: Run
    config: dict
    baseline: Run | None = None
    match: Match | None = None
    comparison: dict | None = None
    missing: str | None = None

    @cached_property
    def curve(self) -> Curve:
        return Curve.of(self.run)

    @cached_property
    def telemetry(self) -> Telemetry:
        return Telemetry(self.run.telemetry())


@dataclass
class Recipe:
    """Pairs that differ in nothing but their seed. identity: the same for two experiments that come to one recipe."""

    identity: str
    name: str
    pairs: list[Pair]

    def __post_init__(self):
        """Compare over its seeds; `missing` says what stands in the way of that."""
        self.comparison, self.missing = None, None
        if len({pair.config["seed"] for pair in self.compared}) < len(self.compared):
            ids = ", ".join(pair.run.id for pair in self.compared)
            self.missing = f"{self.name} has a seed twice ({ids}), so there is no mean over seeds; leave one out"
        elif len(self.compared) == 1:
            self.comparison = self.compared[0].comparison
        elif self.compared:
            try:
                self.comparison = aggregate([pair.match for pair in self.compared])
            except UserError as reason:
                self.missing = str(reason)

    @property
    def compared(self) -> list[Pair]:
        return [pair for pair in self.pairs if pair.comparison]

    @property
    def label(self) -> str:
        """Return its name, with the seed where only one of several is compared."""
        return self.compared[0].label if len(self.compared) == 1 else self.name


def distinct(experiments: Sequence[Experiment]) -> dict[str, Recipe]:
    """Return the recipes of experiments by label, those that several share once, under all their labels."""
    labels, recipes = defaultdict(list), {}
    for recipe in (recipe for e in experiments for recipe in e.recipes):
        labels[recipe.identity].append(recipe.label)
        recipes.setdefault(recipe.identity, recipe)
    return {"/".join(labels[key]): recipe for key, recipe in recipes.items()}


def labels(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return {run id: label}; a run that several experiments share is under all their names."""
    names = {}
    for pair in (pair for e in experiments for pair in e.pairs):
        names[pair.run.id] = f"{names[pair.run.id]}/{pair.label}" if pair.run.id in names else pair.label
    plain = told_apart({run.id: e.configs[run.id] for e in experiments for run in e.bf16})
    return names | {name: f"BF16 {label}".strip() for name, label in plain.items()}


@dataclass
class Curve:
    """Training loss of one run, in nats a token, and the step at which quantization starts (None: never)."""

    steps: np.ndarray
    loss: np.ndarray
    start: int | None

    @classmethod
    def of(cls, run: Run) -> Curve:
        rows = run.metrics()
        start = next((row["step"] for row in rows if row["quantized"]), None)
        return cls(np.array([r["step"] for r in rows], int), np.array([r["loss"] for r in rows], float), start)

    def relative_to(self, other: Curve) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps both have, difference in percent of the other's loss)."""
        steps, own, others = np.intersect1d(self.steps, other.steps, return_indices=True)
        return steps, 100 * (self.loss[own] / other.loss[others] - 1)


class Telemetry:
    """Rows of `telemetry.jsonl`, arranged for drawing."""

    def __init__(self, rows: list[dict]):
        self.updates = [(row["step"], row["updated"]) for row in rows if "updated" in row]
        self.texts = defaultdict(list)  # held-out text -> rows
        self.tensors = defaultdict(list)  # role -> rows
        for row in rows:
            if "role" in row:
                self.tensors[row["role"]].append(row)
            elif "text" in row:
                self.texts[row["text"]].append(row)

    def overshoot(self, role: str) -> tuple[np.ndarray, list[str], np.ndarray]:
        """Return (steps, blocks, the largest overshoot of a block's linears at a step; NaN where none was recorded)."""
        rows = [row for row in self.tensors[role] if row["overshoot"] is not None]
        steps, blocks = sorted({row["step"] for row in rows}), sorted({_block(row["layer"]) for row in rows})
        column, line = {s: i for i, s in enumerate(steps)}, {b: i for i, b in enumerate(blocks)}
        grid = np.full((len(blocks), len(steps)), np.nan)
        for row in rows:
            at = line[_block(row["layer"])], column[row["step"]]
            grid[at] = np.fmax(grid[at], row["overshoot"])
        return np.array(steps, int), [name for _, name in blocks], grid

    def worst_layer(self) -> str | None:
        """Return the layer with the largest overshoot, over its roles and all logged steps; None without any."""
        rows = [row for rows in self.tensors.values() for row in rows if row["overshoot"]]
        return max(rows, key=lambda row: row["overshoot"])["layer"] if rows else None

    def amax_history(self, role: str, layer: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (steps, amaxes, predicted amaxes) of a layer's tensor; NaN where one is not finite."""
        rows = [row for row in self.tensors.get(role, ()) if row["layer"] == layer and row["overshoot"]]
        amax, overshoot = (np.array([row[key] for row in rows], float) for key in ("amax", "overshoot"))
        # By the overshoot: in some records, `scale` is what the step left behind for the next one.
        amax[~np.isfinite(amax)] = np.nan
        return np.array([row["step"] for row in rows], int), amax, amax / overshoot

    def shares(self, role: str) -> tuple[list[str], dict[str, np.ndarray]]:
        """Return (blocks, {share: its means over the linears of a block and the logged steps})."""
        rows = defaultdict(list)
        for row in self.tensors[role]:
            rows[_block(row["layer"])].append(row)
        means = {
            key: np.array([np.mean([row[key] for row in rows[block]]) for block in sorted(rows)]) for key in SHARES
        }
        return [name for _, name in sorted(rows)], means

    def drift(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return (steps, change of the loss on a held-out text since the first, nats a token, NaN without one)."""
        rows = self.texts[text]
        loss = np.array([row["loss"] for row in rows], float)
        return np.array([row["step"] for row in rows], int), loss - loss[:1]

    def means(self, role: str) -> dict[str, float]:
        """Return means over the tensors of a role and the logged steps: the `SHARES`, and `sqnr_db` in dB."""
        rows = self.tensors[role]
        means = {key: float(np.mean([row[key] for row in rows])) for key in SHARES}
        decibel = [row["sqnr_db"] for row in rows if row["sqnr_db"] is not None]
        return means | {"sqnr_db": float(np.mean(decibel)) if decibel else float("nan")}


def unlike(configs: Mapping[str, Mapping]) -> dict[str, dict]:
    """Return the dotted settings in which configs differ: {key: {name: value}}; null where a config has none."""
    settings = {name: flat(config) for name, config in configs.items()}
    keys = dict.fromkeys(key for own in settings.values() for key in own if key.split(".")[0] not in _OF_COMMANDS)
    rows = {key: {name: own.get(key) for name, own in settings.items()} for key in keys}
    return {key: row for key, row in rows.items() if len({str(value) for value in row.values()}) > 1}


def told_apart(configs: Mapping[str, Mapping]) -> dict[str, str]:
    """Return what tells configs apart: the first settings that suffice, the usual ones first, or else their names."""
    labels, rows = dict.fromkeys(configs, ""), unlike(configs)
    for key in [*(key for key in _LABELS if key in rows), *(key for key in rows if key not in _LABELS)]:
        if len(set(labels.values())) == len(labels):
            break
        say = _LABELS.get(key, f"{key.rpartition('.')[2]} {{}}".format)
        labels = {name: f"{label} {say(rows[key][name])}".strip() for name, label in labels.items()}
    return labels if len(set(labels.values())) == len(labels) else {name: name for name in configs}


def tasks_of(records) -> list[str]:
    """Return every task named in `records`, the four of the paper first."""
    named = dict.fromkeys(task for record in records for task in record)
    return [*(task for task in TASKS if task in named), *(task for task in named if task not in TASKS)]


def scientific(number: float) -> str:
    """Return a learning rate as it is written: 1e-4."""
    mantissa, exponent = f"{number:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _block(layer: str) -> tuple[int, str]:
    """Return number and name of the transformer block of a layer; a layer outside the blocks stands for itself."""
    number = re.search(r"\.(\d+)\.", layer)
    return (int(number[1]), number[1]) if number else (-1, layer)
