"""The arithmetic in which a model is scored: that of its training, or that of an export.

In training, products are BF16 under autocast and the residual stream is FP32; an exported model is BF16 throughout and
rounds once more at every block. Parameters hold what BF16 can hold either way, as an export does.
"""

from __future__ import annotations

import contextlib

import torch
import torch.nn.functional as F
from torch import nn

from qat.config import Config
from qat.utils import device


def name(cfg: Config) -> str:
    """Return what a model is scored in, as eval.json names it; one that was trained in pure BF16 as an export.

    training: BF16 products, FP32 residual stream and logits; export: BF16 throughout; fp32: what both come to where
    `budget.arithmetic` is FP32.
    """
    if device.resolve_arithmetic(cfg.budget.arithmetic) == "fp32":
        return "fp32"
    return "export" if cfg.optim.pure_bf16 else cfg.benchmark.arithmetic


def products(arithmetic: str) -> torch.dtype:
    """Return the dtype in which products are computed, and so weights rounded."""
    return torch.float32 if arithmetic == "fp32" else torch.bfloat16


def autocast(arithmetic: str):
    """Return the context to run a model in."""
    return device.autocast("bf16") if arithmetic == "training" else contextlib.nullcontext()


def store(model: nn.Module, arithmetic: str) -> None:
    """Round all parameters to BF16, in place, and keep each in the dtype that it is read in.

    arithmetic: of `name`. Weights of linears but the head are BF16 unless it is fp32; the rest is BF16 for an export.
    """
    head = model.get_output_embeddings()
    linears = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    in_bf16 = {id(parameter) for linear in linears for parameter in linear.parameters()}
    for parameter in model.parameters():
        # Under autocast the weights of products are in BF16 once, and not anew in every forward pass.
        half = arithmetic == "export" or (arithmetic == "training" and id(parameter) in in_bf16)
        parameter.data = parameter.data.bfloat16().to(torch.bfloat16 if half else torch.float32)


class FP32Head(nn.Linear):
    """The output embedding in FP32: logits of 8 to 16 lie 1/16 apart in BF16, further than what is measured."""

    def __init__(self, head: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), self.weight.float(), self.bias if self.bias is None else self.bias.float())
