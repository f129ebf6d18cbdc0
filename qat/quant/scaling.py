"""Tensor scaling: amax history -> predicted amax -> scale, for all quantized tensors of a model at once.

    scale = target / predicted_amax                                   (paper, section 3: s = max_val / amax_hat)

A rule (`qat.quant.rules`) predicts from the amaxes of earlier steps. A tensor without a history scales by its own amax.
With `scaling.guard`, every predicted amax is 2^guard times as large, so that a tensor may grow until its scale changes.
An amax of 0, Inf or NaN is no use for a scale: the history repeats its previous entry instead.

Where a rule learns (LSQ, arXiv 1902.08153), scales of weights and activations leave that prediction once they have one:

    1 / scale -= scaling.lr * d objective / d (1 / scale)
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch

from qat.config import ScalingConfig
from qat.errors import UserError
from qat.quant.kernels import dispatch
from qat.quant.rules import RULES
from qat.utils import distributed

FP32_MAX = torch.finfo(torch.float32).max


def to_scale(amax: torch.Tensor, target: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Return the scales of amaxes, element-wise in FP32, in the cases of Transformer Engine.

    A normal amax gives target / amax. One so small that this overflows gives the largest FP32 number. 0, Inf and NaN
    keep the previous scale.
    """
    usable = (amax > 0) & amax.isfinite()
    scale = (target / amax).clamp(max=FP32_MAX)
    return torch.where(usable, scale, previous)


