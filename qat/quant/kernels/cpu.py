"""HiF8 on the CPU: scale, round, encode and amax in one pass over memory, multi-threaded and vectorized by Numba.

Bit-identical to `qat.quant.hif8.fake_quantize(x.float() * scale)` followed by a cast back to the dtype of `x`. All
tensors are contiguous.
"""

from __future__ import annotations

import contextlib
import functools

import llvmlite.binding as ll
import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.core.caching import FunctionCache
from numba.extending import intrinsic

from qat.errors import UserError
from qat.quant import hif8
from qat.quant.formats import to_e4m3
from qat.utils.environment import cache_dir

if not numba.config.CACHE_DIR:  # by default it is beside this file, where an installation may be read-only
    with contextlib.suppress(UserError):
        numba.config.CACHE_DIR = str(cache_dir() / "numba")

if numba.config.CPU_FEATURES is None and ll.get_host_cpu_features().get("avx512f"):
    # LLVM avoids the full width of AVX-512 by default; it makes these kernels up to twice as fast.
    numba.config.CPU_NAME = ll.get_host_cpu_name()
    numba.config.CPU_FEATURES = ll.get_host_cpu_features().flatten() + ",-prefer-256-bit"

# In Numba, an operation on two int32 or int16 gives an int64. Vectorized code casts each result back at once: vectors
# of int64 hold fewer, and AVX2 lacks some operations on them, so that kernels would take four to five times as long.
I, S = np.int32, np.int16  # noqa: E741
_CHUNK = 4096  # elements a task: what it reads and writes fits the L1 cache, for the second loop over it
# Bits of float32 numbers.
_SIZE, _SIGN, _INF = I(0x7FFFFFFF), I(-0x80000000), I(0x7F800000)
_SMALLEST, _HALF_SMALLEST = I(0x34800000), I(0x34000000)  # 2^-22 and 2^-23
_OVERFLOW = I(0x47200000)  # 1.25 * 2^15
_E4M3_EXACT, _E4M3_LARGEST = I(0x39800000), I(0x41E00000)  # 2^-12 and 28
# The tiers' exponents, -3 to 3, -7 to 7 and -15 to 15, lie around the bits of 1.5, at most this far away.
_MIDDLE, _TIER2, _TIER1, _TIER0 = I(0x3FC00000), I(7 << 22), I(15 << 22), I(31 << 22)


class _Cache(FunctionCache):
    """Numba's cache of a kernel. Where that is damaged or cannot be written, the kernel is compiled again."""

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # unpickling a truncated file can raise anything
            with contextlib.suppress(OSError):
                self.flush()

    def save_overload(self, sig, data):
        with contextlib.suppress(Exception):
            super().save_overload(sig, data)


def _kernel(function):
    """Compile a kernel for all threads, and cache it on disk where Numba can."""
    kernel = njit(parallel=True, nogil=True, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError):  # no place for a cache
        kernel._cache = _Cache(function)
    return kernel


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
def _round(bits, clip, overflow_value):
    """Round float32 bits to HiF8. `clip` and `overflow_value` as in `quantize`, as bits; NaN becomes some number.

    The same integer arithmetic as `qat.quant.hif8.fake_quantize`, written as selects because branches prevent
    vectorization.
    """
    size = I(bits & _SIZE)
    clipped = size if size < clip else clip
    offset = I(clipped - _MIDDLE)
    distance = I(offset ^ I(offset >> I(31)))  # ones' complement: a tier includes its lower end and not its upper one
    lost = I(I(I(distance >= _TIER2) + I(distance >= _TIER1)) + I(distance >= _TIER0))  # of 3 mantissa bits
    half, mask = I(I(1 << 19) << lost), I(I(-1 << 20) << lost)
    rounded = I(I(clipped + half) & mask)
    rounded = rounded if rounded > _SMALLEST else _SMALLEST
    rounded = overflow_value if clipped >= _OVERFLOW else rounded
    signed = I(rounded | I(bits & _SIGN))
    return signed if clipped >= _HALF_SMALLEST else I(0)


@njit(error_model="numpy")
def _encode(value):
    """Return the code of a HiF8 value by the bits of its BF16 number, int16; NaN becomes some number.

    Behind the sign, a code has a prefix, the exponent's sign, its bits but the first, and the mantissa. For float32,
    whose vectors hold half as many, a table is faster.
    """
    size = S(value & S(0x7FFF))
    exponent = S(S(size >> S(7)) - S(127))
    distance = S(-exponent) if exponent < S(0) else exponent
    code = S(S(distance * S(8)) + S(S(size >> S(4)) & S(7)))
    code = S(code >> S(1)) if distance >= S(4) else code  # 2 mantissa bits
    code = S(code >> S(1)) if distance >= S(8) else code  # 1
    sign = S(16) if distance >= S(2) else S(8)
    prefix = S(sign + S(32)) if distance >= S(4) else sign  # less the exponent's first bit
    prefix = S(prefix + S(32)) if distance >= S(8) else prefix
    code = S(S(code + prefix) + (sign if exponent < S(0) else S(0)))
    denormal = S(exponent + S(23))
    denormal = denormal if denormal > S(0) else S(0)
    code = denormal if exponent < S(-15) else code
    code = S(hif8.POSITIVE_INF) if exponent > S(15) else code
    return S(code + S(0x80)) if value < S(0) else code


