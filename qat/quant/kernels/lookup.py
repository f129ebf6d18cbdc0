"""HiF8 by one look-up: the first 13 bits of a float32 decide how it rounds.

HiF8 keeps at most three bits of a mantissa, and ties go away from zero. So rounding needs the sign, the 8 bits of the
exponent and four bits of the mantissa. The limits (clip, overflow, underflow) are no exception: numbers that share
these bits lie on the same side of a limit, or round to the same value as the limit. The Triton kernels
(`qat.quant.kernels.gpu`) use the table, and so do compiled steps on a GPU, by `quantize` below.
"""

from __future__ import annotations

import functools
import math

import torch

from qat.quant import hif8
from qat.quant.formats import to_e4m3

CUT = 19  # the last bits of a float32, which do not matter


@functools.cache
def table(device: torch.device, clip: float, overflow_value: float) -> torch.Tensor:
    """Return the table, int32 [8192]: for the first 13 bits of a float32 its HiF8 value as BF16 (upper 16 bits), the
    E4M3 byte of 16 times that (next 8 bits) and its HiF8 code (last 8 bits).

    clip: magnitudes are clipped to this before rounding; overflow_value: what rounds above 2^15 becomes this.
    """
    inputs = (torch.arange(1 << (32 - CUT)) << CUT).to(torch.int32).view(torch.float32)
    values = hif8.fake_quantize(inputs.clamp(-clip, clip), "inf" if math.isinf(overflow_value) else "saturate")
    high = values.to(torch.bfloat16).view(torch.int16).int() << 16
    return (high | to_e4m3(values).int() << 8 | hif8.encode(values).int()).to(device)


def quantize(
    x: torch.Tensor, scale: torch.Tensor, slot: torch.Tensor | None, table: torch.Tensor, output: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do `qat.quant.kernels.dispatch.quantize` for HiF8 in PyTorch operations, by a `table`.

    torch.compile fuses them with the operations that compute `x`: rounding then reads and writes no memory of its own.
    Inductor keeps FP32 within a fused kernel, so there `x` is rounded to HiF8 directly, and not to BF16 before.
    """
    wide = x.detach().float()
    if slot is not None:
        slot.copy_(torch.maximum(slot, wide.abs().amax(-1).amax()))  # by rows first, so that it fuses with what makes x
    entries = table[((wide * scale).view(torch.int32) >> CUT) & (len(table) - 1)]
    if output == "e4m3":
        return x.new_empty(0), (entries >> 8 & 0xFF).to(torch.uint8)
    codes = (entries & 0xFF).to(torch.uint8) if output == "codes" else x.new_empty(0, dtype=torch.uint8)
    return (entries & -0x10000).view(torch.float32).to(x.dtype), codes
