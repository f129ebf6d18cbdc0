"""Statistics of paired outcomes: two models, the same questions or the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import bdtr, bdtrc, ndtri, stdtr, stdtrit

LEVEL = 0.05
POWER = 0.8  # of the smallest difference that is called detectable
Z, _Z_POWER = (float(ndtri(share)) for share in (1 - LEVEL / 2, POWER))  # quantiles of the normal distribution
_RESAMPLES = 10_000


class Answers(NamedTuple):
    """Questions by how the baseline and the run answered them."""

    kept: int  # both right
    lost: int  # only the baseline right
    gained: int  # only the run right
    wrong: int  # neither


def mcnemar(lost: int, gained: int) -> float:
    """Exact two-sided McNemar test: the p-value of the flips under "either way is as likely"; 1 when none flipped."""
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def above_chance(right: int, n: int, chance: float) -> float:
    """Exact one-sided binomial test: the p-value of so many right answers of n under a share of `chance`."""
    return float(bdtrc(right - 1, n, chance)) if right else 1.0


def tango(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % score interval of the change (gained - lost) / n of a paired proportion, as shares (Tango 1998).

    It inverts the score test whose value at zero is McNemar's; the exact test beside it is a little more careful, so of
    few flips the interval may exclude zero where p is above 0.05. It keeps its coverage at small n, and says
    +-z^2 / (n + z^2) when nothing flipped, where a Wald interval or a bootstrap collapses to a point.
    """
    change = (gained - lost) / n

    def excess(delta: float) -> float:  # squared score statistic against z^2; its two roots are the limits
        b = -lost - gained + (2 * n - gained + lost) * delta
        loss_rate = (math.sqrt(max(0.0, b * b + 8 * n * lost * delta * (1 - delta))) - b) / (4 * n)
        variance = n * (2 * loss_rate + delta * (1 - delta))
        return (gained - lost - n * delta) ** 2 - Z**2 * variance

    nudge = 1e-9  # at the change itself the excess is negative, or zero when nothing flipped: step off that root
    low = -1.0 if change == -1 else brentq(excess, -1.0, change - nudge)
    high = 1.0 if change == 1 else brentq(excess, change + nudge, 1.0)
    return low, high


def tang(kept: int, lost: int, gained: int) -> tuple[float, float] | None:
    """95 % score interval of the ratio of paired proportions, (kept + gained) / (kept + lost): how many times as many
    answers are right in the run (Tang, Tang and Chan 2003). None where the baseline has none right.

    It inverts the score test whose value at one is McNemar's, so it excludes one where `tango` excludes zero; like that
    it does not collapse where nothing flipped. Questions that neither answers do not matter.
    """
    before, after, right = kept + lost, kept + gained, kept + lost + gained
    if not before:
        return None

    def excess(ratio: float) -> float:  # squared score statistic against z^2; its two roots are the limits
        b = ratio**2 * (right + gained) - after
        root = math.sqrt(max(0.0, b * b + 4 * ratio**2 * (1 - ratio**2) * right * gained))
        gain_rate = (b + root) / (2 * ratio * (1 + ratio) * right)  # most likely under the ratio, of what is right
        variance = ratio * right * ((1 - ratio) + (1 + ratio) * gain_rate)
        return (after - ratio * before) ** 2 - Z**2 * variance

    nudge, reach = 1e-9, 2 * after / before + 4 * Z**2 * right / before**2  # there the variance is too small by far
    low = 0.0 if after == 0 else brentq(excess, nudge, after / before * (1 - nudge))
    return low, brentq(excess, after / before * (1 + nudge) + nudge, reach)


def bootstrap(tasks: Sequence[Answers]) -> list[float]:
    """95 % percentile interval of the change (gained - lost) / n, as shares, by a paired bootstrap over questions,
    resampled within each task (Efron and Tibshirani 1993)."""
    draw = np.random.default_rng(0)
    drawn = [draw.multinomial(sum(each), np.array(each) / sum(each), _RESAMPLES) for each in tasks]
    _, lost, gained, _ = sum(drawn).T
    changes = (gained - lost) / sum(map(sum, tasks))
    return np.quantile(changes, [LEVEL / 2, 1 - LEVEL / 2]).tolist()


