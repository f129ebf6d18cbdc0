"""One door to rounding: the fastest implementation for a tensor's device, all bit-identical to `qat.formats`."""

from __future__ import annotations

import torch

from qat.formats import FORMATS, TOLERANCE
from qat.kernels import cpu


def quantize(
    x: torch.Tensor, scale: torch.Tensor, format: str, overflow: str, target: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale `x` and round it to an 8-bit format.

    x: BF16 or FP32, any shape; scale: 0-dim FP32 on the device of `x`; overflow: "clip" (to +-target), "saturate" or
    "inf" (see `qat.formats.Format.quantize`). Returns (rounded values of `x * scale`, in the shape and dtype of `x`,
    still scaled; amax of `x`, 0-dim FP32).
    """
    if format == "hif8" and cpu.supports(x):
        return cpu.quantize(x, scale.item(), *_edges(overflow, target))
    values = FORMATS[format].quantize(x.detach().float() * scale, overflow, target)
    return values.to(x.dtype), amax(x)


def _edges(overflow: str, target: float) -> tuple[float, float]:
    """(what magnitudes are clipped to before rounding, what becomes of those that round above 2^15)."""
    infinity = float("inf")
    return target if overflow == "clip" else infinity, infinity if overflow == "inf" else FORMATS["hif8"].largest


def statistics(x: torch.Tensor, scale: torch.Tensor, format: str, overflow: str, target: float) -> torch.Tensor:
    """What rounding does to `x * scale`, FP64 [9] on the CPU or the device of `x`, summable over calls: counts of
    nonzero elements, of those in the tiers of 3, 2, 1 and 0 mantissa bits, of those beyond the target, of those
    rounded to zero; then signal power and error power (arguments as of `quantize`)."""
    if format == "hif8" and cpu.supports(x):
        return cpu.statistics(x, scale.item(), *_edges(overflow, target), target * TOLERANCE)
    scaled = x.detach().float() * scale
    size, rounded = scaled.abs(), FORMATS[format].quantize(scaled, overflow, target)
    nonzero = size > 0
    lost = nonzero & (rounded == 0)
    bits = FORMATS[format].mantissa_bits(size)
    counts = [nonzero, *(nonzero & ~lost & (bits == tier) for tier in (3, 2, 1, 0)), size > target * TOLERANCE, lost]
    powers = [scaled.double().square().sum(), (scaled.double() - rounded.double()).square().sum()]
    return torch.stack([count.sum(dtype=torch.float64) for count in counts] + powers)


def amax(x: torch.Tensor) -> torch.Tensor:
    """Largest absolute value of a tensor of any shape and floating dtype, 0-dim FP32; NaN when `x` holds one."""
    return torch.linalg.vector_norm(x.detach(), float("inf")).float()
