"""The quantized linear and the project's only custom gradients.

Forward   y  = round(x * s_x) @ round(w * s_w)^T / (s_x * s_w)
Backward  dx = round(g * s_g) @ round(w * s_w)   / (s_g * s_w)
          dw = round(g * s_g)^T @ round(x * s_x) / (s_g * s_x)

The rounded values themselves are multiplied, and the product is unscaled, as hardware would (`qat.quant.matmul`). The
straight-through estimator passes gradients through the rounding; `masked` stops them where a value was beyond the
target. Until the backward pass, activations are kept as 8-bit codes, and on a CPU weights within a step.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from qat.config import QuantConfig
from qat.quant.formats import TOLERANCE
from qat.quant.kernels import dispatch, lookup
from qat.quant.matmul import Matmul, Rounded
from qat.quant.scaling import ScaleBank


class Quantizer:
    """Rounds one role (activation, weight or gradient) of one linear with its scale from the bank."""

    def __init__(self, bank: ScaleBank, index: int, enabled: bool, target: float, cfg: QuantConfig):
        self.bank, self.index, self.enabled, self.target, self.cfg = bank, index, enabled, target, cfg
        # Of compiled steps on a GPU: they round within the kernels that make `x`.
        self.table = dispatch.table(bank.scale.device, cfg.format, cfg.overflow, target) if enabled else None
        self.observer = None  # of `qat.train.tensor_stats`: called with (index, x, scale) while it is attached

    def __call__(self, x: torch.Tensor, emit: str = "values") -> Rounded:
        """Round `x`, BF16 or FP32 in any shape, and record its amax in the bank. emit: "values", or "codes" beside
        them."""
        x = x.detach()
        if not self.enabled:
            return Rounded(x)
        c, scale, slot = self.cfg, self.bank.scale_of(self.index, x), self.bank.amax_slot(self.index)
        emit = "e4m3" if c.gemm == "fp8" else emit
        if self.table is not None and torch.compiler.is_compiling():
            values, codes = lookup.quantize(x, scale, slot, self.table, emit)
        else:
            values, codes = dispatch.quantize(x, scale, slot, c.format, c.overflow, self.target, emit)
        if self.observer is not None:
            self.observer(self.index, x, scale)
        mask = (x.float() * scale).abs() <= self.target * TOLERANCE if c.ste == "masked" else None
        return Rounded(None if emit == "e4m3" else values, None if emit == "values" else codes, scale, mask)

    def record(self, x: torch.Tensor) -> None:
        """Record the amax of `x` without rounding it."""
        if self.enabled:
            dispatch.record_amax(x.detach(), self.bank.amax_slot(self.index))


class Input:
    """Rounds what enters a linear; linears that read the same tensor share one, and it is rounded once for them all."""

    def __init__(self, quantizer: Quantizer):
        self.quantizer, self.users = quantizer, 1
        self._source, self._emit, self._left, self._rounded = None, "", 0, None

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> Rounded:
        """Round `x`, of any shape, in `dtype`."""
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


class _QuantizedMatmul(torch.autograd.Function):
    """(x [..., in], weight [out, in]) -> [..., out], with both gradients from rounded operands.

    `x` and `weight` take part only to receive their gradients; `rounded` holds the fields of the two `Rounded` that
    stand for them, the weight's packed.
    """

    @staticmethod
    def forward(ctx, x, weight, matmul: Matmul, round_gradient: Quantizer, *rounded):
        a, w = Rounded(*rounded[:4]), Rounded(*rounded[4:])
        ctx.save_for_backward(*a.packed(), *w)
        ctx.matmul, ctx.round_gradient, ctx.shape, ctx.dtype = matmul, round_gradient, x.shape, x.dtype
        y = matmul.outputs(a.rows(), matmul.unpacked(w, x.dtype), x.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        saved = ctx.saved_tensors  # once: with activation checkpointing a second look is an error
        a, w = Rounded(*saved[:4]), Rounded(*saved[4:])
        matmul, dtype = ctx.matmul, ctx.dtype
        g = ctx.round_gradient(gradient.reshape(-1, gradient.shape[-1]))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = matmul.input_gradients(g, matmul.unpacked(w, dtype), dtype).view(ctx.shape)
            dx = dx if a.mask is None else dx * a.mask
        if ctx.needs_input_grad[1]:
            dw = matmul.weight_gradients(g, matmul.unpacked(a.rows(), dtype), dtype)
            dw = dw if w.mask is None else dw * w.mask
        return dx, dw, *(None,) * (2 + len(saved))


class _Record(torch.autograd.Function):
    """The identity, whose gradient a quantizer records the amax of."""

    @staticmethod
    def forward(ctx, y, quantizer):
        ctx.quantizer = quantizer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient):
        ctx.quantizer.record(gradient)
        return gradient, None


class QuantizedLinear(nn.Linear):
    """`nn.Linear` whose product runs on rounded operands while the bank says so; it shares the original's parameters.

    While the bank does not quantize it is `nn.Linear`, bit for bit, forward and backward.
    """

    def __init__(self, linear: nn.Linear, bank: ScaleBank, quantizers: dict[str, Quantizer], matmul: Matmul):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bank, self.quantizers, self.matmul = bank, quantizers, matmul
        self.input = Input(quantizers["activation"])
        self.rounded_weight: Rounded | None = None  # ahead of forward passes; None: each rounds it anew

    def share_input(self, other: QuantizedLinear) -> None:
        """Round what enters this linear together with what enters another one, which reads the same tensor."""
        self.input, self.quantizers["activation"] = other.input, other.quantizers["activation"]
        self.input.users += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features] in the dtype that `nn.Linear` would return."""
        if not self.bank.quantizing:
            return self._unquantized(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weight = self._round_weight(dtype) if self.rounded_weight is None else self.rounded_weight
        rounded = (*self.input(x, dtype), *weight)
        y = _QuantizedMatmul.apply(x.to(dtype), self.weight, self.matmul, self.quantizers["gradient"], *rounded)
        return y if self.bias is None else y + self.bias.to(dtype)

    def _round_weight(self, dtype: torch.dtype) -> Rounded:
        # As codes while it trains on a CPU: of 1,000 tokens, a product takes a hundred times as long as decoding them.
        emit = "codes" if self.weight.device.type == "cpu" and self.bank.recording else "values"
        return self.quantizers["weight"](self.weight.to(dtype), emit).packed()

    def _unquantized(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.bank.recording:
            return y
        self.quantizers["activation"].record(x)
        self.quantizers["weight"].record(self.weight)
        return _Record.apply(y, self.quantizers["gradient"])


@torch.no_grad()
def round_weights(linears: Iterable[QuantizedLinear], dtype: torch.dtype) -> None:
    """Round weights ahead of the forward passes, in the dtype of these; to be called again when they have changed."""
    for linear in linears:
        linear.rounded_weight = linear._round_weight(dtype)


def forget_rounded_weights(linears: Iterable[QuantizedLinear]) -> None:
    """Let forward passes round the weights themselves, as they are then."""
    for linear in linears:
        linear.rounded_weight = None
