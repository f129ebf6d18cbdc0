"""Effects with their intervals, and verdicts on claims.

An effect is a contrast: a weighted sum over cells. Where its noise is taken from depends on what there is:

- several seeds: a linear model of one mean a cell and one shift a seed, ordinary least squares on one number a run. Its
  residual is the noise between runs. Where the response is sampled in units (held-out documents, questions) that all
  runs share, the noise between those is added (`qat.paired.crossed`): intervals say what further seeds, text and
  questions would give. Of weights that do not add up to zero, as for a single cell, the noise is that of one value a
  seed: what a seed shifts in all cells does not cancel there.
- one seed, and a response sampled in such units: the contrast is made within each unit, where what the units have in
  common cancels, and gets Student's interval over units. It says what further text would give *of these very runs*; how
  much another seed would differ is not in it.
- one seed and one number a run: a linear model that lacks the cells' highest interaction, whose residual then stands
  for the noise. Without such a model the fit is saturated, and there is an estimate but no interval.

A verdict compares an interval with a region, and never takes "p > 0.05" for "no effect": a statement is `supported`
when the whole interval lies in the region where it is true, `contradicted` when the whole interval lies outside, and
else not decidable at this scale. A claim of k statements uses intervals of level 1 - 0.05 / k: together they hold with
95 %.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.stats import shapiro
from statsmodels.regression.linear_model import OLS
from statsmodels.stats.weightstats import DescrStatsW
from statsmodels.tools.sm_exceptions import SingularMatrixWarning

from qat import paired
from qat.paired import LEVEL
from qat.studies.cells import Key
from qat.wording import interval, p_text, signed

SUPPORTED, CONTRADICTED, OPEN = "supported", "contradicted", "not decidable at this scale"
Weights = Mapping[Key, float]


@dataclass
class Estimate:
    """The value of a contrast, its interval of `level` and its p-value against zero, both None where there is no noise
    to be had; n: how many units (`of`: documents, questions, runs) it comes from."""

    value: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    of: str
    level: float = 1 - LEVEL


@dataclass
class Response:
    """A quantity measured in the runs of a study.

    values: {(cell, seed): FP64 [units]}, one unit where `sampled` is empty; unit, digits: for display; log: values are
    logarithms, shown as what they are of; model: {cell: FP64 [parameters]}, the design of the model for one seed.
    """

    name: str
    unit: str
    digits: int
    values: dict[tuple[Key, int], np.ndarray]
    sampled: str = ""
    log: bool = False
    model: Mapping[Key, np.ndarray] | None = None

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.values})

    @cached_property
    def cells(self) -> list[Key]:
        return list(dict.fromkeys(key for key, _ in self.values))

    @property
    def within_units(self) -> bool:
        """Whether noise is that between units, for want of seeds."""
        return len(self.seeds) == 1 and bool(self.sampled)

    def contrast(self, weights: Weights, level: float = 1 - LEVEL) -> Estimate | None:
        """The weighted sum over cells; None where one of them is missing."""
        weights = {key: weight for key, weight in weights.items() if weight}
        if not weights or not set(weights) <= set(self.cells):
            return None
        return self._over_units(weights, level) if self.within_units else self._over_runs(weights, level)

    def _over_units(self, weights: Weights, level: float) -> Estimate:
        (seed,) = self.seeds
        units = sum(weight * self.values[key, seed] for key, weight in weights.items())
        value, n = float(np.mean(units)), len(units)
        reach = self._reach(weights)
        if reach:
            units = paired.extended(units, reach)
        if len(units) < 2:
            return Estimate(value, None, None, None, n, self.sampled, level)
        sample = DescrStatsW(units)
        if not np.ptp(units):  # the very same numbers in every unit
            return Estimate(value, value, value, float(value == 0), n, self.sampled, level)
        low, high = sample.tconfint_mean(alpha=1 - level)
        if reach:  # no interval leads beyond what all answers together could do
            low, high = max(low, -reach), min(high, reach)
        return Estimate(value, float(low), float(high), float(sample.ttest_mean(0)[1]), n, self.sampled, level)

    def _reach(self, weights: Weights) -> float:
        """How far a contrast of one unit can move, in points; 0 where that has no end."""
        return 100 * sum(map(abs, weights.values())) if self.sampled == "questions" else 0.0

    def _over_runs(self, weights: Weights, level: float) -> Estimate:
        n, mean, value = len(self.values), *self._mean_over_runs(weights)
        if mean is None:
            return Estimate(value, None, None, None, n, "runs", level)
        (low, high), p = mean.interval(level), mean.p_value()
        if reach := self._reach(weights):  # as above
            low, high = max(low, -reach), min(high, reach)
        return Estimate(value, low, high, p, n, "runs", level)

    def _mean_over_runs(self, weights: Weights) -> tuple[paired.Mean | None, float]:
        """The contrast with its error over seeds, and over units where there are such (None: there is no noise to be
        had), and its value."""
        whole = [seed for seed in self.seeds if all((key, seed) in self.values for key in weights)]
        changes = [sum(weight * self.values[key, seed] for key, weight in weights.items()) for seed in whole]
        value, variance, df = self._modelled(weights)
        if len(self.seeds) > 1 and not math.isclose(sum(weights.values()), 0, abs_tol=1e-9):
            # What a seed shifts in all cells alike does not cancel, and the model, which has it fixed, does not see it.
            if len(whole) < 2:
                return None, value
            shifts = np.array([change.mean() for change in changes])
            value, variance, df = float(shifts.mean()), shifts.var(ddof=1) / len(shifts), len(shifts) - 1
        if df < 1 or (self.sampled and not whole):
            return None, value
        reach = self._reach(weights)
        if not self.sampled or (len(changes[0]) < 2 and not reach):
            return paired.Mean(value, math.sqrt(variance), df), value
        return paired.crossed(np.array(changes), reach, (variance, df), value), value

    def _modelled(self, weights: Weights) -> tuple[float, float, float]:
        """The contrast by the linear model, its variance (NaN for a saturated one) and degrees of freedom."""
        row = sum(weight * self._rows[key] for key, weight in weights.items())
        row = np.append(row, np.zeros(self._fit.model.exog.shape[1] - len(row)))  # seeds shift all cells alike
        df = float(self._fit.df_resid)
        variance = float(np.squeeze(self._fit.t_test(row).sd)) ** 2 if df >= 1 else math.nan
        return float(row @ self._fit.params), variance, df

    @cached_property
    def _rows(self) -> Mapping[Key, np.ndarray]:
        """The design of every cell, seeds left out."""
        if len(self.seeds) == 1 and self.model:
            return self.model
        return dict(zip(self.cells, np.eye(len(self.cells)), strict=True))

    @cached_property
    def _fit(self):
        shifts = sum_coded(self.seeds)
        design = [np.append(self._rows[key], shifts[seed]) for key, seed in self.values]
        means = [float(np.mean(units)) for units in self.values.values()]
        with warnings.catch_warnings():  # where cells are missing, those that are there still have their means
            warnings.simplefilter("ignore", SingularMatrixWarning)
            return OLS(means, np.array(design)).fit()

    def noise(self) -> str:
        """A sentence or two: what intervals are made of, and whether the residuals look as they should."""
        if not self.values:
            return "Nothing was measured."
        seeds, units = len(self.seeds), len(next(iter(self.values.values())))
        if self.within_units:
            return f"One seed: intervals are the noise of {units} {self.sampled} only, not that between runs."
        also = f" and {units} {self.sampled}" if self.sampled else ""
        source = f"{seeds} seeds{also}." if seeds > 1 else "One seed: the three-way interaction is taken for the noise."
        if self._fit.df_resid < 1:
            return source if seeds > 1 else "One seed and one number a run: the model is saturated, without intervals."
        spread, residuals = math.sqrt(self._fit.mse_resid), np.asarray(self._fit.resid)
        if np.allclose(residuals, 0, atol=1e-9 * float(np.abs(self._fit.model.endog).max())):
            return f"{source} Nothing is left of it."
        worst = int(np.argmax(np.abs(residuals)))
        key, seed = list(self.values)[worst]
        normal = f"Shapiro-Wilk p {p_text(float(shapiro(residuals).pvalue))}, " if seeds > 1 else ""
        return (
            f"{source} Residuals: standard deviation {spread:.2g} on {int(self._fit.df_resid)} degrees of freedom, "
            f"{normal}the largest {residuals[worst] / spread:+.1f} of "
            f"them ({', '.join(key)}, seed {seed})."
        )

    def text(self, estimate: Estimate | None) -> str:
        """An estimate with its interval, for a table; alone where it is a count that was not estimated."""
        if estimate is None:
            return "–"
        if not self.values and estimate.low is not None and estimate.low == estimate.high:
            return f"{estimate.value:.{self.digits}f}"
        if self.log:
            value, *ends = (v if v is None else math.exp(v) for v in (estimate.value, estimate.low, estimate.high))
            return f"{value:.{self.digits}f} " + ("[-]" if ends[0] is None else "[{:.3f}, {:.3f}]".format(*ends))
        ends = None if estimate.low is None else (estimate.low, estimate.high)
        return f"{signed(estimate.value, self.digits)} {interval(ends, self.digits)}"


def sum_coded(levels: Sequence) -> dict:
    """A row of -1, 0 and 1 for each level of a factor, which add up to zero over the levels."""
    return dict(zip(levels, np.vstack([np.eye(len(levels) - 1), -np.ones(len(levels) - 1)]), strict=True))


def holm(estimates: Sequence[Estimate | None]) -> list[float | None]:
    """The estimates' p-values after Holm's correction, where they have one."""
    corrected = iter(paired.holm([e.p for e in estimates if e is not None and e.p is not None]))
    return [None if e is None or e.p is None else next(corrected) for e in estimates]


# -------------------------------------------------------------------------------------------------- verdicts


@dataclass
class Statement:
    """That a contrast lies between `low` and `high` (None: no end), in the response's unit.

    estimate: function of a level; None: the contrast of `weights`.
    """

    what: str
    response: Response
    weights: Weights = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    estimate: Callable[[float], Estimate | None] | None = None

    def judge(self, level: float) -> dict:
        """The estimate, the region and the verdict, JSON-able."""
        response = self.response
        estimate = self.estimate(level) if self.estimate else response.contrast(self.weights, level)
        low, high = (end if end is None or not response.log else math.log(end) for end in (self.low, self.high))
        return {
            "statement": self.what,
            "response": response.name,
            "unit": response.unit,
            "estimate": None if estimate is None else vars(estimate),
            "text": response.text(estimate),
            "region": [self.low, self.high],
            "verdict": judge(estimate, -math.inf if low is None else low, math.inf if high is None else high),
        }


def judge(estimate: Estimate | None, low: float, high: float) -> str:
    """Whether the whole interval lies in (low, high), outside of it, or neither."""
    if estimate is None or estimate.low is None:
        return OPEN
    if low < estimate.low and estimate.high < high:
        return SUPPORTED
    if estimate.high <= low or estimate.low >= high:
        return CONTRADICTED
    return OPEN


@dataclass
class Claim:
    """A claim, what the paper says to it, and the statements it rests on: on all of them, or on any. Without its
    premises it is about nothing, and nothing is decided."""

    claim: str
    says: str
    statements: list[Statement]
    needs: str = "all"
    premises: list[Statement] = field(default_factory=list)

    def judge(self) -> dict:
        """{claim, says, verdict, why, premises, statements}, JSON-able."""
        premises = [premise.judge(1 - LEVEL / len(self.premises)) for premise in self.premises]
        found = [statement.judge(1 - LEVEL / len(self.statements)) for statement in self.statements]
        if unmet := next((each for each in premises if each["verdict"] != SUPPORTED), None):
            verdict, why = OPEN, f"It was not seen that {unmet['statement']}: {unmet['text']} {unmet['unit']}."
        else:
            verdict = self._verdict(found)
            why = _why(verdict, found)
        if verdict != OPEN and any(statement.response.within_units for statement in self.statements):
            why += " Of one seed: noise between runs is not in it."
        about = {"claim": self.claim, "says": self.says, "verdict": verdict, "why": why}
        return about | {"premises": premises, "statements": found}

    def _verdict(self, found: Sequence[dict]) -> str:
        verdicts = [each["verdict"] for each in found]
        decided, other = (CONTRADICTED, SUPPORTED) if self.needs == "all" else (SUPPORTED, CONTRADICTED)
        if decided in verdicts:
            return decided
        return other if set(verdicts) == {other} else OPEN


def _why(verdict: str, found: Sequence[dict]) -> str:
    """One sentence: which statement decided it, or what stands in the way."""
    same = [each for each in found if each["verdict"] == verdict]
    if verdict != OPEN:
        first = f"“{same[0]['statement']}” is {verdict}: {same[0]['text']} {same[0]['unit']}"
        others = "; so is the other" if len(found) == 2 else "; so are the others"
        return f"{first}{others if len(same) == len(found) > 1 else ''}."
    each = same[0]
    if each["estimate"] is None:
        return f"“{each['statement']}”: a cell that it needs is missing."
    if each["estimate"]["low"] is None:
        return f"“{each['statement']}”: {each['text']} {each['unit']}, and one run a cell leaves no interval."
    return f"“{each['statement']}”: {each['text']} {each['unit']}, {_spanned(each['region'])}."


def _spanned(ends: Sequence[float | None]) -> str:
    """That an interval lies neither inside of a region nor outside of it."""
    if None in ends:
        end = ends[0] if ends[1] is None else ends[1]
        return f"an interval that contains {end + 0.0:.4g}"
    return f"an interval neither within {region(ends)} nor clear of it"


def region(ends: Sequence[float | None]) -> str:
    """A region in words."""
    low, high = ends
    if low is None:
        return f"below {high + 0.0:.4g}"  # no negative zero
    return f"above {low + 0.0:.4g}" if high is None else f"{low:.4g} to {high:.4g}"
