"""Rounding by the fastest implementation for a tensor's device; all are bit-identical to `qat.quant.formats`.

HiF8 has fused kernels for the CPU (`qat.quant.kernels.cpu`, Numba) and for CUDA (`qat.quant.kernels.gpu`, Triton).
Other formats, and HiF8 elsewhere, use plain PyTorch. What a training step calls is registered with `torch.library`: to
`torch.compile` it is one node, and no graph break.
"""

import functools
import importlib.util
from types import ModuleType

import torch

from qat.quant.formats import E4M3_FACTOR, FORMATS, TOLERANCE, to_e4m3
from qat.quant.kernels import lookup

# What `quantize` returns: the values; the values and their 8-bit codes; or only E4M3 bytes of 16 times the values.
OUTPUTS = ("values", "codes", "e4m3")


@functools.cache
def _cpu() -> ModuleType:
    from qat.quant.kernels import cpu  # Numba takes a second to import, and a GPU needs none

    return cpu


@functools.cache
def _gpu() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    from qat.quant.kernels import gpu

    return gpu


def _fused(x: torch.Tensor, format: str, rounding: str = "nearest") -> ModuleType | None:
    """Return the module with fused kernels for a tensor and a format; None: use plain PyTorch."""
    if format != "hif8" or rounding != "nearest" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _cpu() if x.device.type == "cpu" else _gpu() if x.is_cuda else None


_LIBRARY = torch.library.Library("hif8", "DEF")


def _operator(schema: str, fake):
    """Register a function as one node for torch.compile. Called eagerly, it stays the plain function.

    `torch.library.custom_op` would do the same, but its calls, hundreds in a compiled step, take four times as long.
    """

    def register(function):
        name = function.__name__
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"hif8::{name}", fake, lib=_LIBRARY)
        registered = getattr(torch.ops.hif8, name)

        @functools.wraps(function)
        def call(*arguments):
            return (registered if torch.compiler.is_compiling() else function)(*arguments)

        return call

    return register


def _quantize_fake(x, scale, slot, format, overflow, target, output, rounding="nearest"):
    values = x.new_empty(0) if output == "e4m3" else x.new_empty(x.shape)
    return values, x.new_empty(0 if output == "values" else x.shape, dtype=torch.uint8)


@_operator(
    "(Tensor x, Tensor scale, Tensor(a!)? slot, str format, str overflow, float target, str output,"
    " str rounding='nearest') -> (Tensor, Tensor)",
    fake=_quantize_fake,
)
def quantize(x, scale, slot, format, overflow, target, output, rounding="nearest"):
    """Scale a tensor, round it to an 8-bit format, and record its amax, reading it once.

    x: BF16 or FP32, any shape. scale: 0-dim FP32 on its device.
    slot: FP32 [1], becomes the larger of itself and the amax of `x`, NaN being larger than all; None: record nothing.
    overflow: "clip" (to +-target), "saturate" or "inf" (see `qat.quant.formats.Format.quantize`).
    output: one of `OUTPUTS`. rounding: "nearest", or "hybrid", which no fused kernel has.
    Returns (values, codes). values: `x * scale` rounded, in the shape and dtype of `x`. codes: uint8 in that shape,
    codes of `format` or E4M3 bytes of 16 times the values. What `output` does not ask for has no elements.
    """
    source = x.detach().contiguous()
    fused = _fused(source, format, rounding)
    if fused is not None:
        return fused.quantize(source, scale, slot, *_edges(overflow, target), output)
    chosen = FORMATS[format]
    values = chosen.quantize(source.float() * scale, overflow, target, rounding)
    if slot is not None:
        record_amax(source, slot)
    if output == "e4m3":
        return source.new_empty(0), to_e4m3(values)
    codes = chosen.encode(values) if output == "codes" else x.new_empty(0, dtype=torch.uint8)
    return values.to(x.dtype), codes


def _edges(overflow: str, target: float) -> tuple[float, float]:
    """Return (clip, overflow_value): magnitudes are clipped to `clip` before rounding; what then rounds above HiF8's
    2^15 becomes `overflow_value`."""
    infinity = float("inf")
    return target if overflow == "clip" else infinity, infinity if overflow == "inf" else FORMATS["hif8"].largest


def table(device: torch.device, format: str, overflow: str, target: float) -> torch.Tensor | None:
    """Return the table for `lookup.quantize` in compiled steps; None where these call `quantize`, as on a CPU."""
    return lookup.table(device, *_edges(overflow, target)) if format == "hif8" and device.type == "cuda" else None


@_operator(
    "(Tensor codes, str format, ScalarType dtype) -> Tensor",
    fake=lambda codes, format, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
def decode(codes, format, dtype):
    """Return the values of uint8 codes, in their shape and in `dtype` (BF16 or FP32, exact)."""
    fused = _fused(codes.new_empty(0, dtype=dtype), format)
    return fused.decode(codes, dtype) if fused is not None else FORMATS[format].decode(codes).to(dtype)


@_operator("(Tensor a, Tensor b, Tensor factor) -> Tensor", fake=lambda a, b, _: a.new_empty(a.shape[0], b.shape[1]))
def mm(a, b, factor):
    """Return (a @ b) * factor for matrices on the CPU; factor: 0-dim FP32. In FP32 that is one call of the GEMM."""
    if a.dtype is torch.float32:
        return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=factor.item())
    return unscale(a @ b, factor)


def unscale(product: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply a matrix, BF16 or FP32, in place by a 0-dim FP32 factor, computing in FP32.

    A BF16 product is thus rounded twice: by the GEMM, and here.
    """
    return product.mul_(factor.reshape(1))  # a 0-dim factor would be rounded to BF16 first


def amax(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of a tensor of any shape and dtype, 0-dim FP32; NaN when it holds a NaN."""
    return torch.linalg.vector_norm(x.detach(), float("inf")).float()


def record_amax(x: torch.Tensor, slot: torch.Tensor) -> None:
    """Record the amax of `x` in `slot`, as `quantize` does, without rounding."""
    slot.copy_(torch.maximum(slot, amax(x)))


def statistics(
    x: torch.Tensor, scale: torch.Tensor, format: str, overflow: str, target: float, rounding: str = "nearest"
) -> torch.Tensor:
    """Measure what rounding does to `x * scale`, FP64 [10] on the CPU or the device of `x`, summable over calls.

    These are counts of nonzero elements: all; in the tiers of 3, 2, 1 and 0 mantissa bits; beyond the target; rounded
    to zero; and inexact as E4M3 values of 16 times their size. Then signal power and error power. Arguments are those
    of `quantize`.
    """
    source = x.detach().contiguous()
    fused = _fused(source, format, rounding)
    if fused is not None:
        return fused.statistics(source, scale, *_edges(overflow, target), target * TOLERANCE)
    scaled = source.float() * scale
    size, rounded = scaled.abs(), FORMATS[format].quantize(scaled, overflow, target, rounding)
    nonzero = size > 0
    lost = nonzero & (rounded == 0)
    bits = FORMATS[format].mantissa_bits(size.clamp(max=target) if overflow == "clip" else size)
    in_e4m3 = E4M3_FACTOR * rounded
    inexact = FORMATS["fp8_e4m3"].round(in_e4m3, "saturate") != in_e4m3
    counts = [nonzero, *(nonzero & ~lost & (bits == tier) for tier in (3, 2, 1, 0)), size > target * TOLERANCE]
    powers = [scaled.double().square().sum(), (scaled.double() - rounded.double()).square().sum()]
    return torch.stack([count.sum(dtype=torch.float64) for count in (*counts, lost, inexact)] + powers)
