"""Measure what training loss does not show: precision tiers, clipping, underflow, SQNR, and lost updates."""

from __future__ import annotations

import contextlib
import math

import torch

from qat.quant.convert import quantized_linears
from qat.quant.kernels import dispatch
from qat.quant.linear import Quantizer
from qat.quant.scaling import to_scale
from qat.utils import distributed, environment

TIERS = (3, 2, 1, 0)  # mantissa bits


class TensorStats:
    """Collect statistics of every tensor that is quantized while this is attached."""

    def __init__(self, model: torch.nn.Module):
        self.quantizers = [q for linear in quantized_linears(model).values() for q in linear.quantizers.values()]
        self.sums: dict[int, torch.Tensor] = {}  # index -> statistics summed over micro-batches, FP64
        self.scales: dict[int, tuple[torch.Tensor, ...]] = {}  # index -> (scale, largest amax, largest overshoot)

    @contextlib.contextmanager
    def attached(self):
        """Observe every quantizer within this context, at the cost of another pass or two over each tensor."""
        for quantizer in self.quantizers:
            quantizer.observer = self._observe
        try:
            yield
        finally:
            for quantizer in self.quantizers:
                quantizer.observer = None

    def _observe(self, quantizer: Quantizer, x: torch.Tensor, scale: torch.Tensor) -> None:
        q, index, amax = quantizer, quantizer.index, dispatch.amax(x)
        statistics = dispatch.statistics(x, scale, q.cfg.format, q.cfg.overflow, q.target, q.rounding)
        self.sums[index] = self.sums.get(index, 0) + statistics
        overshoot = amax * scale / q.target
        _, max_amax, max_overshoot = self.scales.get(index, (scale, amax, overshoot))
        self.scales[index] = scale.clone(), torch.maximum(max_amax, amax), torch.maximum(max_overshoot, overshoot)

    def rows(self, step: int) -> list[dict]:
        """Return one row for each tensor: layer, role, amax, scale, overshoot, shares of its nonzero elements, SQNR.

        The shares are of elements in each tier, beyond the target, made zero (underflow), and inexact with
        quant.gemm=fp8. SQNR is the signal-to-quantization-noise ratio in dB.
        """
        rows, indices = [], sorted(self.sums)
        if not indices:
            return rows
        totals = distributed.all_reduce_sum(torch.stack([self.sums[index] for index in indices]))
        largest = distributed.all_reduce_max(torch.stack([torch.stack(self.scales[index]) for index in indices]))
        for index, sums, (scale, amax, overshoot) in zip(indices, totals.tolist(), largest.tolist(), strict=True):
            layer, _, role = self.quantizers[0].bank.names[index].rpartition("/")
            nonzero, *counts, signal, noise = sums
            shares = (count / max(nonzero, 1) for count in counts)
            names = (*(f"tier{bits}" for bits in TIERS), "beyond", "underflow", "inexact_in_fp8")
            rows.append(
                {"step": step, "layer": layer, "role": role, "amax": amax, "scale": scale, "overshoot": overshoot}
                | dict(zip(names, shares, strict=True))
                | {"sqnr_db": _decibel(signal, noise)}
            )
        return rows


def _decibel(signal: float, noise: float) -> float | None:
    """Return the ratio in decibels; None unless both are positive and finite."""
    if not (0 < signal < math.inf and 0 < noise < math.inf):  # JSON has no infinity
        return None
    return 10 * (math.log10(signal) - math.log10(noise))


class UpdateStats:
    """Measure the share of weights that one optimizer step changed: as stored, in BF16, and on the quantization grid.

    The weights are those of the quantized linears, or of all linears in a BF16 run. Make this before the step, and call
    `row` after it.
    """

    def __init__(self, model: torch.nn.Module):
        quantized = quantized_linears(model)
        linears = quantized or {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        self.weights = {name: linear.weight for name, linear in linears.items()}
        self.quantizer = next((linear.quantizers["weight"] for linear in quantized.values()), None)
        # On the CPU of the first rank: a GPU may have no room for a second copy of the weights during the step.
        self.before = {name: self._copy(weight) for name, weight in self.weights.items()}

    @staticmethod
    def _copy(weight: torch.Tensor) -> torch.Tensor | None:
        whole = distributed.full_tensor(weight).detach()
        return whole.to("cpu", copy=True) if environment.is_main_process() else None

    def row(self, step: int) -> dict:
        """Return {"step", "updated": {"stored", "bf16", "format" (None in BF16 runs)}}: shares of all weights."""
        changed, total = torch.zeros(3, dtype=torch.float64), 0
        for name, weight in self.weights.items():
            now = distributed.full_tensor(weight).detach()
            if environment.is_main_process():
                views = self._views(now, self.before[name].to(now.device))
                changed[: len(views)] += torch.stack([(a != b).sum().double().cpu() for a, b in views])
                total += weight.numel()
        stored, bf16, rounded = distributed.broadcast_object((changed / max(total, 1)).tolist())
        rounded = rounded if self.quantizer else None
        return {"step": step, "updated": {"stored": stored, "bf16": bf16, "format": rounded}}

    def _views(self, now: torch.Tensor, before: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return pairs of a weight after and before the step: as stored, in BF16, on the quantization grid."""
        views = [(now, before), (now.bfloat16(), before.bfloat16())]
        if self.quantizer is None:
            return views
        # With a scale from the weight's own amax: the bank has none before the first quantized step.
        amax, target = dispatch.amax(before), torch.tensor(self.quantizer.target, device=before.device)
        scale = to_scale(amax, target, torch.ones_like(amax))
        rounding = (scale, None, self.quantizer.cfg.format, "saturate", 0.0, "values")
        return [*views, tuple(dispatch.quantize(weight, *rounding)[0] for weight in (now, before))]
