"""HiF8 on the CPU: scale, round and amax in one pass over memory, multi-threaded and vectorized by Numba.

Bit-identical to `qat.hif8.fake_quantize(x.float() * scale)` followed by a cast back to the dtype of `x`.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import intrinsic

I = np.int32  # noqa: E741  integer literals must stay 32 bits wide, or the loops stop being vectorized
_CHUNK = 16384  # elements a task: large enough to hide scheduling, small enough to balance two cores
_SIZE, _SIGN, _INF = I(0x7FFFFFFF), I(-0x80000000), I(0x7F800000)
_SMALLEST, _HALF_SMALLEST = I(0x34800000), I(0x34000000)  # 2^-22 and 2^-23


@intrinsic
def _bits(typing, value):
    """Reinterpret a float32 as int32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.int32))

    return types.int32(types.float32), codegen


@intrinsic
def _float(typing, value):
    """Reinterpret an int32 as float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], context.get_value_type(types.float32))

    return types.float32(types.int32), codegen


@njit(error_model="numpy")
def _round(bits, clip, beyond):
    """HiF8 rounding of float32 bits: magnitudes are clipped to `clip` first, those above 2^15 become `beyond`.

    The same integer arithmetic as `qat.hif8.fake_quantize`, written as selects because branches stop vectorization.
    """
    size = bits & _SIZE
    clipped = size if size < clip else clip
    exponent = (clipped >> I(23)) - I(127)
    distance = exponent if exponent >= I(0) else -exponent
    dropped = I(20) + (I(1) if distance >= I(4) else I(0)) + (I(1) if distance >= I(8) else I(0))
    dropped += I(1) if distance >= I(16) else I(0)
    unit = I(1) << dropped
    rounded = (clipped + (unit >> I(1))) & -unit
    tiny = _SMALLEST if clipped >= _HALF_SMALLEST else I(0)
    rounded = tiny if clipped < _SMALLEST else rounded
    rounded = beyond if rounded > I(0x47000000) else rounded  # 2^15
    rounded = size if size > _INF else rounded  # NaN stays
    return rounded | ((bits & _SIGN) if rounded != I(0) else I(0))


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _quantize_fp32(x, scale, clip, beyond, out, amaxes):
    for task in prange(amaxes.size):
        source, target = x[task * _CHUNK : (task + 1) * _CHUNK], out[task * _CHUNK : (task + 1) * _CHUNK]
        amax = I(0)
        for i in range(source.size):
            raw = source[i]
            size = raw & _SIZE
            amax = size if size > amax else amax
            target[i] = _round(_bits(_float(raw) * scale), clip, beyond)
        amaxes[task] = amax


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _quantize_bf16(x, scale, clip, beyond, out, amaxes):
    for task in prange(amaxes.size):
        source, target = x[task * _CHUNK : (task + 1) * _CHUNK], out[task * _CHUNK : (task + 1) * _CHUNK]
        amax = I(0)
        for i in range(source.size):
            raw = I(source[i]) << I(16)
            size = raw & _SIZE
            amax = size if size > amax else amax
            target[i] = np.int16(_round(_bits(_float(raw) * scale), clip, beyond) >> I(16))
        amaxes[task] = amax


@njit(parallel=True, cache=True, nogil=True, error_model="numpy")
def _statistics(x, scale, clip, beyond, target, sums):
    for task in prange(len(sums)):
        source, row = x[task * _CHUNK : (task + 1) * _CHUNK], sums[task]
        for i in range(source.size):
            scaled = _float(source[i]) * scale
            size = _bits(scaled) & _SIZE
            if size == I(0):
                continue
            rounded = _float(_round(_bits(scaled), clip, beyond))
            row[0] += 1
            if rounded == np.float32(0):
                row[6] += 1
            else:
                distance = abs((size >> I(23)) - I(127))
                row[1 + (distance >= 4) + (distance >= 8) + (distance >= 16)] += 1
            row[5] += size > target
            row[7] += np.float64(scaled) * scaled
            row[8] += (np.float64(scaled) - rounded) ** 2


_KERNELS = {torch.float32: (_quantize_fp32, torch.int32), torch.bfloat16: (_quantize_bf16, torch.int16)}


def supports(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in _KERNELS


def _float_bits(value: float) -> np.int32:
    return np.float32(value).view(np.int32)


def quantize(x: torch.Tensor, scale: float, clip: float, beyond: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Round `x * scale` to HiF8.

    x: BF16 or FP32 of any shape; clip: magnitudes above it become it before rounding (inf: none do); beyond: what
    rounds above 2^15 becomes this. Returns (values in the shape and dtype of `x`, amax of `x` as a 0-dim FP32
    tensor; NaN when `x` holds one, since NaN bits are the largest of all).
    """
    kernel, view = _KERNELS[x.dtype]
    source = x.detach().contiguous()
    out = torch.empty_like(source)
    amaxes = np.empty(max(1, -(-source.numel() // _CHUNK)), np.int32)
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
    flat = (tensor.view(-1).view(view).numpy() for tensor in (source, out))
    kernel(next(flat), np.float32(scale), _float_bits(clip), _float_bits(beyond), next(flat), amaxes)
    return out, torch.from_numpy(amaxes.view(np.float32).max(keepdims=True)).squeeze(0)


def statistics(x: torch.Tensor, scale: float, clip: float, beyond: float, target: float) -> torch.Tensor:
    """FP64 [9] of `x * scale` (BF16 or FP32, any shape): counts of nonzero elements, of those with 3, 2, 1 and 0
    mantissa bits, of those beyond `target`, of those rounded to zero; then the signal's and the error's power."""
    source = x.detach().float().contiguous()
    sums = np.zeros((max(1, -(-source.numel() // _CHUNK)), 9))
    flat = source.view(-1).view(torch.int32).numpy()
    _statistics(flat, np.float32(scale), _float_bits(clip), _float_bits(beyond), _float_bits(target), sums)
    return torch.from_numpy(sums.sum(0))
