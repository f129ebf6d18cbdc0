"""The quantized linear and the project's only custom gradients.

Forward   y  = round(x * s_x) @ round(w * s_w)^T / (s_x * s_w)
Backward  dx = round(g * s_g) @ round(w * s_w)   / (s_g * s_w)
          dw = round(g * s_g)^T @ round(x * s_x) / (s_g * s_x)

The rounded values themselves are multiplied and the product is divided by the scales, as hardware would do
(`qat.quant.matmul`). The straight-through estimator lets gradients pass through the rounding; `quant.ste=masked` stops
them where a value was beyond the target. To save memory, activations wait for the backward pass as 8-bit codes; so do
weights on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from qat.config import QuantConfig
from qat.quant.formats import FORMATS, TOLERANCE
from qat.quant.kernels import dispatch, lookup
from qat.quant.matmul import Matmul, Rounded
from qat.quant.scaling import ScaleBank
from qat.utils import distributed


class Quantizer:
    """Round one role (activation, weight or gradient) of one linear with its scale from the bank.

    index: of the tensor in the bank; None: `cfg` does not round this role.
    """

    def __init__(self, bank: ScaleBank, index: int | None, role: str, cfg: QuantConfig):
        self.bank, self.index, self.role, self.cfg = bank, index, role, cfg
        self.enabled, self.target = index is not None, getattr(cfg, f"target_{role}")
        self.rounding = cfg.rounding if role == "gradient" else "nearest"
        # Compiled steps on a GPU round by this table, in the same kernel that computes `x`.
        by_table = self.enabled and self.rounding == "nearest"
        self.table = dispatch.table(bank.scale.device, cfg.format, cfg.overflow, self.target) if by_table else None
        self.observer = None  # `qat.train.tensor_stats` attaches one: it is called with (this quantizer, x, scale)

    def __call__(self, x: torch.Tensor, output: str = "values") -> Rounded:
        """Round `x`, BF16 or FP32 in any shape, and record its amax. output: "values", or "codes" for both."""
        x = x.detach()
        if not self.enabled:
            return Rounded(x)
        c, scale, slot = self.cfg, self.bank.scale_of(self.index, x), self.bank.amax_slot(self.index)
        output = "e4m3" if c.gemm == "fp8" else output
        if self.table is not None and torch.compiler.is_compiling():
            values, codes = lookup.quantize(x, scale, slot, self.table, output)
        else:
            values, codes = dispatch.quantize(x, scale, slot, c.format, c.overflow, self.target, output, self.rounding)
        if self.observer is not None:
            self.observer(self, x, scale)
        mask = ~self.clipped(x.float() * scale) if self.masks else None
        return Rounded(None if output == "e4m3" else values, None if output == "values" else codes, scale, mask)

    @property
    def masks(self) -> bool:
        """Return whether to stop gradients where `x` is clipped: by its own amax nothing is; `_LearnScale` does it."""
        masked = self.cfg.ste == "masked" and self.role != "gradient"
        return masked and self.bank.scaling.algo != "current" and not self.bank.learns

    def clipped(self, v: torch.Tensor) -> torch.Tensor:
        """Return where scaled values are clipped, bool in their shape: there `quant.ste=masked` stops gradients.

        With quant.overflow=clip beyond the target; with saturate beyond the format's largest value. With inf nothing is
        clipped, and masking is refused (`qat.cli.validate`).
        """
        c = self.cfg
        return v.abs() > TOLERANCE * (self.target if c.overflow == "clip" else FORMATS[c.format].largest)

    def record(self, x: torch.Tensor) -> None:
        """Record the amax of `x` without rounding it."""
        if self.enabled:
            dispatch.record_amax(x.detach(), self.bank.amax_slot(self.index))

    def learn(self, x: torch.Tensor, dtype: torch.dtype, features: int) -> torch.Tensor:
        """Return `x`, whose gradient also tells how its scale should change.

        dtype: in which `x` is rounded. features: N in LSQ's gradient factor.
        """
        return _LearnScale.apply(x, self, dtype, (features * self.target) ** -0.5) if self.enabled else x


class Input:
    """Round the input of a linear. Linears that read the same tensor share one `Input`, which rounds it once for all.

    users: how many linears share it. The rounded tensor is held until all of them have read it. Nothing of it outlives
    the forward pass of a block, so `torch.compile` traces this Python state without a graph break.
    """

    def __init__(self, quantizer: Quantizer):
        self.quantizer, self.users = quantizer, 1
        self._source, self._output, self._reads_left, self._rounded = None, "", 0, None

    def __call__(self, x: torch.Tensor, dtype: torch.dtype) -> Rounded:
        """Round `x`, of any shape, in `dtype`."""
        output = "codes" if torch.is_grad_enabled() else "values"  # codes are for the backward pass
        if self.users == 1:
            return self.quantizer(x.to(dtype), output)
        if self._source is not x or self._output != output:
            self._source, self._output, self._reads_left = x, output, self.users
            self._rounded = self.quantizer(x.to(dtype), output)
        rounded, self._reads_left = self._rounded, self._reads_left - 1
        if not self._reads_left:
            self._source = self._rounded = None
        return rounded


class _QuantizedMatmul(torch.autograd.Function):
    """Multiply x [..., in] by weight [out, in] to [..., out]; product and both gradients use rounded operands.

    `x` and `weight` are arguments only to receive their gradients. The products use `rounded`: the fields of two
    `Rounded`, of `x` and of the packed weight.
    """

    @staticmethod
    def forward(ctx, x, weight, matmul: Matmul, round_gradient: Quantizer, *rounded):
        a, w = Rounded(*rounded[:4]), Rounded(*rounded[4:])
        ctx.save_for_backward(*a.packed(), *w)
        ctx.matmul, ctx.round_gradient, ctx.shape, ctx.dtype = matmul, round_gradient, x.shape, x.dtype
        y = matmul.outputs(a.rows(), w, x.dtype)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, gradient):
        saved = ctx.saved_tensors  # read once: with activation checkpointing a second read is an error
        a, w = Rounded(*saved[:4]), Rounded(*saved[4:])
        matmul, dtype = ctx.matmul, ctx.dtype
        g = ctx.round_gradient(gradient.reshape(-1, gradient.shape[-1]))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = matmul.input_gradients(g, w, dtype).view(ctx.shape)
            dx = dx if a.mask is None else dx * a.mask
        if ctx.needs_input_grad[1]:
            dw = matmul.weight_gradients(g, a.rows(), dtype)
            dw = dw if w.mask is None else dw * w.mask
        return dx, dw, *(None,) * (2 + len(saved))


class _LearnScale(torch.autograd.Function):
    """The identity; its backward pass adds the derivative by the size of a step, 1 / scale, to the bank's slopes.

    With v = x * scale, d (round(v) / scale) / d (1 / scale) is round(v) - v, or where v was clipped round(v).
    factor: 1 / sqrt(N * target), by which LSQ makes slopes of large tensors comparable (arXiv 1902.08153, section 2.2).
    """

    @staticmethod
    def forward(ctx, x, quantizer, dtype, factor):
        ctx.save_for_backward(x)
        ctx.quantizer, ctx.dtype, ctx.factor = quantizer, dtype, factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        q, bank, x = ctx.quantizer, ctx.quantizer.bank, ctx.saved_tensors[0].to(ctx.dtype)
        scale = bank.scale_of(q.index, x)
        rounded, _ = dispatch.quantize(x, scale, None, q.cfg.format, q.cfg.overflow, q.target, "values")
        v = x.float() * scale
        clipped = q.clipped(v)
        change = torch.where(clipped, rounded.float(), rounded.float() - v)
        bank.slopes[q.index].add_(ctx.factor * (gradient.float() * change).sum())
        return gradient.masked_fill(clipped, 0) if q.cfg.ste == "masked" else gradient, None, None, None


class _Record(torch.autograd.Function):
    """The identity; its backward pass records the amax of the gradient."""

    @staticmethod
    def forward(ctx, y, quantizer):
        ctx.quantizer = quantizer
        return y.view_as(y)

    @staticmethod
    def backward(ctx, gradient):
        ctx.quantizer.record(gradient)
        return gradient, None


class QuantizedLinear(nn.Linear):
    """A linear that multiplies rounded operands while the bank quantizes. It shares the original's parameters.

    While the bank does not quantize, it equals `nn.Linear` bit for bit, forward and backward.
    """

    def __init__(self, linear: nn.Linear, bank: ScaleBank, quantizers: dict[str, Quantizer], matmul: Matmul):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.bank, self.quantizers, self.matmul = bank, quantizers, matmul
        self.input = Input(quantizers["activation"])
        self.rounded_weight: Rounded | None = None  # rounded ahead by `round_weights`; None: every forward pass rounds

    def share_input(self, other: QuantizedLinear) -> None:
        """Share the rounded input of another linear, which reads the same tensor."""
        self.input, self.quantizers["activation"] = other.input, other.quantizers["activation"]
        self.input.users += 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features] in the dtype that `nn.Linear` would return."""
        if not self.bank.quantizing:
            return self._unquantized(x)
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        weight = self._round_weight(dtype) if self.rounded_weight is None else self.rounded_weight
        rounded = (*self.input(x, dtype), *weight)
        x, w = x.to(dtype), self.weight
        if self.bank.learns:
            x = self.quantizers["activation"].learn(x, dtype, self.in_features)
            w = self.quantizers["weight"].learn(w, dtype, w.numel())
        y = _QuantizedMatmul.apply(x, w, self.matmul, self.quantizers["gradient"], *rounded)
        return y if self.bias is None else y + self.bias.to(dtype)

    def _round_weight(self, dtype: torch.dtype) -> Rounded:
        # In training on a CPU as codes, to save memory: decoding takes a hundredth of a product with 1,000 tokens.
        output = "codes" if self.weight.device.type == "cpu" and self.bank.recording else "values"
        return self.quantizers["weight"](self.weight.to(dtype), output).packed()

    def _unquantized(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(x, self.weight, self.bias)
        if not self.bank.recording:
            return y
        self.quantizers["activation"].record(x)
        self.quantizers["weight"].record(self.weight)
        return _Record.apply(y, self.quantizers["gradient"])


@torch.no_grad()
def round_weights(linears: Iterable[QuantizedLinear], dtype: torch.dtype) -> None:
    """Round weights ahead of the forward passes, in the dtype of these. Call again when weights have changed."""
    for linear in linears:
        linear.rounded_weight = linear._round_weight(dtype)


def forget_rounded_weights(linears: Iterable[QuantizedLinear]) -> None:
    """Drop the weights rounded ahead: from now on forward passes round them."""
    for linear in linears:
        linear.rounded_weight = None


@torch.no_grad()
def draw_to_grid(linears: Iterable[QuantizedLinear], rate: float, finite: torch.Tensor) -> None:
    """Move weights towards the values that they are rounded to: w -= rate * (w - round(w * s) / s).

    This is CAGE's correction (arXiv 2510.18784, decoupled form), rate being learning rate * lambda. s: the weight's
    scale in the bank; before it has one, it is left alone. finite: 0-dim bool on the device; if false, nothing moves.
    """
    for linear in linears:
        quantizer = linear.quantizers["weight"]
        if quantizer.index in linear.bank.unseen:
            continue
        weight, scale, c = distributed.local(linear.weight), linear.bank.scales[quantizer.index], quantizer.cfg
        wide = weight.float()
        rounded, _ = dispatch.quantize(wide, scale, None, c.format, c.overflow, quantizer.target, "values")
        weight.copy_(torch.where(finite, wide - rate * (wide - rounded / scale), wide))
