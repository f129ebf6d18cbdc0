"""Multiply rounded operands and divide the product by their scales, in one of three ways.

exact     the values are multiplied as they are (BF16 and FP32 hold them), and the product is divided by both scales
descaled  values are divided by their scales before they are multiplied, and so rounded again: the released code's order
fp8       quant.gemm=fp8: E4M3 bytes of 16 times the values on FP8 tensor cores, which divide by 16 s and add inexactly
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from qat.config import QuantConfig
from qat.quant.formats import E4M3_FACTOR
from qat.quant.kernels import dispatch


class Rounded(NamedTuple):
    """A rounded tensor: values / scale, or decode(codes) / scale, approximates the original.

    values: BF16 or FP32, scaled; None: there are only codes.
    codes: uint8 in the same shape: codes of the format, or with gemm=fp8 E4M3 bytes of 16 times the values; None:
        there are only values.
    scale: 0-dim FP32; None: `values` is the original tensor.
    mask: bool in the same shape: where the straight-through estimator lets gradients through; None: everywhere.
    """

    values: torch.Tensor | None
    codes: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    mask: torch.Tensor | None = None

    def packed(self) -> Rounded:
        """Return it without values where it has codes, to be held until it is multiplied."""
        return self if self.codes is None else self._replace(values=None)

    def rows(self) -> Rounded:
        """Reshape values and codes from [..., features] to [rows, features]."""
        values, codes = (x if x is None or x.dim() < 2 else x.reshape(-1, x.shape[-1]) for x in self[:2])
        return self._replace(values=values, codes=codes)


class Matmul:
    """The three products of a quantized linear, computed as one configuration says."""

    def __init__(self, cfg: QuantConfig):
        self.format = cfg.format
        self.fp8, self.descaled = cfg.gemm == "fp8", cfg.operands == "descaled"

    def outputs(self, x: Rounded, weight: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """x [rows, in], weight [out, in] -> [rows, out]."""
        return self._multiply(x, weight, dtype, transpose_b=True)

    def input_gradients(self, gradient: Rounded, weight: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """gradient [rows, out], weight [out, in] -> [rows, in]."""
        return self._multiply(gradient, weight, dtype)

    def weight_gradients(self, gradient: Rounded, x: Rounded, dtype: torch.dtype) -> torch.Tensor:
        """gradient [rows, out], x [rows, in] -> [out, in]."""
        return self._multiply(gradient, x, dtype, transpose_a=True)

    def _multiply(
        self, a: Rounded, b: Rounded, dtype: torch.dtype, transpose_a: bool = False, transpose_b: bool = False
    ) -> torch.Tensor:
        if self.fp8:
            left = a.codes.t() if transpose_a else a.codes
            right = b.codes if transpose_b else b.codes.t()
            return _fp8(left, right, a.scale, b.scale, dtype)
        a, b = self._decode(a, dtype), self._decode(b, dtype)
        if self.descaled:
            a, b = _descale(a), _descale(b)
        left = a.values.t() if transpose_a else a.values
        right = b.values.t() if transpose_b else b.values
        # Reciprocals are multiplied: the product of two scales can overflow FP32, that of reciprocals only underflows.
        factors = [operand.scale.reciprocal() for operand in (a, b) if operand.scale is not None]
        if not factors:
            return left @ right
        factor = factors[0] if len(factors) == 1 else factors[0] * factors[1]
        if left.device.type == "cpu":
            return dispatch.mm(left, right, factor)
        return dispatch.unscale(left @ right, factor)

    def _decode(self, operand: Rounded, dtype: torch.dtype) -> Rounded:
        """Return an operand with its values in `dtype`, decoded where it has only codes."""
        if operand.values is not None:
            return operand
        return operand._replace(values=dispatch.decode(operand.codes, self.format, dtype))


def _descale(operand: Rounded) -> Rounded:
    if operand.scale is None:
        return operand
    return Rounded((operand.values.float() / operand.scale).to(operand.values.dtype))


def _fp8(
    a: torch.Tensor, b: torch.Tensor, scale_a: torch.Tensor, scale_b: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """a [m, k], b [n, k], E4M3 bytes in any layout -> a @ b^T / (scale_a * scale_b) in `dtype`, [m, n]."""
    a8, b8 = (codes.contiguous().view(torch.float8_e4m3fn) for codes in (a, b))
    inverse_a, inverse_b = ((scale * E4M3_FACTOR).reciprocal() for scale in (scale_a, scale_b))
    # On a CPU PyTorch multiplies the dequantized operands, which autocast would first round to BF16.
    with torch.autocast(a.device.type, enabled=False):
        return torch._scaled_mm(a8, b8.t(), scale_a=inverse_a, scale_b=inverse_b, out_dtype=dtype, use_fast_accum=False)
