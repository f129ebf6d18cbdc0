"""Checks of a run while it runs, of what a smooth loss curve does not show. Each returns a warning, or None.

Warnings go to the terminal and into the run folder's warnings.jsonl. (That ranks agree is watched in `qat.ranks`.)
"""

from __future__ import annotations

import math

from qat.config import Config
from qat.scaling import ScaleBank

IMPLAUSIBLE = 0.6  # of ln(vocabulary), the loss of guessing; sound pretrained models start below 0.4
LOST = 0.5  # share of weights that an update left as they were


def first_loss(cfg: Config, vocabulary: int, loss: float) -> str | None:
    """The loss of step 1 in nats, before any update: a pretrained model that starts near chance is fed wrongly. The
    released code's labels, shifted twice, start at 0.95 of ln(vocabulary) (its own log; experiments/README.md)."""
    share = loss / math.log(vocabulary)
    if cfg.model.source == "random" or not share > IMPLAUSIBLE:
        return None
    why = (
        "data.label_shift=twice asks for it" if cfg.data.label_shift == "twice" else "check model, tokenizer and labels"
    )
    return f"the first loss is {loss:.2f}, {share:.0%} of guessing: not what a pretrained model starts at; {why}"


def updates(cfg: Config, updated: dict) -> str | None:
    """The shares of weights that a step changed (`qat.telemetry.UpdateProbe`): most are lost to rounding when weights
    are stored in BF16 and the learning rate is small against them."""
    if updated["stored"] >= 1 - LOST:
        return None
    lost = 1 - updated["stored"]
    fix = "a larger optim.lr" if cfg.optim.master_weights else "optim.master_weights=true or a larger optim.lr"
    return f"the update left {lost:.0%} of the weights as they were (lr {cfg.optim.lr:g}); {fix} would move them"


class History:
    """Whether the amax history advances as often as the steps say."""

    def __init__(self, bank: ScaleBank):
        self.bank, self.ticks = bank, int(bank.filled)

    def begin(self) -> None:
        """Quantization starts, and the history may be dropped."""
        self.ticks = 0

    def advance(self, ticks: int) -> None:
        """A sound quantized step made so many ticks."""
        self.ticks += ticks

    def check(self) -> str | None:
        expected, found = min(len(self.bank.history), self.ticks), int(self.bank.filled)
        if found >= expected:
            return None
        return f"the amax history holds {found} entries where {expected} were written: scales are of the past"