class ScaleBank:
    """The scale state of all quantized tensors of a model, on the device.

    names: `<linear>/<role>` of each tensor. targets: what each predicted amax is mapped to. settle_steps: steps run as
    most_recent, with an update a tick, before the rule of `scaling` takes over.

    amaxes: FP32 [1] for each tensor, the largest absolute value recorded since the last tick; a NaN stays. They are
        separate tensors so that a compiled kernel writes one without copying the others.
    slopes: like `amaxes`, derivatives of the objective by 1 / scale, summed up since a tick; None: nothing learns.
    history: FP32 [entries, tensors], a ring buffer. written: int64 [1], how many entries were ever written to it.
    scale: FP32 [tensors]; scales: its elements, as views.
    quantizing: whether quantizers round now. recording: whether they record amaxes now.
    unseen: indices of tensors without a history, on the host; empty after the first steps, which saves a device sync.
    updates: ticks since quantization began.

    Only `tick` changes history and scales. The training step calls it, and PTQ calibration once on a bank of its own.
    On a bank of its own, `replay` does what ticks did.
    """

    def __init__(
        self,
        names: list[str],
        targets: list[float],
        scaling: ScalingConfig,
        settle_steps: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.names, self.scaling, self.settle_steps = names, scaling, settle_steps
        self.targets = torch.tensor(targets, dtype=torch.float32, device=device)
        self.amax_targets = self.targets / 2**scaling.guard  # what an amax itself is mapped to
        self.amaxes = [torch.zeros(1, device=device) for _ in names]
        self.slopes = [torch.zeros(1, device=device) for _ in names] if RULES[scaling.algo].learns else None
        self.history = torch.zeros(RULES[scaling.algo].length(scaling), len(names), device=device)
        self.written = torch.zeros(1, dtype=torch.int64, device=device)
        self.scale = torch.ones(len(names), device=device)
        self.scales = self.scale.unbind()
        self._learned = torch.tensor([not name.endswith("/gradient") for name in names], device=device)
        self.unseen = frozenset(range(len(names)))
        self.step = self.updates = 0
        self._record_in_warmup = scaling.observe_in_warmup and not scaling.discard_after_warmup
        self.quantizing, self.recording = False, self._record_in_warmup

    def __len__(self) -> int:
        return len(self.names)

    # In the forward and backward pass -------------------------------------------------------------------------

    def scale_of(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scale of tensor `index`, which now has the values `x`: 0-dim FP32 on the device."""
        if self.scaling.algo == "current" or index in self.unseen:
            return to_scale(dispatch.amax(x), self.amax_targets[index], self.scales[index])
        return self.scales[index]

    def amax_slot(self, index: int) -> torch.Tensor | None:
        """Return where to record the amax of tensor `index`, FP32 [1]; None while nothing is recorded."""
        return self.amaxes[index] if self.recording else None

    @property
    def learns(self) -> bool:
        """Return whether quantized linears add to `slopes` now."""
        return self.slopes is not None and self.recording

    # In the training step -------------------------------------------------------------------------------------

    def begin_step(self, step: int, first_quantized_step: int) -> None:
        """Begin a step (1-based): decide whether it quantizes and records. A warmup records only what is to be used."""
        self.step, self.quantizing = step, step >= first_quantized_step
        self.recording = self.quantizing or self._record_in_warmup

    def tick(self, finite: torch.Tensor | None = None) -> torch.Tensor:
        """Write the recorded amaxes of all ranks into the history and derive the next scales.

        finite: as `advance`. Returns FP32 [2, tensors]: the amaxes, 0 where nothing was recorded, and the overshoot.
        """
        if not self.recording:
            return self.scale.new_zeros(2, len(self))
        amax = self._take_amaxes()
        return torch.stack([amax, self.advance(amax, finite)])

    def advance(self, amax: torch.Tensor, finite: torch.Tensor | None = None) -> torch.Tensor:
        """Write the amaxes of a tick, FP32 [tensors], into the history and derive the next scales.

        finite: 0-dim bool on the device; if false, history and scales stay as they are.
        Returns the overshoot, amax now / predicted amax, FP32 [tensors]: 0 where nothing was recorded, 2^-guard where a
        tensor scaled by its own amax. Above 1 values are beyond the target.
        """
        overshoot = self._overshoot(amax)
        advance = torch.ones_like(self.written) if finite is None else finite.to(self.written.dtype)
        unseen = self._is_unseen() if self.unseen else None
        self._write(amax, advance)
        self._update_scale(advance, unseen, self._take_slopes())
        self._update_unseen()
        self.updates += self.quantizing
        return overshoot

    def _take_amaxes(self) -> torch.Tensor:
        """Return and reset the recorded amaxes, FP32 [tensors]: the largest over all ranks, or with sync=none ours."""
        amax = torch.cat(self.amaxes)
        torch._foreach_zero_(self.amaxes)
        return distributed.all_reduce_max(amax) if self.scaling.sync == "max" else amax

    def _take_slopes(self) -> torch.Tensor | None:
        """Return and reset the slopes, FP32 [tensors]: the sum over all ranks, or with sync=none ours."""
        if self.slopes is None:
            return None
        slopes = torch.cat(self.slopes)
        torch._foreach_zero_(self.slopes)
        return distributed.all_reduce_sum(slopes) if self.scaling.sync == "max" else slopes

    def _overshoot(self, amax: torch.Tensor) -> torch.Tensor:
        own = (amax > 0).float() / 2**self.scaling.guard
        if self.scaling.algo == "current":
            return own
        over = amax * self.scale / self.targets
        return torch.where(self._is_unseen(), own, over) if self.unseen else over

    def _is_unseen(self) -> torch.Tensor:
        """Return which tensors have no history yet, bool [tensors]."""
        return self.history.amax(0) == 0

    def _update_unseen(self) -> None:
        if self.unseen:  # otherwise the host need not wait for the device
            self.unseen = frozenset(self._is_unseen().nonzero().flatten().tolist())

    def _write(self, amax: torch.Tensor, advance: torch.Tensor) -> None:
        """Write one entry to the ring and move on by `advance`; if that is 0, the ring stays as it is."""
        place = self.written % len(self.history)
        # An Inf or NaN would stay in a window of 64 for 64 steps, and the 0 of an unused tensor is no prediction.
        previous = self.history.index_select(0, (place - 1) % len(self.history))
        entry = torch.where(amax.isfinite() & (amax > 0), amax, previous)
        oldest = self.history.index_select(0, place)
        self.history.index_copy_(0, place, torch.where(advance > 0, entry, oldest))
        self.written.add_(advance)

    def _update_scale(self, advance: torch.Tensor, unseen: torch.Tensor | None, slopes: torch.Tensor | None) -> None:
        """Derive the scales from the history, unless they are held until `scaling.update_every` ticks have passed.

        unseen: bool [tensors], those that had no history until now, which are never held; None: there are none.
        slopes: by which those that have a history and a slope are learned; None: nothing is.
        """
        settling = self.step <= self.settle_steps
        held = self.updates % self.scaling.update_every and not settling  # skipped steps count too
        if held and unseen is None:
            return
        rule = RULES["most_recent" if settling else self.scaling.algo]
        age = torch.arange(len(self.history), device=self.history.device)
        newest_first = self.history[(self.written - 1 - age) % len(self.history)]
        predicted = rule.predict(newest_first, self.scaling)
        changes = (advance > 0) & unseen if held else advance > 0
        scale = to_scale(predicted, self.amax_targets, self.scale)
        if slopes is not None and self.quantizing and not settling:
            learned = self._learned if unseen is None else self._learned & ~unseen
            scale = torch.where(learned, self._follow(slopes), scale)
        self.scale.copy_(torch.where(changes, scale, self.scale))

    def _follow(self, slopes: torch.Tensor) -> torch.Tensor:
        """Return the scales after a step of gradient descent on 1 / scale, which at most halves; skip slopes of NaN."""
        size = self.scale.reciprocal()
        scale = torch.maximum(size - self.scaling.lr * slopes, size / 2).reciprocal()
        return torch.where(slopes.isfinite(), scale.clamp(max=FP32_MAX), self.scale)

    # Outside of the training step ------------------------------------------------------------------------------

    def replay(self, amaxes: torch.Tensor, first_quantized_step: int) -> torch.Tensor:
        """Tick, on this new bank, as a run with these amaxes would have, step by step from the first.

        amaxes: FP32 [steps, tensors] (`qat.runs.trace`). Returns the overshoot of every step, in the same shape.
        """
        overshoot = torch.zeros_like(amaxes)
        for step, amax in enumerate(amaxes, start=1):
            self.begin_step(step, first_quantized_step)
            if self.recording:
                overshoot[step - 1] = self.advance(amax, ~amax.isnan().all())
        return overshoot

    def set_scales(self, scales: Mapping[str, torch.Tensor]) -> None:
        """Set the scales of tensors by name, where the bank has them: what PTQ found."""
        index = {i: scales[name] for i, name in enumerate(self.names) if name in scales}
        for i, scale in index.items():
            self.scale[i] = scale
        self.unseen -= index.keys()

    def freeze(self) -> None:
        """Quantize with the scales as they are and record nothing, until a step begins."""
        self.quantizing, self.recording = True, False

    @contextlib.contextmanager
    def borrowing(self, other: ScaleBank | None):
        """Quantize with the scales of another bank, or with None not at all, and record nothing within this context."""
        fields = ("scaling", "amax_targets", "unseen", "quantizing", "recording")
        before, scale = {field: getattr(self, field) for field in fields}, self.scale.clone()
        self.quantizing, self.recording = other is not None, False
        if other is not None:
            self.scaling, self.amax_targets, self.unseen = other.scaling, other.amax_targets, other.unseen
            self.scale.copy_(other.scale)
        try:
            yield
        finally:
            vars(self).update(before)
            self.scale.copy_(scale)

    @contextlib.contextmanager
    def paused(self):
        """Record nothing within this context."""
        recording, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = recording

    # In a checkpoint ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return history, scale and counters, int64 [3]: entries in use, the next entry's place, and updates."""
        written, entries = self.written[0], len(self.history)
        counters = [written.clamp(max=entries), written % entries, torch.full_like(written, self.updates)]
        return {"history": self.history, "scale": self.scale, "counters": torch.stack(counters)}

    def load_state_dict(self, state: dict[str, torch.Tensor], names: list[str] | None = None) -> None:
        """Restore a saved bank. names: of the saved tensors, where known. Errors: UserError for other tensors."""
        for key, own in self.state_dict().items():
            saved = state.get(key)
            if saved is None or (saved.dtype, saved.shape) != (own.dtype, own.shape):
                raise UserError(f"the saved scales have no {key} of {list(own.shape)} {own.dtype}")
        if names is not None and names != self.names:
            first = next(pair for pair in zip(names, self.names, strict=True) if pair[0] != pair[1])
            raise UserError(f"the saved scales are of other tensors: {first[0]} where this run has {first[1]}")
        self.history.copy_(state["history"])
        self.scale.copy_(state["scale"])
        filled, position, self.updates = state["counters"].tolist()
        self.written.fill_(filled if filled < len(self.history) else filled + position)
        self.unseen = frozenset(range(len(self)))
        self._update_unseen()
