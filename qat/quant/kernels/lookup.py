"""HiF8 by one look-up: how a float32 rounds is decided by its first 13 bits, whatever follows.

HiF8 keeps at most three bits of a mantissa, and ties go away from zero, so the sign, the exponent and four more bits
tell; and numbers that begin alike lie on the same side of every edge, or round as the edge does. The Triton kernels
(`qat.quant.kernels.gpu`) look up, and so do compiled steps on a GPU, by `quantize` below.
"""

from __future__ import annotations

import functools
import math

import torch

from qat.quant import hif8
from qat.quant.formats import to_e4m3

CUT = 19  # bits of a float32 that do not matter


@functools.cache
def table(device: torch.device, clip: float, beyond: float) -> torch.Tensor:
    """Return, for what a float32 begins with, int32 [8192]: its HiF8 value in BF16, the E4M3 byte of 16 times that, its
    code.

    clip: what magnitudes are clipped to before rounding; beyond: what becomes of those that round above 2^15.
    """
    begins = (torch.arange(1 << (32 - CUT)) << CUT).to(torch.int32).view(torch.float32)
    values = hif8.fake_quantize(begins.clamp(-clip, clip), "inf" if math.isinf(beyond) else "saturate")
    high = values.to(torch.bfloat16).view(torch.int16).int() << 16
    return (high | to_e4m3(values).int() << 8 | hif8.encode(values).int()).to(device)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, slot: torch.Tensor | None, table: torch.Tensor, emit: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do `qat.quant.kernels.dispatch.quantize` of HiF8 in PyTorch operations, which torch.compile fuses with those that
    make `x`, so that rounding takes no pass over memory of its own. table: as `table` gives it.

    Inductor keeps FP32 within a fused kernel: there `x` is rounded once, and not to BF16 before.
    """
    wide = x.detach().float()
    if slot is not None:
        slot.copy_(torch.maximum(slot, wide.abs().amax(-1).amax()))  # by rows first, as what makes `x` goes
    entries = table[((wide * scale).view(torch.int32) >> CUT) & (len(table) - 1)]
    if emit == "e4m3":
        return x.new_empty(0), (entries >> 8 & 0xFF).to(torch.uint8)
    codes = (entries & 0xFF).to(torch.uint8) if emit == "codes" else x.new_empty(0, dtype=torch.uint8)
    return (entries & -0x10000).view(torch.float32).to(x.dtype), codes
