"""Test paired outcomes: two models, the same questions or the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.fft import dct
from scipy.optimize import brentq
from scipy.special import bdtr, bdtrc, ndtri, stdtr, stdtrit

LEVEL = 0.05
POWER = 0.8  # of the smallest difference that is called detectable
Z, _Z_POWER = (float(ndtri(share)) for share in (1 - LEVEL / 2, POWER))  # quantiles of the normal distribution


def mcnemar(lost: int, gained: int) -> float:
    """Return the exact two-sided McNemar p-value of flips that are as likely either way; 1 when none flipped."""
    return min(1.0, 2 * float(bdtr(min(lost, gained), lost + gained, 0.5)))


def above_chance(right: int, n: int, chance: float) -> float:
    """Return the exact one-sided binomial p-value of so many right answers of n under a share of `chance`."""
    return float(bdtrc(right - 1, n, chance)) if right else 1.0


def tango(lost: int, gained: int, n: int) -> tuple[float, float]:
    """Return the 95 % score interval of a paired change, (gained - lost) / n, as shares (Tango 1998).

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


def tang(right: int, lost: int, gained: int) -> tuple[float, float] | None:
    """Return the 95 % score interval of a ratio of paired proportions, (right + gained) / (right + lost).

    It says how many times as many answers are right in the run (Tang, Tang and Chan 2003); right: in both. None
    where the baseline has none right. It inverts the score test whose value at one is McNemar's, so it excludes one
    where `tango` excludes zero; like that it does not collapse where nothing flipped. Questions that neither answers do
    not matter.
    """
    before, after, either = right + lost, right + gained, right + lost + gained
    if not before:
        return None

    def excess(ratio: float) -> float:  # squared score statistic against z^2; its two roots are the limits
        b = ratio**2 * (either + gained) - after
        root = math.sqrt(max(0.0, b * b + 4 * ratio**2 * (1 - ratio**2) * either * gained))
        gain_rate = (b + root) / (2 * ratio * (1 + ratio) * either)  # most likely under the ratio, of what is right
        variance = ratio * either * ((1 - ratio) + (1 + ratio) * gain_rate)
        return (after - ratio * before) ** 2 - Z**2 * variance

    nudge, reach = 1e-9, 2 * after / before + 4 * Z**2 * either / before**2  # there the variance is too small by far
    low = 0.0 if after == 0 else brentq(excess, nudge, after / before * (1 - nudge))
    return low, brentq(excess, after / before * (1 + nudge) + nudge, reach)


def detectable(flips: int, n: int) -> float:
    """Return the smallest |change|, as a share, that McNemar's test at 5 % finds with about 80 % power.

    So many of n questions flip (Connor 1987). The power is the asymptotic test's; where few flip, the exact one has
    70 % with 12 questions and 78 % with 57.
    """
    rate = max(flips, 1) / n

    def excess(change: float) -> float:
        discordant = max(rate, change)  # all flips one way at the least
        spread = Z * math.sqrt(discordant) + _Z_POWER * math.sqrt(max(0.0, discordant - change**2))
        return change * math.sqrt(n) - spread

    return 1.0 if excess(1.0) < 0 else brentq(excess, 0.0, 1.0)


class Mean(NamedTuple):
    """Hold a mean and its noise: standard errors with their degrees of freedom, in the unit of what it is of.

    Of several errors the one that says least counts: a sum of variances may seem to have more degrees of freedom than
    its parts. reach: how far it can be from zero at all.
    """

    value: float
    noise: tuple[tuple[float, float], ...]
    reach: float = math.inf

    def interval(self, level: float = 1 - LEVEL) -> list[float]:
        """Return Student's interval, cut off at `reach`."""
        half = max(float(stdtrit(df, (1 + level) / 2)) * error for error, df in self.noise)
        return [max(self.value - half, -self.reach), min(self.value + half, self.reach)]

    def detectable(self, level: float = 1 - LEVEL) -> float:
        """Return the smallest difference that about 80 % of such intervals tell from zero."""
        return max(error * float(stdtrit(df, (1 + level) / 2) + stdtrit(df, POWER)) for error, df in self.noise)

    def p_value(self) -> float:
        """Return the p-value of Student's two-sided test against zero."""
        tests = [2 * float(stdtr(df, -abs(self.value) / error)) for error, df in self.noise if error]
        return max(tests, default=float(self.value == 0))


