"""Scaling rules: how a tensor's next amax is predicted from the amaxes of earlier steps.

With the history a(t-1), a(t-2), ... the predicted amax of step t is

    current       the tensor's own amax, a(t)                         (CTS)
    most_recent   a(t-1)                                              (DTS)
    exp_smooth    alpha * a(t-1) + (1 - alpha) * a(t-2)               (DTS)
    max           max(a(t-1) ... a(t-window))                         (DTS, the paper's max window)
    lsq           the first amax; then the loss teaches the scale     (LSQ, arXiv 1902.08153)

To add a rule, write a decorated function here; `scaling.algo=<its name>` then selects it. Nothing here imports PyTorch,
which takes seconds: naming a run and checking a command line need only this file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from qat.config import ScalingConfig
from qat.errors import ConfigError, nearest

if TYPE_CHECKING:
    import torch


class Rule(NamedTuple):
    """A scaling rule.

    predict: (history, scaling) -> predicted amax, FP32 [tensors]. history: FP32 [entries, tensors], the newest entry
        first, zeros where nothing was recorded yet.
    entries: how many entries of the history it reads; None: `scaling.window`.
    reads: the fields of `ScalingConfig` that change its result; they are part of a run's id.
    learns: whether this is only the first scale of weights and activations, which the bank learns from there on.
    """

    predict: Callable[[torch.Tensor, ScalingConfig], torch.Tensor]
    entries: int | None
    reads: tuple[str, ...]
    learns: bool = False

    def length(self, scaling: ScalingConfig) -> int:
        """Return how many entries the history needs."""
        return self.entries or scaling.window


RULES: dict[str, Rule] = {}


_NAME = re.compile(r"(\w+)(?::([^/+]+))?(?:/([^+]+))?(?:\+(.+))?")
_TYPES = {"window": int, "alpha": float, "update_every": int, "guard": float}


def split(name: str, key: str) -> tuple[str | None, ...]:
    """Split the name of a rule with settings, `<rule>[:<window or alpha>][/<ticks between updates>][+<guard>]`.

    As in most_recent, max:64, exp_smooth:0.3, max:64/10+1. key: where it stands. Errors: ConfigError.
    """
    parts = _NAME.fullmatch(name)
    if not parts:
        raise ConfigError(f"{key}={name}: must be like max:64, exp_smooth:0.5 or max:64/10+1")
    if parts[1] not in RULES:
        raise ConfigError(f"{key}={name}: unknown rule; {nearest(parts[1], RULES)}")
    if RULES[parts[1]].learns:
        raise ConfigError(f"{key}={name}: {parts[1]} learns from gradients, and amaxes do not tell what; leave it out")
    if parts[1] == "current" and parts[3]:
        raise ConfigError(f"{key}={name}: current scales by the amax itself, and holds none; leave out /{parts[3]}")
    return parts.groups()


def named(name: str, scaling: ScalingConfig, key: str) -> ScalingConfig:
    """Return `scaling` under the rule and the settings of a name, as `split`.

    What the name leaves out is as in `scaling`, but for `update_every`, which is 1, and `guard` and `settle`, which
    are 0. Errors: ConfigError.
    """
    algo, value, every, guard = split(name, key)
    changes = {"algo": algo, "settle": 0.0, "update_every": every or "1", "guard": guard or "0"}
    if value:
        reads = RULES[algo].reads
        if len(reads) != 1:
            raise ConfigError(f"{key}={name}: {algo} reads {' and '.join(reads) or 'no setting'}; leave out :{value}")
        changes[reads[0]] = value
    try:
        changes |= {field: _TYPES[field](text) for field, text in changes.items() if field in _TYPES}
    except ValueError as error:
        raise ConfigError(f"{key}={name}: must be like max:64, exp_smooth:0.5 or max:64/10+1") from error
    return dataclasses.replace(scaling, **changes)


def rule(entries: int | None = 1, reads: tuple[str, ...] = (), learns: bool = False):
    """Register a function as a rule under its own name (see `Rule`)."""

    def register(predict):
        RULES[predict.__name__] = Rule(predict, entries, reads, learns)
        return predict

    return register


@rule()
def current(history: torch.Tensor, scaling: ScalingConfig) -> torch.Tensor:
    """Use the tensor's own amax: the bank does that itself. This last amax is for evaluation and telemetry."""
    return history[0]


@rule()
def most_recent(history: torch.Tensor, scaling: ScalingConfig) -> torch.Tensor:
    """Use the amax of the step before."""
    return history[0]


@rule(entries=2, reads=("alpha",))
def exp_smooth(history: torch.Tensor, scaling: ScalingConfig) -> torch.Tensor:
    """Average the last two amaxes; with only one of them, use that."""
    smoothed = scaling.alpha * history[0] + (1 - scaling.alpha) * history[1]
    return smoothed.where(history[1] > 0, history[0])


@rule(entries=None, reads=("window",))
def max(history: torch.Tensor, scaling: ScalingConfig) -> torch.Tensor:
    """Use the largest amax of the window."""
    return history.amax(0)


@rule(reads=("lr",), learns=True)
def lsq(history: torch.Tensor, scaling: ScalingConfig) -> torch.Tensor:
    """Use the amax of the step before, for gradients always."""
    return history[0]
