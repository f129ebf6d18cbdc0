"""What a run and its baseline will take, before anything is paid for: no GPU, network or weights are needed.

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

__all__ = ["Plan", "Training", "make"]


@dataclass(frozen=True)
class Training:
    """One run. memory: bytes a rank by use, rates: of one rank (both None where the model's sizes are unknown)."""

    id: str
    done: int  # steps, in the run folder of this machine
    quantized: bool
    memory: dict[str, float] | None
    rates: list[costs.Rate] | None

    def hours(self, tokens: float, ranks: int) -> tuple[float, float] | None:
        """From fastest to slowest, if ranks did not hinder each other."""
        rate = self.rates and self.rates[0]
        return (tokens / rate.high / ranks / 3600, tokens / rate.low / ranks / 3600) if rate else None


@dataclass(frozen=True)
class Plan:
    """Everything that a page says, in bytes, tokens and seconds' rates. shape, coverage: None for a model whose
    config.json cannot be read; unknown then says why."""

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
        """Models that evaluation scores: the checkpoint, the baseline with and without PTQ, the run in both modes."""
        return 5 if self.cfg.quantized else 2

    @property
    def passes(self) -> int:
        """Passes over the held-out texts: one a model, one more of the run under PTQ's scales, and for the KL
        divergence of each of the three in a quantized run's format, or trained in it, one of the baseline."""
        return self.scored + (4 if self.cfg.quantized else 0)


def make(cfg: Config, ranks: int, machine: Machine, on_gpus: bool) -> Plan:
    """Return the plan of `cfg` and its baseline on `ranks` processes. on_gpus: one GPU each, else this machine's
    processor.
    Errors: ConfigError for what could not be trained either."""
    source, unknown, architecture, shape, coverage = "", None, None, None, None
    try:
        architecture, source = _architecture(cfg, machine)
    except UserError as error:
        unknown = str(error)
    if architecture is not None:
        shape, coverage = flops.model_shape(architecture, cfg)
    each = [baseline_of(cfg), cfg] if cfg.quantized else [cfg]
    trainings = [_training(one, architecture, ranks, machine, on_gpus) for one in each]
    return Plan(cfg, ranks, machine, on_gpus, shape, coverage, source, unknown, trainings)


def _training(cfg: Config, architecture, ranks: int, machine: Machine, on_gpus: bool) -> Training:
    run = Run.of(cfg)
    known = None, None
    if architecture is not None:
        shape, coverage = flops.model_shape(architecture, cfg)
        kind = costs.scope(coverage.kinds()) if cfg.quantized else None
        known = memory.training(shape, coverage, cfg, ranks, on_gpus), costs.rates(cfg, shape, kind, machine, on_gpus)
    return Training(run.id, run.status().get("step", 0), cfg.quantized, *known)


def _architecture(cfg: Config, machine: Machine):
    """Return (a model's sizes, where they are from). Without a hub: its cached files, else a shape of conf/model."""
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
