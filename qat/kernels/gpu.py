"""HiF8 on a GPU, in Triton: scale, round, encode and amax in one pass over memory.

Bit-identical to `qat.hif8.fake_quantize(x.float() * scale)` followed by a cast back to the dtype of `x`. All tensors
are contiguous. Tests run these kernels on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) where there is none.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from qat import hif8

_BLOCK = 4096  # elements a program
_STATISTICS = 10


@triton.jit
def _round(scaled, clip, beyond):
    """HiF8 rounding of float32 values as bits; clip and beyond are float32 bits (see `qat.kernels.cpu._round`)."""
    bits = scaled.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    clipped = tl.minimum(size, clip)
    distance = tl.abs((clipped >> 23) - 127)
    dropped = 20 + (distance >= 4).to(tl.int32) + (distance >= 8).to(tl.int32) + (distance >= 16).to(tl.int32)
    unit = tl.full(bits.shape, 1, tl.int32) << dropped
    rounded = tl.maximum((clipped + (unit >> 1)) & -unit, 0x34800000)  # the smallest value, 2^-22
    rounded = tl.where(clipped >= 0x47200000, beyond, rounded)  # 1.25 * 2^15
    rounded = tl.where(size > 0x7F800000, size, rounded)  # NaN stays
    return tl.where(clipped >= 0x34000000, rounded | (bits & -0x80000000), 0)  # below 2^-23 is zero


@triton.jit
def _encode(bits):
    """Code of the float32 bits of a HiF8 value (see `qat.hif8`)."""
    size = bits & 0x7FFFFFFF
    exponent = (size >> 23) - 127
    distance = tl.abs(exponent)
    far, farther = (distance >= 4).to(tl.int32), (distance >= 8).to(tl.int32)
    width = (distance >= 1).to(tl.int32) + (distance >= 2).to(tl.int32) + far + farther
    fraction = 3 - far - farther
    one = tl.full(bits.shape, 1, tl.int32)
    dot = tl.where(width == 4, 0x60, (one * 8) << width)
    half = (one << width) >> 1
    field = distance - half + tl.where(exponent < 0, half, 0)
    code = dot | (field << fraction) | ((size & 0x7FFFFF) >> (23 - fraction))
    code = tl.where(size < 0x38000000, exponent + 23, code)  # denormal, below 2^-15
    code = tl.where(size == 0, 0, code)
    code = tl.where(size == 0x7F800000, 0x6F, code)
    code = tl.where(bits < 0, code | 0x80, code)
    return tl.where(size > 0x7F800000, 0x80, code).to(tl.uint8)


@triton.jit
def _e4m3(values):
    """E4M3 of 16 times HiF8 values of at most 28 in size."""
    sixteenfold = values * 16.0
    # E4M3's subnormals are multiples of 2^-9: adding 1.5 * 2^14, whose FP32 spacing that is, rounds to the nearest even
    # one, as the cast should; not all of Triton's casts do.
    subnormal = (sixteenfold + 24576.0) - 24576.0
    return tl.where(tl.abs(sixteenfold) < 0.015625, subnormal, sixteenfold).to(tl.float8e4nv)


@triton.jit
def _quantize(x, scale, observed, out, codes, elements, clip, beyond, EMIT: tl.constexpr, BLOCK: tl.constexpr):
    """observed: float32 bits of one amax, or None; EMIT as in `qat.kernels.EMITS`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    wide = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if observed is not None:
        # NaN bits are the largest of all, as integers.
        tl.atomic_max(observed, tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), sem="relaxed")
    bits = _round(wide * tl.load(scale), clip, beyond)
    values = bits.to(tl.float32, bitcast=True)
    if EMIT == "e4m3":
        tl.store(codes + place, _e4m3(values), mask=inside)
    else:
        tl.store(out + place, values.to(out.dtype.element_ty), mask=inside)
    if EMIT == "codes":
        tl.store(codes + place, _encode(bits), mask=inside)


