"""HiF8 on a GPU, in Triton: scale, round, encode and amax in one pass over memory.

Bit-identical to `qat.quant.hif8.fake_quantize(x.float() * scale)` followed by a cast back to the dtype of `x`. All
tensors are contiguous. Rounding is a look-up (`qat.quant.kernels.lookup`): to compute value and code took 81
instructions an element, 63 of them at half rate, several times as long as reading and writing memory. Tests run these
kernels on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) where there is none, and count their instructions.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from qat.quant import hif8
from qat.quant.kernels import lookup

_BLOCK = 4096  # elements a program
_CUT = tl.constexpr(lookup.CUT)


@triton.jit
def _rounded(scaled, table):
    """Return the table's entries (see `qat.quant.kernels.lookup`) for float32 values."""
    return tl.load(table + (scaled.to(tl.uint32, bitcast=True) >> _CUT))


@triton.jit
def _value(entries):
    """Return the value in an entry, BF16."""
    return (entries >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _quantize(x, scale, amax, out, codes, table, elements, OUTPUT: tl.constexpr, BLOCK: tl.constexpr):
    """amax: the float32 bits of a slot, or None; OUTPUT: one of `qat.quant.kernels.dispatch.OUTPUTS`."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    wide = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    if amax is not None:
        # As integers, the bits of NaN are larger than all others.
        tl.atomic_max(amax, tl.max(wide.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), sem="relaxed")
    entries = _rounded(wide * tl.load(scale), table)
    if OUTPUT == "e4m3":
        tl.store(codes + offsets, (entries >> 8).to(tl.uint8), mask=mask)
    else:
        tl.store(out + offsets, _value(entries).to(out.dtype.element_ty), mask=mask)
    if OUTPUT == "codes":
        tl.store(codes + offsets, entries.to(tl.uint8), mask=mask)


@triton.jit
def _decode(codes, values, out, elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    code = tl.load(codes + offsets, mask=mask, other=0).to(tl.int32)
    tl.store(out + offsets, tl.load(values + code).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _statistics(x, scale, rows, table, elements, clip, target, BLOCK: tl.constexpr):
    """rows: FP32 [programs, 10], one row a program, in the order of `qat.quant.kernels.dispatch.statistics`; clip,
    target: float32 bits."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    scaled = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32) * tl.load(scale)
    size = scaled.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    rounded = _value(_rounded(scaled, table)).to(tl.float32)
    nonzero, lost = size != 0, (size != 0) & (rounded == 0.0)
    distance = tl.abs((tl.minimum(size, clip) >> 23) - 127)
    tier = (distance >= 4).to(tl.int32) + (distance >= 8).to(tl.int32) + (distance >= 16).to(tl.int32)
    magnitude = tl.abs(rounded)
    spaced = rounded * 8192.0  # below 2^-12, E4M3 holds 16 times multiples of 2^-13
    subnormal = magnitude < 0.000244140625  # 2^-12
    inexact = (magnitude != magnitude) | (magnitude > 28.0) | (subnormal & (spaced != tl.floor(spaced)))
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
    x: torch.Tensor, scale: torch.Tensor, slot: torch.Tensor | None, clip: float, overflow_value: float, output: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `qat.quant.kernels.cpu.quantize`; nothing is copied to the host."""
    values = x.new_empty(0) if output == "e4m3" else torch.empty_like(x)
    codes = torch.empty(0 if output == "values" else x.shape, dtype=torch.uint8, device=x.device)
    bits = None if slot is None else slot.view(torch.int32)
    table = lookup.table(x.device, clip, overflow_value)
    _quantize[_grid(x.numel())](x, scale, bits, values, codes, table, x.numel(), OUTPUT=output, BLOCK=_BLOCK)
    return values, codes


@functools.cache
def _values(device: torch.device) -> torch.Tensor:
    return hif8.decode(torch.arange(256, dtype=torch.uint8)).to(device)


def decode(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Do as `qat.quant.kernels.dispatch.decode`."""
    source = codes.contiguous()
    out = torch.empty(source.shape, dtype=dtype, device=codes.device)
    _decode[_grid(source.numel())](source, _values(codes.device), out, source.numel(), BLOCK=_BLOCK)
    return out


def statistics(x: torch.Tensor, scale: torch.Tensor, clip: float, overflow_value: float, target: float) -> torch.Tensor:
    """Do as `qat.quant.kernels.dispatch.statistics`, the powers summed in FP32 within a block."""
    grid = _grid(x.numel())
    rows = torch.empty((*grid, 10), dtype=torch.float32, device=x.device)
    table, limits = lookup.table(x.device, clip, overflow_value), (_float_bits(clip), _float_bits(target))
    _statistics[grid](x, scale, rows, table, x.numel(), *limits, BLOCK=_BLOCK)
    return rows.double().sum(0)
