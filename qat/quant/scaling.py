"""Tensor scaling: amax history -> predicted amax -> scale, for all quantized tensors of a model at once.

    scale = target / predicted_amax                                   (paper, section 3: s = max_val / amax_hat)

The rule that predicts (`qat.quant.rules`) reads the amaxes of earlier steps. A tensor without a history scales by its
own amax, and its scale is not held. An amax of 0, Inf or NaN says nothing
about a tensor: its previous entry stands in for it.
"""

from __future__ import annotations

import contextlib
from enum import Enum

import torch

from qat.config import Config
from qat.errors import UserError
from qat.quant.kernels import dispatch
from qat.quant.rules import RULES
from qat.utils import distributed

FP32_MAX = torch.finfo(torch.float32).max


def to_scale(amax: torch.Tensor, target: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """Scales for amaxes, element-wise in FP32, by four cases as in Transformer Engine: a normal amax gives
    target / amax; an amax so small that this overflows gives the largest FP32 number; 0, Inf and NaN say nothing
    about the tensor and keep the previous scale."""
    usable = (amax > 0) & amax.isfinite()
    scale = (target / amax).clamp(max=FP32_MAX)
    return torch.where(usable, scale, previous)


class Phase(Enum):
    """What the quantizers do now; set by the training step, never by a forward pass."""

    OFF = "off"  # BF16: no rounding; amax observed if the configuration says so
    ON = "on"
    FROZEN = "frozen"  # evaluation: nothing observed, so scales stay; `current` has each tensor's own even then


class ScaleBank:
    """The scale state of every quantized tensor, packed into a few FP32 tensors on the device.

    names: one `<linear>/<role>` a tensor; targets: what each predicted amax is mapped to.
    history: [entries, tensors], a ring: `filled` entries (0-dim int64) are in use, `position` ([1]) is the next one;
    observed: [tensors], the largest amax since the last commit, of tensors noted apart once `reduce` was called; scale:
    [tensors]; unseen: tensors without a history, by index.
    Only `commit` advances the history, and only the training step calls it; and calibration, once, on a bank that no
    step has (`qat.quant.calibrate`). Nothing here copies to the host once every tensor has a history.
    """

    def __init__(self, names: list[str], targets: list[float], cfg: Config, device: torch.device | str = "cpu"):
        self.names, self.cfg = names, cfg.scaling
        self.settle_steps = cfg.settle_steps
        self.observe_when_off = cfg.scaling.observe_in_warmup and not cfg.scaling.discard_after_warmup
        self.targets = torch.tensor(targets, dtype=torch.float32, device=device)
        self.history = torch.zeros(RULES[cfg.scaling.algo].length(cfg.scaling), len(names), device=device)
        self.observed = torch.zeros(len(names), device=device)
        self.scale = torch.ones(len(names), device=device)
        self.filled = torch.zeros((), dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # 0-dim would be read by the host
        self._apart_at = torch.empty(0, dtype=torch.int64)
        self.apart: dict[int, torch.Tensor] = {}  # what was observed of tensors that are noted on their own, each [1]
        self.ticks = 0  # commits since quantization began; also tells cached weights that scales may have moved
        self.unseen = frozenset(range(len(names)))
        self.phase = Phase.OFF

    def __len__(self) -> int:
        return len(self.names)

    # In the forward and backward pass -------------------------------------------------------------------------

    def scale_of(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """The scale to quantize tensor `index` with now, 0-dim FP32 on the device."""
        if self.cfg.algo == "current" or index in self.unseen:
            return to_scale(dispatch.amax(x), self.targets[index], self.scale[index])
        return self.scale[index]

    def noted(self, index: int) -> tuple[torch.Tensor | None, int]:
        """Where a quantizer notes the amax of tensor `index`, as (tensor, entry): the largest of all micro-batches
        counts, and a NaN stays."""
        if self.phase is Phase.FROZEN:
            return None, 0
        return (self.apart[index], 0) if index in self.apart else (self.observed, index)

    def note_apart(self, index: int) -> None:
        """From now on note the amax of tensor `index` in a tensor of its own, which the fused kernel of a compiled step
        can write by itself; and what is compiled apart and notes in its backward pass must not find the tensor changed
        by others since its forward pass."""
        self.apart[index] = torch.zeros_like(self.observed[:1])
        self._apart_at = torch.tensor(list(self.apart), device=self.observed.device)

    @property
    def noted_in(self) -> list[torch.Tensor]:
        """All that `noted` hands out."""
        return [self.observed, *self.apart.values()]

    @property
    def observing(self) -> bool:
        """Whether an unquantized forward or backward pass should report amaxes."""
        return self.phase is Phase.OFF and self.observe_when_off

    # In the training step -------------------------------------------------------------------------------------

    def begin_step(self, step: int, first_quantized_step: int) -> None:
        """Set the phase for a step (1-based). A warmup whose history is to be discarded has observed none."""
        self.phase = Phase.OFF if step < first_quantized_step else Phase.ON

    def reduce(self) -> None:
        """Let every rank have observed what any has, in one packed reduction; with sync=none each keeps its own."""
        if self.apart:
            apart = list(self.apart.values())
            self.observed.index_copy_(0, self._apart_at, torch.cat(apart))
            torch._foreach_zero_(apart)
        if self.cfg.sync == "max":
            distributed.all_reduce_max(self.observed)

    def overshoot(self) -> torch.Tensor:
        """amax_now / amax_predicted of every tensor observed since the last commit, [tensors] FP32: 0 where nothing
        was seen, 1 where the tensor scaled by its own amax."""
        own = (self.observed > 0).float()
        if self.cfg.algo == "current":
            return own
        over = self.observed * self.scale / self.targets
        return torch.where(self._without_history(), own, over) if self.unseen else over

    def commit(self, step: int, sound: torch.Tensor | None = None) -> None:
        """Write what was observed into the ring and derive the next scales. One call a tick, for all tensors and ranks,
        after `reduce`.

        sound: 0-dim bool on the device. Where it is false the step was spoiled, and history and scales stay.
        """
        quantizing = self.phase is Phase.ON
        if quantizing or self.observing:
            advance = torch.ones_like(self.filled) if sound is None else sound.to(self.filled.dtype)
            first = self._without_history() if self.unseen else None
            self._write(advance)
            self._update_scale(step, advance, first)
            self._look_for_unseen()
            self.ticks += quantizing
        self.observed.zero_()

    def _without_history(self) -> torch.Tensor:
        """Return whether nothing was seen yet of each tensor, bool [tensors]."""
        return self.history.amax(0) == 0

    def _look_for_unseen(self) -> None:
        if self.unseen:  # else the host need not wait for the device
            self.unseen = frozenset(self._without_history().nonzero().flatten().tolist())

    def _write(self, advance: torch.Tensor) -> None:
        """Write one entry and move on by `advance`, 0 or 1. Not moving on leaves no trace: the entry is out of use, or
        in a full ring the oldest, which then stays as it is."""
        # An Inf or NaN would sit in a window of 64 for 64 steps, and the 0 of an idle tensor is no prediction.
        previous = self.history.index_select(0, (self.position - 1) % len(self.history))
        entry = torch.where(self.observed.isfinite() & (self.observed > 0), self.observed, previous)
        kept = self.history.index_select(0, self.position)
        self.history.index_copy_(0, self.position, torch.where(advance > 0, entry, kept))
        self.position.add_(advance).remainder_(len(self.history))
        self.filled.add_(advance).clamp_(max=len(self.history))

    def _update_scale(self, step: int, advance: torch.Tensor, first: torch.Tensor | None) -> None:
        """Derive the scales from the history. first: bool [tensors], those which had none, and whose scale is not
        held; None when all had."""
        settling = step <= self.settle_steps
        held = self.ticks % self.cfg.update_every and not settling  # a spoiled step ticks, too
        if held and first is None:
            return
        rule = RULES["most_recent" if settling else self.cfg.algo]
        age = torch.arange(len(self.history), device=self.history.device)
        newest_first = self.history[(self.position - 1 - age) % len(self.history)]
        predicted = rule.predict(newest_first, self.cfg)
        changes = (advance > 0) & first if held else advance > 0
        self.scale.copy_(torch.where(changes, to_scale(predicted, self.targets, self.scale), self.scale))

    @contextlib.contextmanager
    def frozen(self):
        """Within this context, quantizers use the scales as they are and leave the bank untouched."""
        phase, self.phase = self.phase, Phase.FROZEN
        try:
            yield
        finally:
            self.phase = phase

    # In a checkpoint ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, torch.Tensor]:
        ticks = torch.full_like(self.filled, self.ticks)
        counters = torch.stack([self.filled, self.position[0], ticks])
        return {"history": self.history, "scale": self.scale, "counters": counters}

    def load_state_dict(self, state: dict[str, torch.Tensor], names: list[str] | None = None) -> None:
        """Restore a saved bank: exactly, or from another window its newest entries. names: those of its tensors, where
        they are known. Errors: UserError when it belongs to other tensors or holds what no bank does."""
        self._refuse(state, names)
        history, (filled, position, ticks) = state["history"], state["counters"].tolist()
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
        self.filled.fill_(filled)
        self.position.fill_(position)
        self.unseen, self.ticks = frozenset(range(len(self))), ticks
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
