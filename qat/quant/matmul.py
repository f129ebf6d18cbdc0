"""Products of rounded operands, unscaled: where 8-bit arithmetic is simulated, or handed to FP8 tensor cores.

exact     values are multiplied as they are (exact in BF16 and FP32) and the product is divided by both scales
descaled  values are divided by their scales first, and rounded to BF16 again: the released code's order
fp8       E4M3 bytes of 16 times the values on FP8 tensor cores (quant.gemm=fp8), with 1 / (16 s) as their scales
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qat.config import QuantConfig
from qat.quant.formats import E4M3_FACTOR
from qat.quant.kernels import dispatch


class Rounded(NamedTuple):
    """A rounded tensor: values / scale, or decode(codes) / scale, approximates the original.

    values: BF16 or FP32, scaled; None: only codes are held. codes: uint8 in the same shape, of the format, or with
    gemm=fp8 E4M3 bytes of 16 times the values; None: only values are held. scale: 0-dim FP32; None: values is the
    original. mask: bool in the same shape, where the straight-through estimator lets gradients through; None:
    everywhere.
    """

    values: torch.Tensor | None
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def packed(self) -> Rounded:
        """Return what to keep until the tensor is multiplied again: its codes where it has any."""
        return self if self.codes is None else self._replace(values=None)

    def rows(self) -> Rounded:
        """Return the tensor, [..., features], as [rows, features]."""
        values, codes = (x if x is None or x.dim() < 2 else x.reshape(-1, x.shape[-1]) for x in self[:2])
        return self._replace(values=values, codes=codes)


class Matmul:
    """The products of rounded operands, as one configuration has them made."""

    def __init__(self, cfg: QuantConfig):
        self.format = cfg.format
        self.fp8, self.descaled = cfg.gemm == "fp8", cfg.operands == "descaled"

    def unpacked(self, operand: Rounded, dtype: torch.dtype) -> Rounded:
        """Return an operand with what is multiplied: its codes in FP8 products, else its values in `dtype`."""
        if operand.values is not None or self.fp8:
            return operand
        return operand._replace(values=dispatch.decode(operand.codes, self.format, dtype))

    def outputs(self, x: Rounded, weight: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """x [rows, in], weight [out, in] -> [rows, out]."""
        if self.fp8:
            return _fp8(x.codes, weight.codes, x, weight, dtype)
        return self._exact(x, weight, lambda a, b: (a, b.t()))

    def input_gradients(self, gradient: Rounded, weight: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """gradient [rows, out], weight [out, in] -> [rows, in]."""
        if self.fp8:
            return _fp8(gradient.codes, weight.codes.t(), gradient, weight, dtype)
        return self._exact(gradient, weight, lambda a, b: (a, b))

    def weight_gradients(self, gradient: Rounded, x: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """gradient [rows, out], x [rows, in] -> [out, in]."""
        if self.fp8:
            return _fp8(gradient.codes.t(), x.codes.t(), gradient, x, dtype)
        return self._exact(gradient, x, lambda a, b: (a.t(), b))

    def _exact(self, a: Rounded, b: Rounded, arrange) -> torch.Tensor:
        operands = [_divided(each) if self.descaled else each for each in (a, b)]
        left, right = arrange(*(each.values for each in operands))
        # Reciprocals are multiplied, because the product of two scales can overflow FP32 where theirs only underflows.
        factors = [each.scale.reciprocal() for each in operands if each.scale is not None]
        if not factors:
            return left @ right
        factor = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        if left.device.type == "cpu":
            return dispatch.mm(left, right, factor)
        return dispatch.unscale(left @ right, factor)


def _divided(operand: Rounded) -> Rounded:
    if operand.scale is None:
        return operand
    return Rounded((operand.values.float() / operand.scale).to(operand.values.dtype))


def _fp8(a: torch.Tensor, b: torch.Tensor, left: Rounded, right: Rounded, dtype: torch.dtype) -> torch.Tensor:
    """a [m, k], b [n, k], E4M3 bytes in any layout -> a @ b^T / (scales of left and right) in `dtype`, [m, n]."""
    a8, b8 = (codes.contiguous().view(torch.float8_e4m3fn) for codes in (a, b))
    scales = [(each.scale * E4M3_FACTOR).reciprocal() for each in (left, right)]
    # On a CPU PyTorch multiplies the dequantized operands, and autocast would round them to BF16 before it does.
    with torch.autocast(a.device.type, enabled=False):
        return torch._scaled_mm(a8, b8.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype, use_fast_accum=False)