def _quantizer(bf16: bool, with_codes: bool):
    """Return a kernel for one dtype, with or without codes."""

    @_kernel
    def kernel(x, scale, clip, overflow_value, all_values, table, all_codes, amaxes):
        for task in prange(amaxes.size):
            first, end = task * _CHUNK, (task + 1) * _CHUNK
            source, values, codes = x[first:end], all_values[first:end], all_codes[first:end]
            amax = I(0)
            for i in range(source.size):
                raw = I(I(source[i]) << I(16)) if bf16 else I(source[i])
                size = I(raw & _SIZE)
                amax = size if size > amax else amax
                rounded = _round(_bits(_float(raw) * scale), clip, overflow_value)
                values[i] = I(rounded >> I(16)) if bf16 else rounded
            if with_codes:  # in a loop of its own: vectors of int16 hold twice as many, and a look-up has none
                for i in range(source.size):
                    codes[i] = _encode(S(values[i])) if bf16 else table[np.uint32(values[i]) >> 20]
            amaxes[task] = amax
            if amax > _INF:  # there is a NaN, whose bits are larger than all others: write NaNs again
                for i in range(source.size):
                    raw = I(I(source[i]) << I(16)) if bf16 else I(source[i])
                    if I(raw & _SIZE) > _INF:
                        values[i] = I(raw >> I(16)) if bf16 else raw
                        if with_codes:
                            codes[i] = I(0x80)

    return kernel


@_kernel
def _decode(codes, table, out):
    for task in prange(-(-codes.size // _CHUNK)):
        source, target = codes[task * _CHUNK : (task + 1) * _CHUNK], out[task * _CHUNK : (task + 1) * _CHUNK]
        for i in range(source.size):
            target[i] = table[source[i]]


@_kernel
def _statistics(x, scale, clip, overflow_value, target, sums):
    for task in prange(len(sums)):
        source, row = x[task * _CHUNK : (task + 1) * _CHUNK], sums[task]
        for i in range(source.size):
            scaled = _float(source[i]) * scale
            size = _bits(scaled) & _SIZE
            if size == I(0):
                continue
            bits = _round(_bits(scaled), clip, overflow_value)
            rounded = _float(bits)
            row[0] += 1
            if rounded == np.float32(0):
                row[6] += 1
            else:
                distance = abs((min(size, clip) >> I(23)) - I(127))
                row[1 + (distance >= 4) + (distance >= 8) + (distance >= 16)] += 1
            row[5] += size > target
            spaced = rounded * np.float32(8192)  # below 2^-12, E4M3 holds 16 times multiples of 2^-13
            row[7] += (bits & _SIZE) > _E4M3_LARGEST or ((bits & _SIZE) < _E4M3_EXACT and spaced != np.rint(spaced))
            row[8] += np.float64(scaled) * scaled
            row[9] += (np.float64(scaled) - rounded) ** 2


_KERNELS = {
    (dtype, codes): _quantizer(dtype is torch.bfloat16, codes)
    for dtype in (torch.float32, torch.bfloat16)
    for codes in (False, True)
}
_INTEGER = {torch.float32: torch.int32, torch.bfloat16: torch.int16}


def _flat(tensor: torch.Tensor) -> np.ndarray:
    # Not .numpy(): after that PyTorch may not free the memory, as FSDP does between uses of a parameter.
    return np.from_dlpack(tensor.view(-1).view(_INTEGER.get(tensor.dtype, tensor.dtype)))


@functools.cache
def _float_bits(value: float) -> np.int32:
    return np.float32(value).view(np.int32)


def _use_threads_of_torch() -> None:
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def quantize(
    x: torch.Tensor, scale: torch.Tensor, slot: torch.Tensor | None, clip: float, overflow_value: float, output: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `qat.quant.kernels.dispatch.quantize`.

    clip: magnitudes are clipped to this before rounding (inf: not). overflow_value: what rounds above 2^15 becomes it.
    """
    values = torch.empty_like(x)
    codes = torch.empty(x.shape if output == "codes" else 0, dtype=torch.uint8)
    amaxes = np.empty(max(1, -(-x.numel() // _CHUNK)), np.int32)
    _use_threads_of_torch()
    kernel = _KERNELS[x.dtype, output == "codes"]
    numbers = np.float32(scale.item()), _float_bits(clip), _float_bits(overflow_value)
    kernel(_flat(x), *numbers, _flat(values), _codes(), _flat(codes), amaxes)
    if slot is not None:
        # As integers, the bits of NaN are larger than all others.
        bits = slot.view(torch.int32)
        bits.fill_(max(int(bits), int(amaxes.max())))
    return (x.new_empty(0), to_e4m3(values)) if output == "e4m3" else (values, codes)


@functools.cache
def _codes() -> np.ndarray:
    """Return the code of every HiF8 value, indexed by the first 12 bits of the value in float32."""
    return _flat(hif8.encode((torch.arange(4096, dtype=torch.int32) << 20).view(torch.float32)))


@functools.cache
def _values(dtype: torch.dtype) -> np.ndarray:
    """Return the value of every code."""
    return _flat(hif8.decode(torch.arange(256, dtype=torch.uint8)).to(dtype))


def decode(codes: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Do as `qat.quant.kernels.dispatch.decode`."""
    source = codes.contiguous()
    out = torch.empty(source.shape, dtype=dtype)
    _use_threads_of_torch()
    _decode(_flat(source), _values(dtype), _flat(out))
    return out


def statistics(x: torch.Tensor, scale: torch.Tensor, clip: float, overflow_value: float, target: float) -> torch.Tensor:
    """Do as `qat.quant.kernels.dispatch.statistics`; larger magnitudes than `target` count as beyond it."""
    source = x.float()
    sums = np.zeros((max(1, -(-source.numel() // _CHUNK)), 10))
    numbers = np.float32(scale.item()), *map(_float_bits, (clip, overflow_value, target))
    _statistics(_flat(source), *numbers, sums)
    return torch.from_numpy(sums.sum(0))
