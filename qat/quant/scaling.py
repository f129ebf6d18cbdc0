"""Tensor scaling: amax history -> predicted amax -> scale, for all quantized tensors of a model at once.

    scale = target / predicted_amax                                   (paper, section 3: s = max_val / amax_hat)

The rule that predicts (`qat.quant.rules`) reads the amaxes of earlier steps. A tensor without a history scales by its
own amax, and its scale is not held. An amax of 0, Inf or NaN says nothing
about a tensor: its previous entry stands in for it.
"""

from __future__ import annotations

import contextlib

import torch

from qat.config import ScalingConfig
from qat.errors import UserError
from qat.quant.kernels import dispatch
from qat.quant.rules import RULES
from qat.utils import distributed

FP32_MAX = torch.finfo(torch.float32).max


def to_scale(amax: torch.Tensor, target: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Return scales for amaxes, element-wise in FP32, by four cases as in Transformer Engine: a normal amax gives
    target / amax; an amax so small that this overflows gives the largest FP32 number; 0, Inf and NaN say nothing about
    the tensor and keep the previous scale."""
    usable = (amax > 0) & amax.isfinite()
    scale = (target / amax).clamp(max=FP32_MAX)
    return torch.where(usable, scale, previous)


class ScaleBank:
    """The scale state of all quantized tensors of a model, on the device.

    names: `<linear>/<role>` of each tensor. targets: what each predicted amax is mapped to. settle_steps: steps run as
    most_recent, with an update a tick, before the rule of `scaling` takes over.

    amaxes: FP32 [1] a tensor, the largest absolute value recorded since the last tick; NaN stays. Each is a tensor of
        its own, so that a compiled kernel writes it without copying the others.
    history: FP32 [entries, tensors], a ring. written: int64 [1], entries that were ever written to it.
    scale: FP32 [tensors]; scales: its elements, as views.
    quantizing: whether quantizers round now. recording: whether they record amaxes now.
    unseen: tensors without a history, by index; kept on the host, which reads it back only while there are any.
    updates: ticks since quantization began.

    Only `tick` changes history and scales. A training step calls it; and so does calibration, once, on a bank that no
    step has.
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
        self.amaxes = [torch.zeros(1, device=device) for _ in names]
        self.history = torch.zeros(RULES[scaling.algo].length(scaling), len(names), device=device)
        self.written = torch.zeros(1, dtype=torch.int64, device=device)
        self.scale = torch.ones(len(names), device=device)
        self.scales = self.scale.unbind()
        self.unseen = frozenset(range(len(names)))
        self.step = self.updates = 0
        self._record_in_warmup = scaling.observe_in_warmup and not scaling.discard_after_warmup
        self.quantizing, self.recording = False, self._record_in_warmup

    def __len__(self) -> int:
        return len(self.names)

    # In the forward and backward pass -------------------------------------------------------------------------

    def scale_of(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the scale to quantize tensor `index`, of values `x`, with: 0-dim FP32 on the device."""
        if self.scaling.algo == "current" or index in self.unseen:
            return to_scale(dispatch.amax(x), self.targets[index], self.scales[index])
        return self.scales[index]

    def amax_slot(self, index: int) -> torch.Tensor | None:
        """Return where to record the amax of tensor `index`, FP32 [1]; None: nowhere."""
        return self.amaxes[index] if self.recording else None

    # In the training step -------------------------------------------------------------------------------------

    def begin_step(self, step: int, first_quantized_step: int) -> None:
        """Say which step (1-based) begins, and so whether it quantizes and records. A warmup whose history is to be
        discarded records none."""
        self.step, self.quantizing = step, step >= first_quantized_step
        self.recording = self.quantizing or self._record_in_warmup

    def tick(self, finite: torch.Tensor | None = None) -> torch.Tensor:
        """Write the recorded amaxes of all ranks into the history and derive the next scales.

        finite: 0-dim bool on the device; where it is false, history and scales stay as they are.
        Returns the overshoot, amax now / predicted amax, FP32 [tensors]: 0 where nothing was recorded, 1 where a tensor
        scaled by its own amax.
        """
        if not self.recording:
            return torch.zeros_like(self.scale)
        amax = self._take_amaxes()
        overshoot = self._overshoot(amax)
        advance = torch.ones_like(self.written) if finite is None else finite.to(self.written.dtype)
        first = self._without_history() if self.unseen else None
        self._write(amax, advance)
        self._update_scale(advance, first)
        self._look_for_unseen()
        self.updates += self.quantizing
        return overshoot

    def _take_amaxes(self) -> torch.Tensor:
        """Return what was recorded, FP32 [tensors], the largest of all ranks unless each keeps its own; and forget
        it."""
        amax = torch.cat(self.amaxes)
        torch._foreach_zero_(self.amaxes)
        return distributed.all_reduce_max(amax) if self.scaling.sync == "max" else amax

    def _overshoot(self, amax: torch.Tensor) -> torch.Tensor:
        own = (amax > 0).float()
        if self.scaling.algo == "current":
            return own
        over = amax * self.scale / self.targets
        return torch.where(self._without_history(), own, over) if self.unseen else over

    def _without_history(self) -> torch.Tensor:
        """Return whether nothing was seen yet of each tensor, bool [tensors]."""
        return self.history.amax(0) == 0

    def _look_for_unseen(self) -> None:
        if self.unseen:  # else the host need not wait for the device
            self.unseen = frozenset(self._without_history().nonzero().flatten().tolist())

    def _write(self, amax: torch.Tensor, advance: torch.Tensor) -> None:
        """Write one entry and move on by `advance`, 0 or 1. Not moving on leaves no trace: the entry is out of use, or
        in a full ring the oldest, which then stays as it is."""
        place = self.written % len(self.history)
        # An Inf or NaN would sit in a window of 64 for 64 steps, and the 0 of an idle tensor is no prediction.
        previous = self.history.index_select(0, (place - 1) % len(self.history))
        entry = torch.where(amax.isfinite() & (amax > 0), amax, previous)
        oldest = self.history.index_select(0, place)
        self.history.index_copy_(0, place, torch.where(advance > 0, entry, oldest))
        self.written.add_(advance)

    def _update_scale(self, advance: torch.Tensor, first: torch.Tensor | None) -> None:
        """Derive the scales from the history. first: bool [tensors], those that had none, and whose scale is not held;
        None when all had."""
        settling = self.step <= self.settle_steps
        held = self.updates % self.scaling.update_every and not settling  # a skipped step counts, too
        if held and first is None:
            return
        rule = RULES["most_recent" if settling else self.scaling.algo]
        age = torch.arange(len(self.history), device=self.history.device)
        newest_first = self.history[(self.written - 1 - age) % len(self.history)]
        predicted = rule.predict(newest_first, self.scaling)
        changes = (advance > 0) & first if held else advance > 0
        self.scale.copy_(torch.where(changes, to_scale(predicted, self.targets, self.scale), self.scale))

    # Outside of it --------------------------------------------------------------------------------------------

    def freeze(self) -> None:
        """Quantize with the scales as they are and record nothing, until a step begins."""
        self.quantizing, self.recording = True, False

    @contextlib.contextmanager
    def paused(self):
        """Record nothing within this context; what is quantized stays quantized."""
        recording, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = recording

    # In a checkpoint ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return history, scale and, as int64 [3], entries in use, the place of the next one, and updates."""
        written, entries = self.written[0], len(self.history)
        counters = [written.clamp(max=entries), written % entries, torch.full_like(written, self.updates)]
        return {"history": self.history, "scale": self.scale, "counters": torch.stack(counters)}

    def load_state_dict(self, state: dict[str, torch.Tensor], names: list[str] | None = None) -> None:
        """Restore a saved bank: exactly, or from another window its newest entries. names: those of its tensors, where
        they are known. Errors: UserError when it belongs to other tensors or holds what no bank does."""
        self._refuse(state, names)
        history, (filled, position, updates) = state["history"], state["counters"].tolist()
        window = len(history)
        if window != len(self.history):
            kept = min(filled, len(self.history))
            print(f"  amax history of window {window}: the newest {kept} of {filled} entries are kept", flush=True)
            oldest_first = history[(position - kept + torch.arange(kept)) % window]
            history = torch.zeros(self.history.shape)
            history[:kept] = oldest_first
            filled, position = kept, kept % len(self.history)
        self.history.copy_(history)
        self.scale.copy_(state["scale"])
        self.written.fill_(filled if filled < len(self.history) else filled + position)
        self.unseen, self.updates = frozenset(range(len(self))), updates
        self._look_for_unseen()

    def _refuse(self, state: dict[str, torch.Tensor], names: list[str] | None) -> None:
        wanted = self.state_dict()
        for key, ours in wanted.items():
            theirs = state.get(key)
            if theirs is None or (theirs.dtype, theirs.dim()) != (ours.dtype, ours.dim()):
                raise UserError(f"the saved scales have no {key} of this version")
        tensors = state["history"].shape[1]
        if tensors != len(self):
            raise UserError(f"the saved scales are of {tensors} tensors, this run has {len(self)}")
        if names is not None and names != self.names:
            first = next(pair for pair in zip(names, self.names, strict=True) if pair[0] != pair[1])
            raise UserError(f"the saved scales are of other tensors: {first[0]} where this run has {first[1]}")
        filled, position, ticks = state["counters"].tolist()
        if not (state["scale"].isfinite() & (state["scale"] > 0)).all() or not state["history"].isfinite().all():
            raise UserError("the saved scales are not all finite and positive")
        if not (0 <= filled <= len(state["history"]) and 0 <= position < len(state["history"]) and ticks >= 0):
            raise UserError(f"the saved scales count {filled} of {len(state['history'])} entries, the next {position}")
