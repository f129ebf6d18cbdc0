"""Statistics of paired outcomes: two models, the same questions or the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.optimize import brentq
from scipy.special import bdtr, stdtrit

LEVEL = 0.05
_Z = 1.959964  # 97.5 % quantile of the normal distribution


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the p-value of the flips under "either way is as likely"; 1 when none flipped."""
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def tango(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % score interval of the change (gained - lost) / n of a paired proportion, as shares (Tango 1998).

    It inverts the score test whose value at zero is McNemar's, so it agrees with the p-value beside it. It keeps its
    coverage at small n, and says +-z^2 / (n + z^2) when nothing flipped, where a Wald interval or a bootstrap
    collapses to a point.
    """
    change = (gained - lost) / n

    def excess(delta: float) -> float:  # squared score statistic against z^2; its two roots are the limits
        b = -lost - gained + (2 * n - gained + lost) * delta
        loss_rate = (math.sqrt(max(0.0, b * b + 8 * n * lost * delta * (1 - delta))) - b) / (4 * n)
        variance = n * (2 * loss_rate + delta * (1 - delta))
        return (gained - lost - n * delta) ** 2 - _Z**2 * variance

    nudge = 1e-9  # at the change itself the excess is negative, or zero when nothing flipped: step off that root
    low = -1.0 if change == -1 else brentq(excess, -1.0, change - nudge)
    high = 1.0 if change == 1 else brentq(excess, change + nudge, 1.0)
    return low, high


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % Student-t interval of a mean, in the unit of `values`; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = sum(values) / n
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return float(stdtrit(n - 1, 1 - LEVEL / 2)) * error


def holm(p_values: Sequence[float]) -> int:
    """How many of the ascending `p_values` are significant at 5 % for the whole family (Holm 1979)."""
    for rank, p in enumerate(p_values):
        if p > LEVEL / (len(p_values) - rank):
            return rank
    return len(p_values)
