"""What training loss does not show: precision tiers, clipping, underflow, SQNR, and updates that change nothing."""

from __future__ import annotations

import contextlib

import torch

from qat.config import Config
from qat.quant.convert import quantized_linears
from qat.quant.kernels import dispatch
from qat.quant.scaling import to_scale
from qat.utils import distributed, environment

TIERS = (3, 2, 1, 0)  # mantissa bits


class TensorStats:
    """Collects statistics of every tensor that is quantized while it is attached."""

    def __init__(self, model: torch.nn.Module, bank, cfg: Config):
        self.model, self.bank, self.cfg = model, bank, cfg
        self.seen: dict[int, torch.Tensor] = {}  # index -> statistics summed over micro-batches, FP64
        self.scales: dict[int, tuple[torch.Tensor, ...]] = {}  # index -> (scale, largest amax, largest overshoot)

    @contextlib.contextmanager
    def attached(self):
        """Let every quantizer report within this context, at the cost of another pass or two over each tensor."""
        quantizers = [q for linear in quantized_linears(self.model).values() for q in linear.quantizers.values()]
        for quantizer in quantizers:
            quantizer.observer = self._observe
        try:
            yield
        finally:
            for quantizer in quantizers:
                quantizer.observer = None

    def _observe(self, index: int, x: torch.Tensor, scale: torch.Tensor) -> None:
        target, q = self.bank.targets[index].item(), self.cfg.quant
        amax = dispatch.amax(x)
        self.seen[index] = self.seen.get(index, 0) + dispatch.statistics(x, scale, q.format, q.overflow, target)
        overshoot = amax * scale / target
        _, largest, worst = self.scales.get(index, (scale, amax, overshoot))
        self.scales[index] = scale.clone(), torch.maximum(largest, amax), torch.maximum(worst, overshoot)

    def rows(self, step: int) -> list[dict]:
        """Return one row a tensor: layer, role, amax, scale, overshoot, share of elements in each tier (of those not
        zero), beyond the target, underflowed (nonzero made zero), inexact with quant.gemm=fp8, and the
        signal-to-quantization-noise ratio in dB."""
        rows, seen = [], sorted(self.seen)
        if not seen:
            return rows
        totals = distributed.all_reduce_sum(torch.stack([self.seen[index] for index in seen]))
        worst = distributed.all_reduce_max(torch.stack([torch.stack(self.scales[index]) for index in seen]))
        for index, sums, (scale, amax, overshoot) in zip(seen, totals, worst.tolist(), strict=True):
            layer, _, role = self.bank.names[index].rpartition("/")
            count, *tiers, beyond, underflow, inexact, signal, noise = sums.tolist()
            share = {f"tier{bits}": n / max(count, 1) for bits, n in zip(TIERS, tiers, strict=True)}
            rows.append(
                {"step": step, "layer": layer, "role": role, "amax": amax, "scale": scale, "overshoot": overshoot}
                | share
                | {"beyond": beyond / max(count, 1), "underflow": underflow / max(count, 1)}
                | {"inexact_in_fp8": inexact / max(count, 1)}
                | {"sqnr_db": _decibel(signal, noise)}
            )
        return rows


def _decibel(signal: float, noise: float) -> float | None:
    """Return decibels; None when nothing was lost or there was no signal: JSON has no infinity."""
    if signal <= 0 or noise <= 0:
        return None
    return 10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64)).item()


class UpdateStats:
    """Share of weights that one optimizer step changed: as stored, in BF16, and on the quantization grid.

    Looks at the weights of the quantized linears, or of all linears in a BF16 run. Made before the step; `row` after.
    """

    def __init__(self, model: torch.nn.Module, bank, cfg: Config):
        self.format = cfg.quant.format if bank is not None else None
        linears = quantized_linears(model) or {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.weights = {name: linear.weight for name, linear in linears.items()}
        self.target = torch.tensor(cfg.quant.target_weight)
        # On the CPU of the first rank: a GPU may have no room for a second model during the step.
        self.before = {name: self._copied(weight) for name, weight in self.weights.items()}

    @staticmethod
    def _copied(weight: torch.Tensor) -> torch.Tensor | None:
        whole = distributed.full_tensor(weight).detach()
        return whole.to("cpu", copy=True) if environment.is_main_process() else None

    def row(self, step: int) -> dict:
        """Return {"step", "updated": {"stored", "bf16", "format" (None in BF16 runs)}}, shares of all weights."""
        changed, total = torch.zeros(3, dtype=torch.float64), 0
        for name, weight in self.weights.items():
            now = distributed.full_tensor(weight).detach()
            if environment.is_main_process():
                views = self._views(now, self.before[name].to(now.device))
                changed[: len(views)] += torch.stack([(a != b).sum().double().cpu() for a, b in views])
                total += weight.numel()
        stored, bf16, rounded = distributed.broadcast_object((changed / max(total, 1)).tolist())
        return {"step": step, "updated": {"stored": stored, "bf16": bf16, "format": rounded if self.format else None}}

    def _views(self, now: torch.Tensor, before: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return a weight after and before the step: as stored, in BF16, on the grid."""
        views = [(now, before), (now.bfloat16(), before.bfloat16())]
        if self.format is None:
            return views
        # The grid at the weight's own amax, whatever the bank's scale is before the first quantized step.
        scale = to_scale(dispatch.amax(before), self.target.to(before.device), torch.ones((), device=before.device))
        rounding = (scale, None, self.format, "saturate", 0.0, "values")
        return [*views, tuple(dispatch.quantize(each, *rounding)[0] for each in (now, before))]