def noise(mean: Mean | None) -> dict:
    """Return the noise of a mean for a row of results: ci (95 %), p_value, detectable; all None where it has none."""
    if mean is None:
        return dict.fromkeys(("ci", "p_value", "detectable"))
    return {"ci": mean.interval(), "p_value": mean.p_value(), "detectable": mean.detectable()}


def paired_mean(changes: np.ndarray, reach: float = 0.0) -> Mean | None:
    """Return the mean of what changed, FP64 [runs, units], with the noise of further units and, of several, runs.

    reach: how far a unit can move at all, for answers; it shrinks the mean, too (see `_extended`). None of a single
    unit without a reach: it has no noise to be had.
    """
    runs, units = changes.shape
    if units < 2 and not reach:
        return None
    return crossed(changes, reach) if runs > 1 else student(changes[0], reach)


def student(values: np.ndarray, reach: float = 0.0) -> Mean:
    """Return the mean of FP64 [units], more than one of them unless there is a reach (see `_extended`)."""
    widened = _extended(values, reach) if reach else values
    error = math.sqrt(widened.var(ddof=1) / len(widened))
    return Mean(float(widened.mean()), ((error, len(widened) - 1),), reach or math.inf)


def crossed(changes: np.ndarray, reach: float = 0.0) -> Mean:
    """Return the mean of what changed, FP64 [runs, units], with the noise of further runs and further units.

    All runs answered the same questions or read the same documents. The variances of the mean over either, less that of
    their interaction, which is in both (Cameron, Gelbach and Miller 2011), with degrees of freedom after Satterthwaite;
    but never less than of either alone. reach: as `paired_mean`. Needs two runs, and two units or a reach.
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
    return mean._replace(noise=((over_runs, df), (over_units, df_units), together))


def over_steps(series: Sequence[np.ndarray]) -> Mean | None:
    """Return the mean of what changed, FP64 [steps] of each run, whose neighbouring steps are correlated.

    The variance of a run's mean is its spectrum near zero, the mean square of the first 0.4 n^(2/3) cosine transforms,
    which is as many degrees of freedom: the equal-weighted cosine estimator of Lazarus, Lewis, Stock and Watson (2018),
    whose intervals keep their coverage in short series better than Newey's and West's. Of several runs, the noise
    between them counts too, where it is larger. None without noise: a single step, or changes that all agree.
    """
    if min(map(len, series)) < 2 or all(np.ptp(steps) < 1e-12 for steps in series):
        return None
    means, variances, terms = np.array([steps.mean() for steps in series]), [], 0
    for steps in series:
        count = max(1, int(0.4 * len(steps) ** (2 / 3)))
        variances.append((dct(steps, norm="ortho")[1 : count + 1] ** 2).mean() / len(steps))
        terms += count
    within = math.sqrt(sum(variances)) / len(series), terms
    return Mean(float(means.mean()), (within, *(student(means).noise if len(series) > 1 else ())))


def _extended(units: np.ndarray, reach: float) -> np.ndarray:
    """Add two units that moved as far as they can, one either way (Bonett and Price 2012, for a pair).

    Where few answers differ their variance says too little, and where none does it says nothing.
    """
    return np.append(units, [-reach, reach])


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return the p-values after Holm's correction for all of them (Holm 1979), in the order given. None is no test."""
    # statsmodels has it, but takes seconds to be imported, and every evaluation asks for it.
    tests = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected, largest = [None] * len(p_values), 0.0
    for rank, (p, place) in enumerate(tests):
        largest = max(largest, min(1.0, (len(tests) - rank) * p))
        corrected[place] = largest
    return corrected
