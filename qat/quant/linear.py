"""The quantized linear and the project's only custom gradients.

Forward   y  = round(x * s_x) @ round(w * s_w)^T / (s_x * s_w)
Backward  dx = round(g * s_g) @ round(w * s_w)   / (s_g * s_w)
          dw = round(g * s_g)^T @ round(x * s_x) / (s_g * s_x)

The rounded values themselves are multiplied, and the product is unscaled, as hardware would (`qat.quant.matmul`). The
straight-through estimator passes gradients through the rounding; `masked` stops them where a value was beyond the
target. Until the backward pass, activations are kept as 8-bit codes, and on a CPU weights from step to step.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from qat.config import QuantConfig
from qat.quant.formats import TOLERANCE
from qat.quant.kernels import dispatch, lookup
from qat.quant.matmul import Matmul, Rounded
from qat.quant.scaling import Phase, ScaleBank


class Quantizer:
    """Rounds one role (activation, weight or gradient) of one linear with its scale from the bank."""

    def __init__(self, bank: ScaleBank, index: int, enabled: bool, target: float, cfg: QuantConfig):
        self.bank, self.index, self.enabled, self.target, self.cfg = bank, index, enabled, target, cfg
        # Of compiled steps on a GPU: they round within the kernels that make `x`.
        self.table = dispatch.table(bank.observed.device, cfg.format, cfg.overflow, target) if enabled else None
        self.probe = None  # telemetry: called with (index, x, scale) while a probe is attached

    def __call__(self, x: torch.Tensor, emit: str = "values") -> tuple[Rounded, torch.Tensor | None]:
        """x: BF16 or FP32, any shape -> (the operand that stands for it, what the STE lets through: a mask in the
        shape of `x`, or None for everything). The bank notes the amax of `x`."""
        if not self.enabled:
            return Rounded(x.detach()), None
        c, x = self.cfg, x.detach()
        scale = self.bank.scale_of(self.index, x)
        emit = "e4m3" if c.gemm == "fp8" else emit
        noted = self.bank.noted(self.index)
        if self.table is not None and torch.compiler.is_compiling():
            values, codes = lookup.quantize(x, scale, *noted, self.table, emit)
        else:
            values, codes = dispatch.quantize(x, scale, *noted, c.format, c.overflow, self.target, emit)
        if self.probe is not None:
            self.probe(self.index, x, scale)
        inside = (x.float() * scale).abs() <= self.target * TOLERANCE if c.ste == "masked" else None
        return Rounded(values, codes, scale), inside

    def observe(self, x: torch.Tensor) -> None:
        """Note the amax of `x` without rounding it."""
        if self.enabled:
            dispatch.observe(x.detach(), *self.bank.noted(self.index))


class Input:
    """Rounds what enters a linear; linears that read the same tensor share one, and it is rounded once for them all."""

    def __init__(self, quantizer: Quantizer):
        self.quantizer, self.users = quantizer, 1
        self._source, self._emit, self._left, self._rounded = None, "", 0, None

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> tuple[Rounded, torch.Tensor | None]:
        """x: any shape -> its operand in `dtype` and the mask of the STE (see `Quantizer`)."""
        emit = "codes" if torch.is_grad_enabled() else "values"  # codes are for the backward pass
        if self.users == 1:
            return self.quantizer(x.to(dtype), emit)
        if self._source is not x or self._emit != emit:
            self._source, self._emit, self._left = x, emit, self.users
            self._rounded = self.quantizer(x.to(dtype), emit)
        rounded, self._left = self._rounded, self._left - 1
        if not self._left:
            self._source = self._rounded = None
        return rounded


def _pass(gradient: torch.Tensor, inside: torch.Tensor | None) -> torch.Tensor:
    return gradient if inside is None else gradient * inside


class _QuantizedMatmul(torch.autograd.Function):
    """(x [..., in], weight [out, in]) -> [..., out], with both gradients from quantized operands.

    The operands stand for x and weight, which take part only to receive their gradients; the weight's is as
    `Products.kept` left it. products: `Products`; gradients: the output gradients' `Quantizer`.
    """

    @staticmethod
    def forward(ctx, x, weight, x_values, x_codes, x_scale, x_inside, w_kept, w_scale, w_inside, products, gradients):
        kept = products.kept(Rounded(x_values, x_codes, x_scale))
        ctx.save_for_backward(kept, x_scale, x_inside, w_kept, w_scale, w_inside)
        ctx.products, ctx.gradients, ctx.shape, ctx.dtype = products, gradients, x.shape, x.dtype
        rows = Rounded(*(_rows(t) for t in (x_values, x_codes)), x_scale)
        y = products.outputs(rows, products.restored(w_kept, w_scale, x.dtype), x.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        x_kept, x_scale, x_inside, w_kept, w_scale, w_inside = ctx.saved_tensors
        products, dtype = ctx.products, ctx.dtype
        g, _ = ctx.gradients(_rows(gradient))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = products.input_gradients(g, products.restored(w_kept, w_scale, dtype), dtype).view(ctx.shape)
            dx = _pass(dx, x_inside)
        if ctx.needs_input_grad[1]:
            dw = _pass(products.weight_gradients(g, products.restored(_rows(x_kept), x_scale, dtype), dtype), w_inside)
        return dx, dw, *(None,) * 9


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    """[..., features] -> [rows, features]."""
    return x if x is None or x.dim() < 2 else x.reshape(-1, x.shape[-1])


class _Observe(torch.autograd.Function):
    """The identity, whose gradient a quantizer observes."""

    @staticmethod
    def forward(ctx, y, quantizer):
        ctx.quantizer = quantizer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient):
        ctx.quantizer.observe(gradient)
        return gradient, None


# What `Products.kept` left of a weight, its scale, and what the STE lets through.
_Weight = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class QuantizedLinear(nn.Linear):
    """`nn.Linear` whose product runs on rounded operands while the bank says so; it shares the original's parameters.

    While the bank is OFF it is `nn.Linear`, bit for bit, forward and backward.
    """

    def __init__(self, linear: nn.Linear, bank: ScaleBank, quantizers: dict[str, Quantizer], products: Matmul):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bank, self.quantizers, self.products = bank, quantizers, products
        self.input = Input(quantizers["activation"])
        self.sharded = False  # compiled, and the weight is whole in the forward pass only: nobody can round it before
        self._rounded: _Weight | None = None
        self._rounded_for: object = None

    def share_input(self, other: QuantizedLinear) -> None:
        """Round what enters this linear together with what enters another one, which reads the same tensor."""
        self.input, self.quantizers["activation"] = other.input, other.quantizers["activation"]
        self.input.users += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., out_features] in the dtype that `nn.Linear` would return."""
        if self.bank.phase is Phase.OFF:
            return self._unquantized(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        (a, x_inside), (kept, scale, w_inside) = self.input(x, dtype), self._rounded_weight(dtype)
        y = _QuantizedMatmul.apply(
            x.to(dtype),
            self.weight,
            a.values,
            a.codes,
            a.scale,
            x_inside,
            kept,
            scale,
            w_inside,
            self.products,
            self.quantizers["gradient"],
        )
        return y if self.bias is None else y + self.bias.to(dtype)

    def _rounded_weight(self, dtype: torch.dtype) -> _Weight:
        if self.sharded:
            return self._kept_weight(dtype)
        if not torch.compiler.is_compiling():  # before a compiled step it was rounded for all its micro-batches
            self.round_weight(dtype)
        return self._rounded

    def forget_weight(self) -> None:
        """Round the weight anew next time, whether it has changed or not."""
        self._rounded = self._rounded_for = None

    @torch.no_grad()
    def round_weight(self, dtype: torch.dtype) -> None:
        """Round the weight, once for every change of it or of the scales and not once a micro-batch."""
        quantizer = self.quantizers["weight"]
        made_for = (self.weight._version, dtype, self.bank.ticks, self.bank.phase is Phase.FROZEN)
        # What is not rounded may be the weight itself, which FSDP takes away after each forward pass.
        if self._rounded_for != made_for or quantizer.probe or not quantizer.enabled:
            self._rounded = self._kept_weight(dtype)
            self._rounded_for = made_for

    def _kept_weight(self, dtype: torch.dtype) -> _Weight:
        # As codes while it trains on a CPU: of 1,000 tokens, a product takes a hundred times as long as decoding them.
        emit = "codes" if self.weight.device.type == "cpu" and self.bank.phase is not Phase.FROZEN else "values"
        operand, inside = self.quantizers["weight"](self.weight.to(dtype), emit)
        return self.products.kept(operand), operand.scale, inside

    def _unquantized(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.bank.observing:
            return y
        self.quantizers["activation"].observe(x)
        self.quantizers["weight"].observe(self.weight)
        return _Observe.apply(y, self.quantizers["gradient"])
