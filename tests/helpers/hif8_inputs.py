"""What rounding is tried on: all BF16 values, every midpoint with its neighbours, random numbers of all sizes."""

from __future__ import annotations

import pytest
import torch

from qat.quant import hif8
from qat.quant.kernels import dispatch

ALL_BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
CODES = torch.arange(256, dtype=torch.uint8)


def magnitudes() -> torch.Tensor:
    """The 127 finite magnitudes, zero first, in rising order."""
    values = hif8.decode(CODES)
    return values[values.isfinite() & (values >= 0)].sort().values


def hard_values() -> torch.Tensor:
    """Return all midpoints between neighbouring values, the two edges, and their FP32 neighbours, of both signs."""
    values = magnitudes()
    points = torch.cat([values, (values[1:] + values[:-1]) / 2, torch.tensor([1.25 * 2.0**15, 2.0**-23])])
    infinity = torch.tensor(float("inf"))
    points = torch.cat([points, torch.nextafter(points, infinity), torch.nextafter(points, -infinity)])
    return torch.cat([points, -points])


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    spread = torch.exp2(torch.randint(-30, 20, (100_000,), generator=generator).float())
    return {
        "all BF16": ALL_BF16,
        "midpoints": hard_values(),
        "random FP32": torch.randn(100_000, generator=generator) * spread,
        "strided": torch.randn(300, 200, generator=generator).t(),
        "empty": torch.empty(0),
    }


def statistics_by_hand(x: torch.Tensor, scale: torch.Tensor, overflow: str) -> torch.Tensor:
    """`kernels.statistics` by the readable path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "_fused", lambda *_: None)
        return dispatch.statistics(x, scale, "hif8", overflow, 15.0)
