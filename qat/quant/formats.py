"""The 8-bit formats a tensor can be rounded to, under one interface.

HiF8 is ours; the two FP8 formats (OCP 8-bit floating point, 2023) are for comparison and use PyTorch's own casts. To
add a format, put a `Format` into `FORMATS`; `quant.format=<its name>` then selects it. PyTorch is imported only within
functions, because the check of a command line reads the names here and must not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# In FP32, amax * (target / amax) can exceed the target by a rounding error: only more than that counts as beyond it.
TOLERANCE = 1 + 1e-6


@dataclass(frozen=True)
class Format:
    """An 8-bit floating-point format.

    largest: the largest finite value.
    round(x, overflow): same shape and dtype as `x`; overflow is "inf" or "saturate".
    hybrid(x, overflow): the same by quant.rounding=hybrid; None: the format has no such rounding.
    mantissa_bits(x): int32, how many mantissa bits the format has at each magnitude.
    encode(x), decode(codes): values of the format (BF16 or FP32) to uint8 codes and back to FP32, both exact.
    """

    largest: float
    round: Callable[[torch.Tensor, str], torch.Tensor]
    mantissa_bits: Callable[[torch.Tensor], torch.Tensor]
    encode: Callable[[torch.Tensor], torch.Tensor]
    decode: Callable[[torch.Tensor], torch.Tensor]
    hybrid: Callable[[torch.Tensor, str], torch.Tensor] | None = None

    def quantize(self, scaled: torch.Tensor, overflow: str, target: float, rounding: str = "nearest") -> torch.Tensor:
        """Round scaled values (any shape, BF16 or FP32).

        overflow "clip" clamps to +-target first (the paper's amax saturation); "saturate" and "inf" act at the
        format's own largest value. rounding: "nearest" or "hybrid".
        """
        to_format = self.hybrid if rounding == "hybrid" else self.round
        if overflow == "clip":
            return to_format(scaled.clamp(-target, target), "saturate")
        return to_format(scaled, overflow)


def _exponent(x: torch.Tensor) -> torch.Tensor:
    return x.detach().float().abs().frexp().exponent - 1


def _hif8() -> Format:
    def mantissa_bits(x: torch.Tensor) -> torch.Tensor:
        distance = _exponent(x).abs()
        return 3 - (distance >= 4).int() - (distance >= 8).int() - (distance >= 16).int()

    def lazy(name: str) -> Callable:
        """Return the function `name` of `qat.quant.hif8`, imported when it is called."""

        def call(*arguments):
            from qat.quant import hif8

            return getattr(hif8, name)(*arguments)

        return call

    coding = lazy("encode"), lazy("decode")
    return Format(2.0**15, lazy("fake_quantize"), mantissa_bits, *coding, hybrid=lazy("fake_quantize_hybrid"))


def _fp8(name: str, largest: float, fraction_bits: int, smallest_exponent: int, last: float, past: float) -> Format:
    """Make an FP8 format from PyTorch's dtype `name`, whose cast rounds to nearest, ties to even.

    last: the largest FP32 number that rounds to a finite value. past: what larger ones become under overflow "inf";
    written out here, because PyTorch's casts differ in that.
    """

    def dtype() -> torch.dtype:
        import torch

        return getattr(torch, name)

    def rounding(x: torch.Tensor, overflow: str) -> torch.Tensor:
        wide = x.detach().float()
        cast = wide.clamp(-largest, largest).to(dtype()).float()
        if overflow == "inf":
            cast = cast.where(~(wide.abs() > last), wide.sign() * past)
        return cast.to(x.dtype)

    def mantissa_bits(x: torch.Tensor) -> torch.Tensor:
        below = (smallest_exponent - _exponent(x)).clamp(min=0)
        return (fraction_bits - below).clamp(min=0)

    def encode(values: torch.Tensor) -> torch.Tensor:
        import torch

        return values.detach().to(dtype()).view(torch.uint8)

    return Format(largest, rounding, mantissa_bits, encode, decode=lambda codes: codes.view(dtype()).float())


FORMATS = {
    "hif8": _hif8(),
    # E4M3 has no infinity: what is past its largest value is NaN. 464 is a tie that goes to the even 448.
    "fp8_e4m3": _fp8("float8_e4m3fn", 448.0, 3, -6, 464.0, float("nan")),
    # 61440 is a tie that goes to the even neighbour, the infinity; the FP32 number below it rounds down.
    "fp8_e5m2": _fp8("float8_e5m2", 57344.0, 2, -14, 61440.0 - 2**-8, float("inf")),
}

# FP8 products carry a HiF8 value v as the E4M3 value 16 v. That is exact for 2^-12 <= |v| <= 15; smaller v are rounded
# to multiples of 2^-13.
E4M3_FACTOR = 16.0


def to_e4m3(values: torch.Tensor) -> torch.Tensor:
    """Return the E4M3 bytes, uint8, of `E4M3_FACTOR` times HiF8 values, for FP8 products; |values| <= 28."""
    return FORMATS["fp8_e4m3"].encode(values.detach().float() * E4M3_FACTOR)
