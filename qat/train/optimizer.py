"""AdamW with moments that take less memory than FP32: in BF16, or in HiF8 and FP16.

`optim.moments=hif8` is FP8-LM's arrangement (arXiv 2310.18313, section 3.2): the first moment in 8 bits, the second in
FP16, both with a scale of their own for every parameter. The second moment stays in 16 bits because with beta2 = 0.95 a
step takes at most 5 % off it: of HiF8's neighbours, 6 to 12 % apart where it is finest, some would never be left, and
the learning rate of that weight would never recover. (MindSpeed's HiF8 moments have the second in HiF8, too, to 224.)
The first moment forgets 10 % a step, and small values of HiF8 lie 12 to 50 % apart: a value whose decay is rounded away
takes the next one below instead, or the second moment would shrink under it and the weight would run away.

torchao's low-bit optimizers would not do: they cannot skip a step on the device, compile every update, which on a CPU
needs a C++ compiler, and take another format only by a private class.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.optim.adamw import adamw

from qat.config import OptimConfig
from qat.quant import hif8
from qat.quant.kernels import dispatch
from qat.quant.scaling import to_scale
from qat.utils.distributed import local

_TARGETS = 15.0, 2.0**15  # what the largest value of a moment is mapped to: in HiF8, in FP16
_LAST = 2.0**-15  # below it HiF8 has one value an octave


def make(parameters: Iterable[torch.nn.Parameter], cfg: OptimConfig) -> torch.optim.AdamW:
    """Return the optimizer of a run. Weight decay acts on every parameter, norms too, as in the released code."""
    options = {"lr": cfg.lr, "betas": (cfg.beta1, cfg.beta2), "eps": cfg.eps, "weight_decay": cfg.weight_decay}
    kind = {"fp32": torch.optim.AdamW, "bf16": BF16AdamW, "hif8": HiF8AdamW}[cfg.moments]
    return kind(parameters, **options, fused=True)


def empty_state(optimizer: torch.optim.AdamW, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter's state before the first step."""
    step = torch.zeros((), device=parameter.device)
    if isinstance(optimizer, BF16AdamW):
        return {"step": step} | optimizer.empty(parameter)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


class BF16AdamW(torch.optim.AdamW):
    """AdamW with moments in BF16. An update is computed by PyTorch's fused kernel on FP32 copies of them."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Update every parameter that has a gradient, unless the attribute `found_inf`, FP32 on the device, is 1."""
        skipped = self.found_inf > 0
        for group in self.param_groups:
            options = {key: group[key] for key in ("lr", "weight_decay", "eps", "amsgrad", "maximize", "fused")}
            options |= dict(zip(("beta1", "beta2"), group["betas"], strict=True)) | {"found_inf": self.found_inf}
            for parameter in (parameter for parameter in group["params"] if parameter.grad is not None):
                if not self.state[parameter]:
                    self.state[parameter] = empty_state(self, parameter)
                state = {key: local(tensor) for key, tensor in self.state[parameter].items()}
                first, second = self.unpacked(state)
                adamw([local(parameter)], [local(parameter.grad)], [first], [second], [], [state["step"]], **options)
                for key, tensor in self.packed(first, second, state).items():
                    state[key].copy_(torch.where(skipped, state[key], tensor))

    def empty(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the moments of a parameter before the first step, sharded as it is."""
        return {key: torch.zeros_like(parameter, dtype=torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}

    def unpacked(self, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both moments in FP32."""
        return state["exp_avg"].float(), state["exp_avg_sq"].float()

    def packed(self, first: torch.Tensor, second: torch.Tensor, state: dict) -> dict[str, torch.Tensor]:
        """Return both moments as they are held; state: as they were until now."""
        return {"exp_avg": first.bfloat16(), "exp_avg_sq": second.bfloat16()}


class HiF8AdamW(BF16AdamW):
    """AdamW with the first moment in HiF8, uint8 codes, and the second in FP16; scales: FP32 [2], of both."""

    def empty(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        dtypes = {"exp_avg": torch.uint8, "exp_avg_sq": torch.float16}
        moments = {key: torch.zeros_like(parameter, dtype=dtype) for key, dtype in dtypes.items()}
        return moments | {"scales": torch.ones(2, device=parameter.device)}

    def unpacked(self, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        first = dispatch.decode(state["exp_avg"], "hif8", torch.float32)
        return first / state["scales"][0], state["exp_avg_sq"].float() / state["scales"][1]

    def packed(self, first: torch.Tensor, second: torch.Tensor, state: dict) -> dict[str, torch.Tensor]:
        amaxes = torch.stack([dispatch.amax(first), dispatch.amax(second)])
        targets = torch.stack([amaxes.new_full((), target) for target in _TARGETS])  # a copy from the host would wait
        scales = to_scale(amaxes, targets, state["scales"])
        before, now = (moment.abs() * scales[0] for moment in (self.unpacked(state)[0], first))
        values, _ = dispatch.quantize(first, scales[0], None, "hif8", "clip", _TARGETS[0], "values")
        undone = (now < before) & (values.abs() > (now + before) / 2)
        below = hif8.fake_quantize(0.8 * values)  # the next value, or at most one further
        below = below.where(values.abs() > _LAST, 0.0)
        codes = hif8.encode(torch.where(undone, below, values))
        return {"exp_avg": codes, "exp_avg_sq": (second * scales[1]).half(), "scales": scales}
