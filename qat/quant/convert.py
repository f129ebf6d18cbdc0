"""Choose the linears to quantize by scope patterns and blocks, swap them, and report what that covers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from qat.config import ROLES, Config
from qat.errors import ConfigError, nearest
from qat.quant.linear import QuantizedLinear, Quantizer
from qat.quant.matmul import Matmul
from qat.quant.scaling import ScaleBank

# `model.layers.3.mlp.gate_proj` -> block 3, kind `mlp.gate_proj`. Model families call blocks `layers`, `h` or `blocks`.
_BLOCK = re.compile(r"^(?:.*\.)?(?:layers|h|blocks)\.(\d+)\.(.+)$")
# Linears of a block that read the same tensor: it has one scale and is rounded once.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass
class Coverage:
    """The linears that a conversion quantizes, and their share of the model.

    FLOPs count products with weights, 2 a weight and token, and not attention scores. So a share of the FLOPs is a
    share of `matmul_parameters`.
    """

    linears: dict[str, int]  # name of each quantized linear -> its parameters
    parameters: int
    all_parameters: int
    matmul_parameters: int

    def kinds(self) -> dict[str, tuple[int, int]]:
        """Return {`mlp.gate_proj`: (linears, parameters)} of what is quantized."""
        kinds: dict[str, tuple[int, int]] = {}
        for name, size in self.linears.items():
            kind = _BLOCK.match(name)[2]
            count, total = kinds.get(kind, (0, 0))
            kinds[kind] = count + 1, total + size
        return kinds

    def __str__(self) -> str:
        if not self.linears:
            return "  quantized: nothing"
        blocks = sorted({int(_BLOCK.match(name)[1]) for name in self.linears})
        left_out = ", ".join(str(block) for block in range(blocks[0], blocks[-1]) if block not in blocks)
        named = f"quantized, blocks {blocks[0]}..{blocks[-1]}" + (f" but {left_out}" if left_out else "")
        lines = [f"  {named:<27} linears  parameters  of all  of the FLOPs"]
        rows = [*self.kinds().items(), ("together", (len(self.linears), self.parameters))]
        for kind, (count, size) in rows:
            shares = f"{size / self.all_parameters:>6.1%}  {size / self.matmul_parameters:>12.1%}"
            lines.append(f"  {kind:<28}{count:>7}  {size / 1e6:>8.1f} M  {shares}")
        return "\n".join(lines)


def convert(model: nn.Module, cfg: Config) -> tuple[ScaleBank | None, Coverage]:
    """Swap the linears that `cfg.quant` names for quantized ones, in place.

    Returns the bank of their scales (None with quant=bf16, which swaps nothing) and the coverage. Errors:
    ConfigError when a scope pattern matches no linear, no block is left to quantize, or quant.gemm=fp8 cannot run.
    """
    linears = select(model, cfg) if cfg.quantized else {}
    if cfg.quant.gemm == "fp8":
        _check_fp8(linears)
    bank = _swap(model, linears, cfg) if linears else None
    # By identity: the head may share its weight.
    weights = {id(m.weight): m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear)}
    return bank, Coverage(
        linears={name: linear.weight.numel() for name, linear in linears.items()},
        parameters=sum(linear.weight.numel() for linear in linears.values()),
        all_parameters=sum(p.numel() for p in model.parameters()),
        matmul_parameters=sum(weights.values()),
    )


def _check_fp8(linears: dict[str, nn.Linear]) -> None:
    """Raise `ConfigError` where FP8 products cannot run: on an older GPU, or with sizes that they do not take."""
    for name, linear in linears.items():
        device = linear.weight.device
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ConfigError(
                f"quant.gemm=fp8: {torch.cuda.get_device_name(device)} has no FP8 tensor cores (compute capability 8.9 "
                f"and above have); set quant.gemm=bf16"
            )
        if linear.in_features % 16 or linear.out_features % 16:
            raise ConfigError(
                f"quant.gemm=fp8: {name} is {linear.in_features} -> {linear.out_features}, and FP8 products take "
                f"multiples of 16; set quant.gemm=bf16"
            )


def select(model: nn.Module, cfg: Config) -> dict[str, nn.Linear]:
    """Return {name: linear} of what to quantize: in a block of the chosen range, of a kind that the scope names."""
    candidates = {}  # name -> (block, kind, linear)
    for name, module in model.named_modules():
        match = _BLOCK.match(name)
        if match and isinstance(module, nn.Linear):
            candidates[name] = int(match[1]), match[2], module
    kinds = sorted({kind for _, kind, _ in candidates.values()})
    if not kinds:
        raise ConfigError(
            f"model.name={cfg.model.name}: has no linears in blocks named layers, h or blocks; give another model"
        )
    for pattern in cfg.quant.scope:
        if not any(fnmatchcase(kind, pattern) for kind in kinds):
            raise ConfigError(
                f"quant.scope={pattern}: matches no linear of {cfg.model.name}; {nearest(pattern, kinds)}"
            )
    blocks = 1 + max(block for block, _, _ in candidates.values())
    in_bf16 = cfg.quant.bf16_blocks
    first, end = -(-in_bf16 // 2), blocks - in_bf16 // 2
    if first >= end:
        raise ConfigError(
            f"quant.bf16_blocks={in_bf16}: {cfg.model.name} has {blocks} blocks; the largest valid value is "
            f"{blocks - 1}"
        )
    also = set(cfg.quant.bf16_also)
    quantized = set(range(first, end)) - also
    if len(also | quantized) > end - first or not quantized:
        raise ConfigError(
            f"quant.bf16_also={sorted(also)}: must name some of the blocks {first} to {end - 1}, which "
            f"quant.bf16_blocks={in_bf16} quantizes, and not all of them"
        )
    return {
        name: linear
        for name, (block, kind, linear) in candidates.items()
        if block in quantized and any(fnmatchcase(kind, pattern) for pattern in cfg.quant.scope)
    }


def _swap(model: nn.Module, linears: dict[str, nn.Linear], cfg: Config) -> ScaleBank:
    """Put quantized linears in the place of `linears`; returns the bank of their scales, an entry a tensor."""
    q, owner = cfg.quant, {name: _owner_of_input(name, linears) for name in linears}
    tensors = [
        (name, role)
        for name in linears
        for role in ROLES
        if getattr(q, f"{role}s") and (role != "activation" or owner[name] == name)
    ]
    names, targets = ["/".join(tensor) for tensor in tensors], [getattr(q, f"target_{role}") for _, role in tensors]
    bank = ScaleBank(names, targets, cfg.scaling, cfg.settle_steps, next(model.parameters()).device)
    index, matmul = {tensor: i for i, tensor in enumerate(tensors)}, Matmul(q)
    for name, linear in linears.items():
        quantizers = {role: Quantizer(bank, index.get((name, role)), role, q) for role in ROLES}
        model.set_submodule(name, QuantizedLinear(linear, bank, quantizers, matmul))
    for name in linears:
        if owner[name] != name:
            model.get_submodule(name).share_input(model.get_submodule(owner[name]))
    return bank


def _owner_of_input(name: str, linears: dict[str, nn.Linear]) -> str:
    """Return the first quantized linear that reads the same tensor as linear `name`, which may be itself."""
    parent, _, child = name.rpartition(".")
    siblings = next((group for group in _SAME_INPUT if child in group), (child,))
    return next(f"{parent}.{sibling}" for sibling in siblings if f"{parent}.{sibling}" in linears)


def same_inputs(linears: dict[str, nn.Linear]) -> list[tuple[str, ...]]:
    """Return the names of the linears by the tensor that they read, a tuple a tensor."""
    groups: dict[str, tuple[str, ...]] = {}
    for name in linears:
        owner = _owner_of_input(name, linears)
        groups[owner] = (*groups.get(owner, ()), name)
    return list(groups.values())


def quantized_linears(model: nn.Module) -> dict[str, QuantizedLinear]:
    """Return the quantized linears of a converted model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
