"""The quantized linear and the project's only custom gradients.

Forward   y  = round(x * s_x) @ round(w * s_w)^T / (s_x * s_w)
Backward  dx = round(g * s_g) @ round(w * s_w)   / (s_g * s_w)
          dw = round(g * s_g)^T @ round(x * s_x) / (s_g * s_x)

The rounded values themselves are multiplied, exact in BF16 and FP32, and the product is unscaled, as hardware would
(`quant.operands=exact`). The released code divides the operands by their scales first (`descaled`). The
straight-through estimator passes gradients through the rounding; `masked` stops them where a value was beyond the
target.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from qat import kernels
from qat.config import QuantConfig
from qat.formats import TOLERANCE
from qat.scaling import Phase, ScaleBank


@dataclass
class Quantized:
    """A tensor after rounding. values * (1 / scale) approximates the original; `inside` marks what the STE lets
    through (None: everything); scale None means that values are unscaled already."""

    values: torch.Tensor
    scale: torch.Tensor | None = None
    inside: torch.Tensor | None = None


class Quantizer:
    """Rounds one role (activation, weight or gradient) of one linear with its scale from the bank."""

    def __init__(self, bank: ScaleBank, index: int, enabled: bool, target: float, cfg: QuantConfig):
        self.bank, self.index, self.enabled, self.target, self.cfg = bank, index, enabled, target, cfg
        self.probe = None  # telemetry: called with (index, x, scale) while a probe is attached

    def __call__(self, x: torch.Tensor) -> Quantized:
        """x: BF16 or FP32, any shape -> the same shape and dtype, rounded; x itself when this role is not quantized."""
        if not self.enabled:
            return Quantized(x)
        scale = self.bank.scale_of(self.index, x)
        values, amax = kernels.quantize(x, scale, self.cfg.format, self.cfg.overflow, self.target)
        self.bank.observe(self.index, amax)
        if self.probe is not None:
            self.probe(self.index, x, scale)
        inside = (x.float() * scale).abs() <= self.target * TOLERANCE if self.cfg.ste == "masked" else None
        if self.cfg.operands == "descaled":
            return Quantized((values.float() / scale).to(x.dtype), None, inside)
        return Quantized(values, scale, inside)

    def observe(self, x: torch.Tensor) -> None:
        """Report the amax of `x` without rounding it."""
        if self.enabled:
            self.bank.observe(self.index, kernels.amax(x))


def _unscale(product: torch.Tensor, *operands: Quantized) -> torch.Tensor:
    """Divide a product of rounded values by its operands' scales, in FP32. Reciprocals are multiplied, because the
    product of two scales can overflow FP32 where that of their reciprocals only underflows."""
    scales = [operand.scale for operand in operands if operand.scale is not None]
    if not scales:
        return product
    reciprocal = scales[0].reciprocal()
    for scale in scales[1:]:
        reciprocal = reciprocal * scale.reciprocal()
    # In FP32, because CUDA would round a BF16 product's 0-dim factor to BF16 first.
    return (product.float() * reciprocal).to(product.dtype)


def _pass(gradient: torch.Tensor, operand: Quantized) -> torch.Tensor:
    return gradient if operand.inside is None else gradient * operand.inside


class _QuantizedMatmul(torch.autograd.Function):
    """(x [..., in], weight [out, in]) -> [..., out], with both gradients from quantized operands."""

    @staticmethod
    def forward(ctx, x, weight, quantized_weight, activations, gradients):
        quantized_x = activations(x)
        ctx.x, ctx.weight, ctx.gradients = quantized_x, quantized_weight, gradients
        return _unscale(F.linear(quantized_x.values, quantized_weight.values), quantized_x, quantized_weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, g = ctx.x, ctx.weight, ctx.gradients(gradient)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = dw = None
        if needs_x:
            dx = _pass(_unscale(g.values @ weight.values, g, weight), x)
        if needs_weight:
            rows, columns = g.values.flatten(0, -2), x.values.flatten(0, -2)
            dw = _pass(_unscale(rows.t() @ columns, g, x), weight)
        return dx, dw, None, None, None


class QuantizedLinear(nn.Linear):
    """`nn.Linear` whose product runs on rounded operands while the bank says so; it shares the original's parameters.

    While the bank is OFF it is `nn.Linear`, bit for bit, forward and backward.
    """

    def __init__(self, linear: nn.Linear, bank: ScaleBank, quantizers: dict[str, Quantizer]):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bank, self.quantizers = bank, quantizers
        self._rounded_weight: tuple[object, Quantized] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype that `nn.Linear` would return."""
        if self.bank.phase is Phase.OFF:
            return self._unquantized(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        y = _QuantizedMatmul.apply(
            x.to(dtype), self.weight, self._rounded(dtype), self.quantizers["activation"], self.quantizers["gradient"]
        )
        return y if self.bias is None else y + self.bias.to(dtype)

    def _rounded(self, dtype: torch.dtype) -> Quantized:
        """The rounded weight, made once for every change of the weight or of the scales, not once a micro-batch."""
        made_for = (self.weight._version, dtype, self.bank.ticks, self.bank.phase is Phase.FROZEN)
        if self._rounded_weight is None or self._rounded_weight[0] != made_for or self.quantizers["weight"].probe:
            self._rounded_weight = made_for, self.quantizers["weight"](self.weight.detach().to(dtype))
        return self._rounded_weight[1]

    def _unquantized(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if self.bank.observing:
            self.quantizers["activation"].observe(x)
            self.quantizers["weight"].observe(self.weight)
            if y.requires_grad:
                y.register_hook(self.quantizers["gradient"].observe)
        return y
