"""Training that is stopped before a step, or whose losses are spoiled."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from qat.config import Config
from qat.runs.folder import Run
from qat.train import loop
from qat.train.step import Trainer


def before_step(number: int, patch: pytest.MonkeyPatch) -> None:
    """Let a stop come before this step."""
    real = Trainer.step

    def step(self, current, batches, **how):
        if current == number:
            raise KeyboardInterrupt
        return real(self, current, batches, **how)

    patch.setattr(Trainer, "step", step)


def stopped(cfg: Config, number: int, where=before_step) -> Run:
    """Train until a stop before this step, or at another place of it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        where(number, patch)
        loop.train(cfg)
    return Run.of(cfg)


def spoil(numbers: Collection[int], patch: pytest.MonkeyPatch) -> None:
    """Make the loss of these steps NaN."""
    real = Trainer.step

    def step(self, number, batches, **how):
        if number not in numbers:
            return real(self, number, batches, **how)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(self.losses, "forward", lambda *_: self.model.lm_head.weight.sum() * float("nan"))
            return real(self, number, batches, **how)

    patch.setattr(Trainer, "step", step)
