"""Training and evaluation steps to be measured: BF16, ours in several settings, and two comparators.

All of them train the same parameters with one optimizer, so that only one copy of either is needed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import nn

from qat import models, runtime
from qat.bench.plain import PlainQuantizedLinear
from qat.config import Config, QuantConfig, ScalingConfig
from qat.convert import convert
from qat.loss import token_losses
from qat.runs import baseline_of
from qat.scaling import Phase
from qat.step import Trainer

MLP, ALL = ["mlp.*"], ["mlp.*", "self_attn.*"]


def settings(cfg: Config) -> dict[str, Config]:
    """{name: configuration} of what is measured: max-window delayed scaling, all three roles quantized."""

    def quantized(scope: list[str], keep: int, **quant) -> Config:
        other = copy.deepcopy(cfg)
        other.quant = QuantConfig(format="hif8", scope=scope, bf16_blocks=keep, **quant)
        other.scaling = ScalingConfig(algo="max", window=64)
        return other

    found = {"bf16": baseline_of(cfg), "mlp": quantized(MLP, 5), "all": quantized(ALL, 0)}
    found["all, current scaling"] = quantized(ALL, 0)
    found["all, current scaling"].scaling = ScalingConfig(algo="current")
    if runtime.device().type == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        found["all, fp8 products"] = quantized(ALL, 0, gemm="fp8")
    return found


def tokens(cfg: Config, vocabulary: int, seed: int = 0) -> torch.Tensor:
    """Random int64 [sequences, length + 1] of one micro-batch."""
    shape = cfg.batch[0], cfg.budget.seq_len + 1
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model that shares its parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


class Steps:
    """Callables that train one step, by name: those of `settings`, and the comparators that can run here."""

    def __init__(self, cfg: Config, model: nn.Module):
        self.cfg, self.batch = cfg, tokens(cfg, model.config.vocab_size)
        self.trainers, self.coverage, self.banks = {}, {}, {}
        for name, each in settings(cfg).items():
            self._add(name, twin(model), each)
        plain = twin(model)
        _swap(plain, lambda name, linear: PlainQuantizedLinear(linear))
        self._add("all, plain PyTorch", plain, baseline_of(cfg))
        with_torchao = _torchao(twin(model))
        if with_torchao is not None:
            self._add("all, torchao FP8 QAT", with_torchao, baseline_of(cfg))
        self.count = 0

    def _add(self, name: str, model: nn.Module, cfg: Config) -> None:
        bank, coverage = convert(model, cfg)
        trainer = Trainer(model, bank, cfg)
        first = next(iter(self.trainers.values()), trainer)
        trainer.optimizer = first.optimizer
        self.trainers[name], self.banks[name], self.coverage[name] = trainer, bank, coverage

    def works(self) -> dict[str, Callable[[], object]]:
        return {name: lambda trainer=trainer: self._step(trainer) for name, trainer in self.trainers.items()}

    def _step(self, trainer: Trainer) -> None:
        # A learning rate far below any that trains: thousands of steps on random tokens must not wreck the weights.
        trainer.cfg.optim.lr = 1e-12
        trainer.step(2 if trainer.bank is not None and trainer.bank.primed else 1, [self.batch])

    def evaluations(self) -> dict[str, Callable[[], object]]:
        """{"bf16", "all": a forward pass as evaluation does it}, with frozen scales and rounded weights."""
        return {name: lambda name=name: self._evaluate(self.trainers[name]) for name in ("bf16", "all")}

    @torch.inference_mode()
    def _evaluate(self, trainer: Trainer) -> torch.Tensor:
        if trainer.bank is not None:
            trainer.bank.phase = Phase.FROZEN
        with runtime.autocast(trainer.arithmetic):
            return token_losses(trainer.model, runtime.to_device(self.batch)).mean()


def one_model_alone(cfg: Config) -> None:
    """Three steps of one configuration, whose peak memory is of interest."""
    model, _ = models.load(cfg.model, cfg.seed)
    bank, _ = convert(model, cfg)
    trainer = Trainer(model, bank, cfg)
    batch = tokens(cfg, model.config.vocab_size)
    for number in (1, 2, 3):
        trainer.step(number, [batch])


def _swap(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module]) -> None:
    """Replace all linears of all blocks."""
    linears = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(fnmatchcase(name, f"*.layers.*.{pattern}") for pattern in ALL)
    ]
    for name, linear in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(name, linear))


def _torchao(model: nn.Module) -> nn.Module | None:
    """The model with torchao's FP8 fake quantization of weights and activations alone; None without torchao."""
    try:
        from torchao.quantization import PerTensor
        from torchao.quantization.qat import FakeQuantizedLinear, Float8FakeQuantizeConfig
    except ImportError:
        return None
    config = Float8FakeQuantizeConfig(dtype=torch.float8_e4m3fn, granularity=PerTensor())
    _swap(model, lambda name, linear: FakeQuantizedLinear.from_linear(linear, config, config))
    return model