def detectable(flips: int, n: int) -> float:
    """The smallest |change| of a paired proportion, as a share, that McNemar's test at 5 % finds with about 80 % power
    when this share of questions flips (Connor 1987). The power is the asymptotic test's; where few flip, the exact one
    has 70 % with 12 questions and 78 % with 57."""
    rate = max(flips, 1) / n

    def excess(change: float) -> float:
        discordant = max(rate, change)  # all flips one way at the least
        spread = Z * math.sqrt(discordant) + _Z_POWER * math.sqrt(max(0.0, discordant - change**2))
        return change * math.sqrt(n) - spread

    return 1.0 if excess(1.0) < 0 else brentq(excess, 0.0, 1.0)


def detectable_mean(half: float) -> float:
    """The same for a mean with a 95 % interval of +-`half`, in its unit (normal quantiles)."""
    return half * (1 + _Z_POWER / Z)


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % Student-t interval of a mean, in the unit of `values`; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = student(np.array(values))
    return mean.interval()[1] - mean.value


class Mean(NamedTuple):
    """A mean and its noise, in the unit of what it is of: standard errors with their degrees of freedom. Of several the
    one that says least counts: a sum of variances may seem to have more degrees of freedom than its parts."""

    value: float
    noise: tuple[tuple[float, float], ...]

    def interval(self, level: float = 1 - LEVEL) -> list[float]:
        """Student's interval."""
        half = max(float(stdtrit(df, (1 + level) / 2)) * error for error, df in self.noise)
        return [self.value - half, self.value + half]

    def p_value(self) -> float:
        """Student's two-sided test against zero."""
        tests = [2 * float(stdtr(df, -abs(self.value) / error)) for error, df in self.noise if error]
        return max(tests, default=float(self.value == 0))


def student(values: np.ndarray, reach: float = 0.0) -> Mean:
    """The mean of FP64 [units], more than one of them unless there is a reach (see `extended`)."""
    widened = extended(values, reach) if reach else values
    return Mean(float(widened.mean()), ((math.sqrt(widened.var(ddof=1) / len(widened)), len(widened) - 1),))


def crossed(changes: np.ndarray, reach: float = 0.0) -> Mean:
    """The mean of what changed, FP64 [runs, units], where all runs answered the same questions or read the same
    documents: its noise is that of further runs and further units.

    The variances of the mean over either, less that of their interaction, which is in both (Cameron, Gelbach and Miller
    2011), with degrees of freedom after Satterthwaite; but never less than of either alone. reach: for answers, how far
    a unit can move at all (see `extended`); it shrinks the mean, too. Needs two runs, and two units or `reach`.
    """
    runs, units = changes.shape
    of_runs, of_units = changes.mean(1), changes.mean(0)
    ((over_runs, df),), mean = student(of_runs).noise, student(of_units, reach)
    ((over_units, df_units),) = mean.noise
    rest = changes - of_runs[:, None] - of_units + changes.mean()
    both = (rest**2).sum() / max(1, (runs - 1) * (units - 1)) / changes.size
    variance = max(over_runs**2 + over_units**2 - both, over_runs**2, over_units**2)
    spread = over_runs**4 / df + over_units**4 / df_units
    together = math.sqrt(variance), max(variance**2 / spread if spread else 0, min(df, df_units))
    return Mean(mean.value, ((over_runs, df), (over_units, df_units), together))


def extended(units: np.ndarray, reach: float) -> np.ndarray:
    """Units as if one more had moved as far as it can either way (Bonett and Price 2012, for a pair): where few answers
    differ their variance says too little, and where none does it says nothing."""
    return np.append(units, [-reach, reach])


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values after Holm's correction for all of them (Holm 1979), in the order given."""
    # statsmodels has it, but takes seconds to be imported, and every evaluation asks for it.
    corrected, largest, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, place in enumerate(sorted(range(count), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (count - rank) * p_values[place]))
        corrected[place] = largest
    return corrected
