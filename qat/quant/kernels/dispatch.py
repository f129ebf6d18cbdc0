"""One door to rounding: the fastest implementation for a tensor's device, all bit-identical to `qat.quant.formats`.

HiF8 has a fused kernel for the CPU (`qat.quant.kernels.cpu`, Numba) and for CUDA (`qat.quant.kernels.gpu`, Triton); the
comparator formats, and HiF8 anywhere else, take the readable path. What a training step calls is registered with
`torch.library`, so that `torch.compile` sees one node where it would break its graph.
"""

import functools
import importlib.util
from types import ModuleType

import torch

from qat.quant.formats import E4M3_FACTOR, FORMATS, TOLERANCE, to_e4m3
from qat.quant.kernels import lookup

# What `quantize` returns: the values; the values and their 8-bit codes; or E4M3 bytes of 16 times the values.
EMITS = ("values", "codes", "e4m3")


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


def _fused(x: torch.Tensor, format: str) -> ModuleType | None:
    """Return the module with fused kernels for a tensor and a format; None: take the readable path."""
    if format != "hif8" or x.dtype not in (torch.float32, torch.bfloat16):
        return None
    return _cpu() if x.device.type == "cpu" else _gpu() if x.is_cuda else None


_LIBRARY = torch.library.Library("hif8", "DEF")


def _operator(schema: str, fake):
    """Register a function for torch.compile, which then sees one node. Called eagerly it stays the plain function. Not
    by `torch.library.custom_op`, whose calls, hundreds in a compiled step, take four times as long."""

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


def _quantize_fake(x, scale, slot, format, overflow, target, emit):
    values = x.new_empty(0) if emit == "e4m3" else x.new_empty(x.shape)
    return values, _no_codes(x) if emit == "values" else x.new_empty(x.shape, dtype=torch.uint8)


@_operator(
    "(Tensor x, Tensor scale, Tensor(a!)? slot, str format, str overflow, float target, str emit) -> (Tensor, Tensor)",
    fake=_quantize_fake,
)
def quantize(x, scale, slot, format, overflow, target, emit):
    """Scale a tensor, round it to an 8-bit format, and record its amax, reading it once.

    x: BF16 or FP32, any shape; scale: 0-dim FP32 on its device; slot: FP32 [1], which becomes the larger of itself and
    the amax of `x` (NaN counts as larger than all; None: nothing is recorded); overflow: "clip" (to +-target),
    "saturate" or "inf" (see `qat.quant.formats.Format.quantize`); emit: one of `EMITS`. Returns (rounded values of `x *
    scale`, in the shape and dtype of `x`, still scaled; uint8 of that shape: codes of `format`, or E4M3 bytes of 16
    times the values). What `emit` leaves out has no elements.
    """
    source = x.detach().contiguous()
    fused = _fused(source, format)
    if fused is not None:
        return fused.quantize(source, scale, slot, *_edges(overflow, target), emit)
    chosen = FORMATS[format]
    values = chosen.quantize(source.float() * scale, overflow, target)
    if slot is not None:
        record_amax(source, slot)
    codes = _no_codes(x) if emit == "values" else chosen.encode(values) if emit == "codes" else to_e4m3(values)
    return (source.new_empty(0) if emit == "e4m3" else values.to(x.dtype)), codes


def _no_codes(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(0, dtype=torch.uint8)


def _edges(overflow: str, target: float) -> tuple[float, float]:
    """Return (what magnitudes are clipped to before rounding, what becomes of those that round above 2^15)."""
    infinity = float("inf")
    return target if overflow == "clip" else infinity, infinity if overflow == "inf" else FORMATS["hif8"].largest


def table(device: torch.device, format: str, overflow: str, target: float) -> torch.Tensor | None:
    """Return what compiled steps round with by `lookup.quantize`; None where they call `quantize`, as CPU steps do."""
    return lookup.table(device, *_edges(overflow, target)) if format == "hif8" and device.type == "cuda" else None


@_operator(
    "(Tensor codes, str format, ScalarType dtype) -> Tensor",
    fake=lambda codes, format, dtype: codes.new_empty(codes.shape, dtype=dtype),
)
def decode(codes, format, dtype):
    """uint8 codes of any shape -> their values, in that shape and in `dtype` (BF16 or FP32, exact)."""
    fused = _fused(codes.new_empty(0, dtype=dtype), format)
    return fused.decode(codes, dtype) if fused is not None else FORMATS[format].decode(codes).to(dtype)


@_operator("(Tensor a, Tensor b, Tensor factor) -> Tensor", fake=lambda a, b, _: a.new_empty(a.shape[0], b.shape[1]))
def mm(a, b, factor):
    """Return (a @ b) * factor for matrices on the CPU; factor: 0-dim FP32. FP32 products take the factor along, without
    another pass over the result."""
    if a.dtype is torch.float32:
        return torch.addmm(a.new_empty(1), a, b, beta=0, alpha=factor.item())
    return unscale(a @ b, factor)


def unscale(product: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply a product, a matrix in BF16 or FP32, by a 0-dim FP32 factor: in FP32, in one pass, in its place. A BF16
    product is so rounded twice, once by the GEMM."""
    return product.mul_(factor.reshape(1))  # without a dimension it would be rounded to BF16 first


def amax(x: torch.Tensor) -> torch.Tensor:
    """Return the largest absolute value of a tensor of any shape and floating dtype, 0-dim FP32; NaN when `x` holds
    one."""
    return torch.linalg.vector_norm(x.detach(), float("inf")).float()


def record_amax(x: torch.Tensor, slot: torch.Tensor) -> None:
    """Record the amax of `x` in `slot` (as `quantize` does) without rounding it."""
    slot.copy_(torch.maximum(slot, amax(x)))


def statistics(x: torch.Tensor, scale: torch.Tensor, format: str, overflow: str, target: float) -> torch.Tensor:
    """Measure what rounding does to `x * scale`, FP64 [10] on the CPU or the device of `x`, summable over calls: counts
    of nonzero elements, of those in the tiers of 3, 2, 1 and 0 mantissa bits, of those beyond the target, of those
    rounded to zero, of those that 16 times an E4M3 value cannot hold; then signal power and error power (arguments as
    of `quantize`)."""
    source = x.detach().contiguous()
    fused = _fused(source, format)
    if fused is not None:
        return fused.statistics(source, scale, *_edges(overflow, target), target * TOLERANCE)
    scaled = source.float() * scale
    size, rounded = scaled.abs(), FORMATS[format].quantize(scaled, overflow, target)
    nonzero = size > 0
    lost = nonzero & (rounded == 0)
    bits = FORMATS[format].mantissa_bits(size.clamp(max=target) if overflow == "clip" else size)
    carried = E4M3_FACTOR * rounded
    inexact = FORMATS["fp8_e4m3"].round(carried, "saturate") != carried
    counts = [nonzero, *(nonzero & ~lost & (bits == tier) for tier in (3, 2, 1, 0)), size > target * TOLERANCE]
    powers = [scaled.double().square().sum(), (scaled.double() - rounded.double()).square().sum()]
    return torch.stack([count.sum(dtype=torch.float64) for count in (*counts, lost, inexact)] + powers)
