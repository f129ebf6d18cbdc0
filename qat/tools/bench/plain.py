"""The method in plain PyTorch, to compare with: what a quantized step costs without optimization.

For every tensor and call, amax and scale are read on the host, rounding uses log2 and pow, operands are descaled before
the product, and weights are rounded in every forward pass.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def fake_quantize(x: torch.Tensor, history: list[float], target: float = 15.0) -> torch.Tensor:
    """Round to HiF8 (values of at most `target`, so without overflow) by the largest amax of the last 64 calls."""
    wide = x.detach().float()
    scale = target / max(history) if history else target / wide.abs().max().item()
    history.append(wide.abs().max().item())
    del history[:-64]
    scaled = (wide * scale).clamp(-target, target)
    size = scaled.abs()
    exponent = torch.floor(torch.log2(size.clamp(min=2.0**-40)))
    distance = exponent.abs()
    bits = torch.where(distance < 4, 3, torch.where(distance < 8, 2, torch.where(distance < 16, 1, 0)))
    unit = torch.pow(2.0, exponent - bits)
    rounded = torch.sign(scaled) * torch.floor(size / unit + 0.5) * unit
    rounded = torch.where(size < 2.0**-22, torch.sign(scaled) * 2.0**-22 * (size >= 2.0**-23), rounded)
    return (rounded / scale).to(x.dtype)


class PlainQuantizedLinear(nn.Module):
    """A linear whose weight, activations and output gradients are fake-quantized, straight through."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.histories: dict[str, list[float]] = {"activation": [], "weight": [], "gradient": []}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rounded_x = x + (fake_quantize(x, self.histories["activation"]) - x).detach()
        rounded_w = self.weight + (fake_quantize(self.weight, self.histories["weight"]) - self.weight).detach()
        y = F.linear(rounded_x, rounded_w, self.bias)
        if y.requires_grad:
            y.register_hook(lambda gradient: fake_quantize(gradient, self.histories["gradient"]))
        return y
