"""The schedules of the learning rate and of CAGE's lambda."""

from __future__ import annotations

import math

from qat.config import Config


def learning_rate(cfg: Config, step: int) -> float:
    """Return the learning rate of a step (1-based): linear warmup, then cosine towards 0.

    Warmup of w steps: step s has lr * s / w, one step ahead of the released code's lr * (s - 1) / w, which
    `optim.lr_from_zero` gives. The cosine after it is the released code's. The paper's text is silent.
    """
    warmup = cfg.lr_warmup_steps
    if step <= warmup:
        return cfg.optim.lr * (step - cfg.optim.lr_from_zero) / warmup
    progress = (step - 1 - warmup) / (cfg.steps - warmup)
    return cfg.optim.lr * 0.5 * (1 + math.cos(math.pi * progress))


def cage(cfg: Config, step: int) -> float:
    """Return CAGE's lambda of a step (1-based): 0 while it is silent, then a linear rise to `quant.cage` at the end."""
    silent = cfg.cage_silent_steps
    return cfg.quant.cage * (step - silent) / (cfg.steps - silent) if step > silent else 0.0
