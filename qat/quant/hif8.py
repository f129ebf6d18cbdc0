"""HiFloat8 (HiF8): encode, decode and round, in readable PyTorch. Every faster kernel is tested against this file.

The format (arXiv 2409.16626, tables 1-3) spends its bits where values are frequent: 3 mantissa bits for exponents
-3..3, 2 for 4..7 in size, 1 for 8..15, and below 2^-15 a denormal range 2^-22..2^-16 that has none. Codes 0x00 zero,
0x80 NaN, 0x6F and 0xEF infinities; there is no negative zero; the largest finite value is 2^15.

Rounding is the paper's "TA": to the nearest value, ties away from zero. That one rule covers every edge, because the
halfway points below the smallest value (2^-23) and above the largest (1.25 * 2^15) round away from zero too.
`fake_quantize_hybrid` is its "HR", an option of the hardware for gradients.
"""

from __future__ import annotations

import functools

import torch

NAN, POSITIVE_INF = 0x80, 0x6F
LARGEST = 2.0**15
SMALLEST = 2.0**-22
OVERFLOWS = ("inf", "saturate")


def _magnitude(code: int) -> float:
    """Value of a positive code, read off the dot field (table 2): the longer the prefix, the smaller the exponent."""
    if code >= 0x60:
        size, fraction_bits = 4, 1
    elif code >= 0x40:
        size, fraction_bits = 3, 2
    elif code >= 0x20:
        size, fraction_bits = 2, 3
    elif code >= 0x10:
        size, fraction_bits = 1, 3
    elif code >= 0x08:
        size, fraction_bits = 0, 3
    else:
        return 2.0 ** (code - 23) if code else 0.0
    fraction = code & ((1 << fraction_bits) - 1)
    exponent_field = (code >> fraction_bits) & ((1 << size) - 1)
    exponent = 0
    if size:
        # Sign-magnitude with an implicit leading one: of `size` bits the top one is the sign.
        half = 1 << (size - 1)
        magnitude = half + (exponent_field & (half - 1))
        exponent = -magnitude if exponent_field & half else magnitude
    return (1 + fraction / (1 << fraction_bits)) * 2.0**exponent


@functools.cache
def _tables(device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (value of all 256 codes, the 127 finite magnitudes in rising order, their codes), FP32, FP32 and uint8."""
    positive = [_magnitude(code) for code in range(0x80)]
    positive[POSITIVE_INF] = float("inf")
    values = torch.tensor(positive + [-v for v in positive])
    values[NAN] = float("nan")
    finite = sorted((v, c) for c, v in enumerate(positive) if c != POSITIVE_INF)
    magnitudes = torch.tensor([v for v, _ in finite])
    codes = torch.tensor([c for _, c in finite], dtype=torch.uint8)
    return values.to(device), magnitudes.to(device), codes.to(device)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """Return the FP32 values of uint8 codes of any shape (exact; 0x80 is NaN)."""
    if codes.dtype != torch.uint8:
        raise TypeError(f"decode needs uint8 codes, got {codes.dtype}")
    return _tables(codes.device)[0][codes.long()]


def encode(x: torch.Tensor, overflow: str = "inf") -> torch.Tensor:
    """Return the uint8 codes of a floating-point tensor of any shape, rounded to nearest, ties away from zero.

    overflow: "inf" (|x| >= 1.25 * 2^15 becomes an infinity, as the format says) or "saturate" (becomes +-2^15).
    NaN becomes 0x80; -0 and what rounds to it become 0x00; under "inf" infinities are kept.
    """
    rounded = fake_quantize(x.float(), overflow)
    _, magnitudes, codes = _tables(x.device)
    size = rounded.abs().contiguous()
    code = codes[torch.searchsorted(magnitudes, size.nan_to_num(0.0).clamp(max=LARGEST))]
    code = torch.where(size > LARGEST, torch.full_like(code, POSITIVE_INF), code)
    code = torch.where(rounded < 0, code | 0x80, code)
    return torch.where(rounded.isnan(), torch.full_like(code, NAN), code)


def _fields(size: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the bits of FP32 magnitudes, their exponents, and how many mantissa bits HiF8 drops of them, int32."""
    bits = size.view(torch.int32)
    exponent = (bits >> 23) - 127
    distance = exponent.abs()
    return bits, exponent, 20 + (distance >= 4).int() + (distance >= 8).int() + (distance >= 16).int()


def fake_quantize(x: torch.Tensor, overflow: str = "inf") -> torch.Tensor:
    """Round to the nearest HiF8 value: same shape and dtype as `x`, whose values all are exact in BF16 and FP32.

    Works on the FP32 bit pattern: adding half a unit of the last kept mantissa bit and cutting the rest off rounds
    to nearest, ties away, and carries into the exponent where it must. `overflow` as in `encode`. Not differentiable:
    gradients are `qat.quant.linear`'s business.
    """
    if overflow not in OVERFLOWS:
        raise ValueError(f"overflow={overflow!r}: choose one of {OVERFLOWS}")
    wide = x.detach().float()
    size = wide.abs()
    bits, _, dropped = _fields(size)
    unit = torch.ones_like(dropped) << dropped
    rounded = ((bits + (unit >> 1)) & -unit).view(torch.float32)
    rounded = torch.where(size < SMALLEST, SMALLEST * (size >= SMALLEST / 2), rounded)
    limit = torch.full_like(rounded, float("inf") if overflow == "inf" else LARGEST)
    rounded = torch.where(rounded > LARGEST, limit, rounded)
    rounded = torch.where(wide.isnan(), wide, torch.where(wide < 0, -rounded, rounded))
    return (rounded + 0.0).to(x.dtype)  # + 0.0 turns -0 into +0: the format has one zero


def fake_quantize_hybrid(x: torch.Tensor, overflow: str = "inf") -> torch.Tensor:
    """Round to HiF8 by hybrid rounding: as `fake_quantize` does where the exponent is -3..3, elsewhere stochastically.

    Nothing is drawn: a value rounds away from zero if F, the first bits of what is dropped, reaches a threshold T made
    of its own last bits. FP32: F has 14 bits, T is the last 14 of the mantissa. BF16 and FP16: F has 2 bits, T is 1 or
    3 by the mantissa's last bit. At exponent -23, between 0 and 2^-22, F begins with the leading one. An FP32 value
    whose last 14 bits are 0 always rounds away, even if HiF8 has it: 16 becomes 20. Sources: arXiv 2409.16626 ("HR",
    "SSR") and the reference conversions in Huawei's CANN, which have FP32 and FP16.
    """
    nearest = fake_quantize(x, overflow)
    size = x.detach().float().abs()
    bits, exponent, dropped = _fields(size)
    unit, below = torch.ones_like(dropped) << dropped, exponent == -23
    lost = torch.where(below, bits & 0x7FFFFF | 0x800000, bits & (unit - 1))
    if x.dtype.itemsize == 2:
        width, threshold = 2, 2 * (x.detach().view(torch.int16).int() & 1) + 1
    else:
        width, threshold = 14, bits & 0x3FFF
    away = (lost >> (dropped + below.int() - width)) >= threshold
    rounded = ((bits & -unit) + away.int() * unit).view(torch.float32)
    rounded = torch.where(size < SMALLEST, SMALLEST * (below & away), rounded)
    rounded = torch.where(rounded > LARGEST, float("inf") if overflow == "inf" else LARGEST, rounded)
    rounded = (torch.where(x < 0, -rounded, rounded) + 0.0).to(x.dtype)
    return torch.where((exponent.abs() < 4) | ~(size < 1.25 * LARGEST), nearest, rounded)
