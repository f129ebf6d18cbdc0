"""Estimate what a run and its baseline will take. Needs no GPU, network or weights.

configuration -> sizes (meta device) -> memory, hours, disk, downloads -> one page
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from unittest import mock

from huggingface_hub import constants
from omegaconf import OmegaConf

from qat.config import Config
from qat.errors import UserError
from qat.models.load import load_config
from qat.quant.convert import Coverage
from qat.runs.folder import Run
from qat.runs.identity import baseline_of
from qat.tools import flops
from qat.tools.plan import costs, memory
from qat.tools.plan.machine import Machine
from qat.utils.environment import ROOT


@dataclass(frozen=True)
class Training:
    """One run. memory: bytes a rank by use, rates: of one rank (both None where the model's sizes are unknown)."""

    id: str
    done: int  # steps, in the run folder of this machine
    quantized: bool
    memory: dict[str, float] | None
    rates: list[costs.Rate] | None

    def hours(self, tokens: float, ranks: int) -> tuple[float, float]:
        """Return the hours for so many tokens, (least, most), if training scales with the ranks without loss."""
        rate = self.rates[0]
        return tokens / rate.high / ranks / 3600, tokens / rate.low / ranks / 3600


@dataclass(frozen=True)
class Plan:
    """A plan. shape, coverage: None for a model whose config.json cannot be read; unknown then says why."""

    cfg: Config
    ranks: int
    machine: Machine
    on_gpus: bool
    shape: flops.Shape | None
    coverage: Coverage | None
    source: str  # of the sizes
    unknown: str | None
    trainings: list[Training]  # the baseline first

    @property
    def scored(self) -> int:
        """Count the models that evaluation scores: the pretrained one, baseline, its PTQ and control, and the run in
        both modes."""
        return (5 if self.cfg.quantized else 2) + self.cfg.benchmark.control

    def lengthened(self, training: Training) -> float:
        """Return how many times as long steps take, on average, where `scaling.shadow` tries rules at some of them.

        A pass without quantization takes a step's time, that of a rule one and a half with its statistics (measured in
        turn, medians of four rounds: SmolLM2, 4 x 128 tokens, FP32, two cores).
        """
        shadow = len(self.cfg.scaling.shadow) if training.quantized else 0
        return 1 + (1.5 * shadow + 1) / self.cfg.budget.telemetry_every if shadow else 1.0

    @property
    def passes(self) -> int:
        """Count passes over the held-out texts: one a model, and for a quantized run that is asked questions one more
        under PTQ's scales (`qat.eval.evaluate`)."""
        return self.scored + bool(self.cfg.quantized and self.cfg.benchmark.tasks)


def make(cfg: Config, ranks: int, machine: Machine, on_gpus: bool) -> Plan:
    """Return the plan of `cfg` and its baseline on `ranks` processes.

    on_gpus: on a GPU each, else on this machine's processor. Errors: ConfigError for a run that could not be trained.
    """
    architecture, source, unknown = None, "", None
    try:
        architecture, source = _architecture(cfg, machine)
    except UserError as error:
        unknown = str(error)
    trainings, shape, coverage = [], None, None
    for one in [baseline_of(cfg), cfg] if cfg.quantized else [cfg]:
        run, parts, rates = Run.of(one), None, None
        if architecture is not None:
            shape, coverage = flops.model_shape(architecture, one)
            kind = costs.scope(coverage.kinds()) if one.quantized else None
            parts = memory.training(architecture, shape, one, ranks, on_gpus)
            rates = costs.rates(one, shape, kind, machine, on_gpus)
        trainings.append(Training(run.id, run.status().get("step", 0), one.quantized, parts, rates))
    return Plan(cfg, ranks, machine, on_gpus, shape, coverage, source, unknown, trainings)


def _architecture(cfg: Config, machine: Machine):
    """Return (a model's configuration, its origin): its config.json, or where that is out of reach, conf/model."""
    if cfg.model.source == "random":
        return load_config(cfg.model), "model.architecture"
    known = ROOT / "conf" / "model" / f"{cfg.model.name}_random.yaml"
    try:
        with mock.patch.object(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE or machine.hub is False):
            return load_config(cfg.model), "its config.json"
    except UserError:
        if not known.exists():
            raise
    shape = copy.deepcopy(cfg.model)
    shape.source, shape.architecture = "random", OmegaConf.to_container(OmegaConf.load(known).architecture)
    return load_config(shape), f"conf/model/{known.name}, its config.json being out of reach"
