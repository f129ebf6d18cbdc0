"""The training and evaluation steps to measure: BF16, ours in several settings, and two comparators.

They all train the same parameters with one optimizer, so that memory holds only one copy of each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib.util import find_spec

import torch
from torch import nn

from qat.config import Config, QuantConfig, ScalingConfig
from qat.errors import ConfigError, nearest
from qat.models.load import load_model
from qat.models.loss import token_losses
from qat.quant.convert import convert
from qat.runs.identity import baseline_of
from qat.tools.bench.plain import PlainQuantizedLinear
from qat.train.step import Trainer
from qat.utils import device

MLP, ALL = ["mlp.*"], ["mlp.*", "self_attn.*"]
OURS = ("mlp", "all", "all, current scaling", "all, fp8 products")


def settings(cfg: Config) -> dict[str, Config]:
    """Return {name: configuration} of what is measured: all three roles quantized, by the max window if not named."""

    def quantized(scope: list[str], bf16_blocks: int, algo: str = "max", **quant) -> Config:
        other = copy.deepcopy(cfg)
        other.quant = QuantConfig(format="hif8", scope=scope, bf16_blocks=bf16_blocks, **quant)
        other.scaling = ScalingConfig(algo=algo, window=64)
        return other

    configs = {
        "bf16": baseline_of(cfg),
        "mlp": quantized(MLP, 5),
        "all": quantized(ALL, 0),
        "all, current scaling": quantized(ALL, 0, algo="current"),
    }
    if device.get_device().type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        configs["all, fp8 products"] = quantized(ALL, 0, gemm="fp8")
    return {name: config for name, config in configs.items() if name == "bf16" or _wanted(cfg, name)}


def check(cfg: Config) -> None:
    """Raise `ConfigError` for a name in bench.steps that is unknown, that cannot run here, or that no part of the
    benchmark measures."""
    measured = {"memory": OURS, "steps": (*OURS, *COMPARATORS)}
    for name in cfg.bench.steps or []:
        if name not in measured["steps"]:
            raise ConfigError(f"bench.steps={name}: unknown step; {nearest(name, measured['steps'])}")
        if not any(name in measured.get(part, ()) for part in cfg.bench.parts):
            raise ConfigError(
                f"bench.steps={name}: bench.parts={cfg.bench.parts} do not measure it; add the part steps"
            )
        absent = "torchao" in name and not find_spec("torchao")
        if absent or name not in (*settings(cfg), *COMPARATORS):
            raise ConfigError(f"bench.steps={name}: cannot run here (FP8 needs a GPU from 8.9 on, torchao its package)")


def _wanted(cfg: Config, name: str) -> bool:
    return cfg.bench.steps is None or name in cfg.bench.steps


def tokens(cfg: Config, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Return a random micro-batch, int64 [sequences, length + 1]."""
    shape = cfg.batch[0], cfg.budget.seq_len + 1
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def copy_sharing_params(model: nn.Module) -> nn.Module:
    """Return a copy of a model that shares its parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Steps:
    """The steps of `settings`, and of the comparators that can run here, by name."""

    def __init__(self, cfg: Config, model: nn.Module):
        self.cfg, self.batch = cfg, tokens(cfg, model.config.vocab_size)
        self.trainers, self.coverage = {}, {}
        for name, config in settings(cfg).items():
            self._add(name, copy_sharing_params(model), config)
        for name, make in COMPARATORS.items():
            other = make(copy_sharing_params(model)) if _wanted(cfg, name) else None
            if other is not None:
                eager = baseline_of(cfg)
                eager.budget.compile = False  # they read tensors on the host, which breaks graphs
                self._add(name, other, eager)

    def _add(self, name: str, model: nn.Module, cfg: Config) -> None:
        cfg.optim.lr = 1e-12  # thousands of steps on random tokens must not change the weights
        bank, coverage = convert(model, cfg)
        trainer = Trainer(model, bank, cfg)
        first = next(iter(self.trainers.values()), trainer)
        trainer.optimizer = first.optimizer
        self.trainers[name], self.coverage[name] = trainer, coverage

    def works(self) -> dict[str, Callable[[], object]]:
        """Return {name: function that runs a training step}."""
        return {name: lambda trainer=trainer: self._step(trainer) for name, trainer in self.trainers.items()}

    def _step(self, trainer: Trainer) -> None:
        trainer.step(2 if trainer.bank is not None and not trainer.bank.unseen else 1, [self.batch])

    def evaluations(self) -> dict[str, Callable[[], object]]:
        """Return {"bf16", "all": a forward pass as evaluation does it}, scales frozen and weights rounded before."""
        self.trainers["all"].bank.freeze()
        self.trainers["all"].round_weights()
        return {name: lambda name=name: self._evaluate(self.trainers[name]) for name in ("bf16", "all")}

    @torch.inference_mode()
    def _evaluate(self, trainer: Trainer) -> torch.Tensor:
        with device.autocast(trainer.arithmetic):
            return token_losses(trainer.model, device.to_device(self.batch)).mean()


def one_model_alone(cfg: Config) -> None:
    """Run three steps of one configuration, to measure their peak memory."""
    model, _ = load_model(cfg.model, cfg.seed)
    bank, _ = convert(model, cfg)
    trainer = Trainer(model, bank, cfg)
    batch = tokens(cfg, model.config.vocab_size)
    for number in (1, 2, 3):
        if number == 3 and torch.cuda.is_available():  # the first step runs eagerly, the second compiles
            torch.cuda.reset_peak_memory_stats()
        trainer.step(number, [batch])


def _swap(model: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace all linears of all blocks."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, f"*.layers.*.{pattern}") for pattern in ALL):
            model.set_submodule(name, make(module))


def _plain(model: nn.Module) -> nn.Module:
    """Return the model with linears of `PlainQuantizedLinear`."""
    _swap(model, PlainQuantizedLinear)
    return model


def _torchao(model: nn.Module) -> nn.Module | None:
    """Return the model with torchao's FP8 fake quantization, of weights and activations only; None without torchao."""
    try:
        from torchao.quantization import PerTensor
        from torchao.quantization.qat import FakeQuantizedLinear, Float8FakeQuantizeConfig
    except ImportError:
        return None
    config = Float8FakeQuantizeConfig(dtype=torch.float8_e4m3fn, granularity=PerTensor())
    _swap(model, lambda linear: FakeQuantizedLinear.from_linear(linear, config, config))
    return model


# name -> function that quantizes all linears of a model in place by other means; it returns None where these miss.
COMPARATORS = {"all, plain PyTorch": _plain, "all, torchao FP8 QAT": _torchao}