@triton.jit
def _decode(codes, table, out, elements, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    code = tl.load(codes + place, mask=inside, other=0).to(tl.int32)
    tl.store(out + place, tl.load(table + code).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _statistics(x, scale, rows, elements, clip, beyond, target, BLOCK: tl.constexpr):
    """rows: FP32 [programs, 10], one row a program, in the order of `qat.kernels.statistics`."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    scaled = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    size = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = _round(scaled, clip, beyond)
    rounded = bits.to(tl.float32, bitcast=True)
    nonzero, lost = size != 0, (size != 0) & (rounded == 0.0)
    distance = tl.abs((tl.minimum(size, clip) >> 23) - 127)
    tier = (distance >= 4).to(tl.int32) + (distance >= 8).to(tl.int32) + (distance >= 16).to(tl.int32)
    spaced = rounded * 8192.0  # E4M3's subnormals, 16 times a value: multiples of 2^-13
    kept = bits & 0x7FFFFFFF
    inexact = (kept > 0x41E00000) | ((kept < 0x39800000) & (spaced != tl.floor(spaced)))  # 28 and 2^-12
    row = rows + tl.program_id(0) * 10
    tl.store(row, tl.sum(nonzero.to(tl.float32), 0))
    for bits_less in tl.static_range(4):
        tl.store(row + 1 + bits_less, tl.sum((nonzero & (rounded != 0.0) & (tier == bits_less)).to(tl.float32), 0))
    tl.store(row + 5, tl.sum((size > target).to(tl.float32), 0))
    tl.store(row + 6, tl.sum(lost.to(tl.float32), 0))
    tl.store(row + 7, tl.sum(inexact.to(tl.float32), 0))
    tl.store(row + 8, tl.sum(scaled * scaled, 0))
    tl.store(row + 9, tl.sum((scaled - rounded) * (scaled - rounded), 0))


def _grid(elements: int) -> tuple[int]:
    return (max(1, triton.cdiv(elements, _BLOCK)),)


@functools.cache
def _float_bits(value: float) -> int:
    return torch.tensor(value, dtype=torch.float32).view(torch.int32).item()


def quantize(
    x: torch.Tensor,
    scale: torch.Tensor,
    observed: torch.Tensor | None,
    index: int,
    clip: float,
    beyond: float,
    emit: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `qat.kernels.cpu.quantize`; nothing is copied to the host."""
    out = x.new_empty(0) if emit == "e4m3" else torch.empty_like(x)
    codes = torch.empty(0 if emit == "values" else x.shape, dtype=torch.uint8, device=x.device)
    stored = codes.view(torch.float8_e4m3fn) if emit == "e4m3" else codes
    slot = None if observed is None else observed.view(torch.int32)[index:]
    edges = _float_bits(clip), _float_bits(beyond)
    _quantize[_grid(x.numel())](x, scale, slot, out, stored, x.numel(), *edges, EMIT=emit, BLOCK=_BLOCK)
    return out, codes


@functools.cache
def _table(device: torch.device) -> torch.Tensor:
    return hif8.decode(torch.arange(256, dtype=torch.uint8)).to(device)


def decode(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """As `qat.kernels.decode`."""
    source = codes.contiguous()
    out = torch.empty(source.shape, dtype=dtype, device=codes.device)
    _decode[_grid(source.numel())](source, _table(codes.device), out, source.numel(), BLOCK=_BLOCK)
    return out


def statistics(x: torch.Tensor, scale: torch.Tensor, clip: float, beyond: float, target: float) -> torch.Tensor:
    """As `qat.kernels.statistics`, the powers summed in FP32 within a block."""
    grid = _grid(x.numel())
    rows = torch.empty((*grid, _STATISTICS), dtype=torch.float32, device=x.device)
    edges = (_float_bits(value) for value in (clip, beyond, target))
    _statistics[grid](x, scale, rows, x.numel(), *edges, BLOCK=_BLOCK)
    return rows.double().sum(0)
