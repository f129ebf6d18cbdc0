"""Estimate effects with their intervals, and judge claims.

An effect is a contrast: a weighted sum over cells. Where its noise is taken from depends on what there is:

- several seeds: the contrast is made within each seed, and its noise is what it differs by between seeds. What a seed
  shifts in all cells alike cancels then; what it shifts in some, such as those that share a baseline, is noise, as it
  must be. Where the response is sampled in units (held-out documents, questions) that all runs share, the noise between
  those is added (`qat.analysis.stats.crossed`): intervals say what further seeds, text and questions would give.
- one seed that has all its cells, and a response sampled in such units: the contrast is made within each unit, where
  what the units have in common cancels, and gets Student's interval over units. It says what further text would give
  *of these very runs*; how much another seed would differ is not in it.
- one such seed and one number a run: an estimate without an interval.

A verdict compares an interval with a region, and never takes "p > 0.05" for "no effect": a statement is `supported`
when the whole interval lies in the region where it is true, `contradicted` when the whole interval lies outside, and
`equivalent` when it is about the direction of a difference that lies inside its margin: too small to count. Else it is
not decidable at this scale. A claim of k statements uses intervals of level 1 - 0.05 / k: together they hold with
95 %. Beside it stands the smallest difference that would be found in four of five cases, from the same noise, and for a
difference that has a margin a word of `qat.analysis.decisions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qat.analysis import stats
from qat.analysis.decisions import decide
from qat.analysis.stats import LEVEL
from qat.errors import UserError
from qat.report.studies import NOT_MEASURED
from qat.report.text import interval, signed
from qat.studies.design import Key
from qat.studies.registration import Registered

SUPPORTED, CONTRADICTED, EQUIVALENT = "supported", "contradicted", "equivalent"
OPEN = "not decidable at this scale"
POWERLESS, UNDECIDED = "powerless", "undecided"  # why a claim is open, beside NOT_MEASURED
Weights = Mapping[Key, float]


@dataclass
class Estimate:
    """Hold the value of a contrast, its interval of `level` and its p-value against zero.

    Both are None where there is no noise to be had. n: how many (`of`: documents, questions, seeds, scopes) it is from.
    detectable: the smallest value that four of five such intervals tell from zero; None as the interval is.
    """

    value: float
    low: float | None
    high: float | None
    p: float | None
    n: int
    of: str
    level: float = 1 - LEVEL
    detectable: float | None = None

    @classmethod
    def from_mean(cls, value: float, mean: stats.Mean | None, n: int, of: str, level: float) -> Estimate:
        """Return a value with the noise of a mean; None: there is none."""
        noise = (*mean.interval(level), mean.p_value()) if mean else (None, None, None)
        return cls(value, *noise, n, of, level, mean and mean.detectable(level))


@dataclass
class Response:
    """Hold a quantity measured in the runs of a study.

    values: {(cell, seed): FP64 [units]}, one unit where `sampled` is empty; unit, digits: for display; log: values are
    logarithms, shown as what they are of; without: how many runs have no finite value, and are not in `values`;
    measure: its name in `qat.studies.registration.MEASURES`, where claims rest on it.
    """

    name: str
    unit: str
    digits: int
    values: dict[tuple[Key, int], np.ndarray]
    sampled: str = ""
    log: bool = False
    without: int = 0
    measure: str = ""

    @cached_property
    def seeds(self) -> list[int]:
        return sorted({seed for _, seed in self.values})

    def contrast(self, weights: Weights, level: float = 1 - LEVEL) -> Estimate | None:
        """Estimate the weighted sum over cells, its mean over the seeds that have all of them; None where none has."""
        changes = self.changes(weights)
        if changes is None:
            return None
        n, of = (changes.shape[1], self.sampled) if self.sampled and len(changes) == 1 else (len(changes), "seeds")
        # Answers of one unit can move so far, in points; what else is measured has no end.
        reach = 100 * sum(map(abs, weights.values())) if (self.sampled, self.unit) == ("questions", "points") else 0.0
        return Estimate.from_mean(float(changes.mean()), self._mean(changes, reach), n, of, level)

    def changes(self, weights: Weights) -> np.ndarray | None:
        """Return the weighted sum over cells of the seeds that have all of them, FP64 [seeds, units]; None if none."""
        weights = {key: weight for key, weight in weights.items() if weight}
        seeds = [seed for seed in self.seeds if all((key, seed) in self.values for key in weights)]
        if not weights or not seeds:
            return None
        return np.array([sum(weight * self.values[key, seed] for key, weight in weights.items()) for seed in seeds])

    def _mean(self, changes: np.ndarray, reach: float) -> stats.Mean | None:
        """Return the mean of a contrast, FP64 [seeds, units], with its noise; None where there is none to be had."""
        if self.sampled:
            return stats.paired_mean(changes, reach)
        agree = np.ptp(changes) < 1e-9  # which is no certainty; one seed agrees with itself
        return None if agree else stats.student(changes[:, 0])

    def noise(self) -> str:
        """Say what intervals are made of, and what is missing."""
        left_out = f" Left out are {self.without} of the runs, which have no such number." if self.without else ""
        return (self._noise() if self.values else "Nothing was measured.") + left_out

    def _noise(self) -> str:
        seeds, units = len(self.seeds), len(next(iter(self.values.values())))
        if seeds == 1 and self.sampled:
            return f"One seed: intervals are the noise of {units} {self.sampled} only, not that between runs."
        if seeds == 1:
            return "One seed and one number a run: there are no intervals."
        also = f", and between {units} {self.sampled}" if self.sampled else ""
        return f"Intervals are the noise of an effect between {seeds} seeds (Student's, {seeds - 1} d.f.){also}."

    def text(self, estimate: Estimate | None) -> str:
        """Write an estimate with its interval, for a table; alone where it is a count that was not estimated."""
        if estimate is None:
            return "–"
        if not self.values and estimate.low is not None and estimate.low == estimate.high:
            return f"{estimate.value:.{self.digits}f}"
        if self.log:
            value, *ends = (v if v is None else math.exp(v) for v in (estimate.value, estimate.low, estimate.high))
            return f"{value:.{self.digits}f} " + ("[-]" if ends[0] is None else "[{:.3f}, {:.3f}]".format(*ends))
        ends = None if estimate.low is None else (estimate.low, estimate.high)
        return f"{signed(estimate.value, self.digits)} {interval(ends, self.digits)}"

    def detectable(self, estimate: Estimate | None) -> float | None:
        """Return the smallest difference that would be found, in the unit; where values are logarithms, a factor."""
        smallest = estimate and estimate.detectable
        return math.exp(smallest) if self.log and smallest is not None else smallest

    def fewer(self, estimate: Estimate | None) -> str:
        """Say of how many seeds an estimate is, where not of all; else nothing. Begins with a space."""
        seeds = estimate.n if estimate and estimate.of == "seeds" else 1
        return f" ({seeds} of {len(self.seeds)} seeds)" if estimate and seeds < len(self.seeds) else ""

    def cell(self, estimate: Estimate | None) -> str:
        """Write `text` and `fewer`, for a table whose header has the unit."""
        return self.text(estimate) + self.fewer(estimate)


def with_holm(response: Response, estimates: Sequence[Estimate | None]) -> list[dict]:
    """Return {estimate, text, p_holm} of estimates of a response, JSON-able.

    p_holm: the p-value after Holm's correction over all of them; None where an estimate has none.
    """
    tests = zip(estimates, stats.holm([e and e.p for e in estimates]), strict=True)
    return [{"estimate": e and vars(e), "text": response.cell(e), "p_holm": p} for e, p in tests]


# -------------------------------------------------------------------------------------------------- verdicts


@dataclass
class Statement:
    """State that a contrast lies between `low` and `high` (None: no end), in the response's unit.

    margin: the smallest difference from zero that counts; None where it is no difference, or none is set.
    estimate: function of a level; None: the contrast of `weights`. without: what it says that there is no estimate.
    """

    what: str
    response: Response
    weights: Weights = field(default_factory=dict)
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    estimate: Callable[[float], Estimate | None] | None = None
    without: str = "a cell that it needs is missing"

    def judge(self, level: float) -> dict:
        """Return the estimate, the region, the verdict and what else the difference says, JSON-able.

        detectable: as `Response.detectable`; decision: as `decide`; open: why it has no verdict.
        """
        response = self.response
        estimate = self.estimate(level) if self.estimate else response.contrast(self.weights, level)
        low, high = (end if end is None or not response.log else math.log(end) for end in (self.low, self.high))
        verdict = judge(estimate, -math.inf if low is None else low, math.inf if high is None else high)
        decision = self.decide(estimate)
        if decision == "equivalent" and (verdict == OPEN or 0 in (self.low, self.high)):
            verdict = EQUIVALENT  # of a direction, however surely it is seen
        cause = POWERLESS if decision == POWERLESS or estimate is None or estimate.low is None else UNDECIDED
        if estimate is None and not self.estimate:
            cause = NOT_MEASURED
        return {
            "statement": self.what,
            "measure": response.measure,
            "response": response.name,
            "unit": response.unit + response.fewer(estimate),
            "estimate": estimate and vars(estimate),
            "text": response.text(estimate),
            "region": [self.low, self.high],
            "verdict": verdict,
            "margin": self.margin,
            "detectable": response.detectable(estimate),
            "decision": decision,
            "open": cause if verdict == OPEN else None,
            **({"without": self.without} if estimate is None else {}),
        }

    def decide(self, estimate: Estimate | None) -> str | None:
        """Return the word of `qat.analysis.decisions` for a difference that has a margin."""
        if self.margin is None or estimate is None:
            return None
        sign = -1 if self.response.measure == "accuracy" else 1  # more of any other is worse
        ends = None if estimate.low is None else sorted((sign * estimate.low, sign * estimate.high))
        return decide(sign * estimate.value, ends, self.margin, estimate.detectable)


def judge(estimate: Estimate | None, low: float, high: float) -> str:
    """Return whether the whole interval lies in (low, high), outside of it, or neither."""
    if estimate is None or estimate.low is None:
        return OPEN
    if low < estimate.low and estimate.high < high:
        return SUPPORTED
    if estimate.high <= low or estimate.low >= high:
        return CONTRADICTED
    return OPEN


@dataclass
class Claim:
    """Hold a registered claim and the statements it rests on: on all of them, or on any.

    Without its premises it is about nothing, and nothing is decided. Errors: UserError where its statements are about
    other measures than it is registered for.
    """

    registered: Registered
    statements: list[Statement]
    needs: str = "all"
    premises: list[Statement] = field(default_factory=list)

    def __post_init__(self) -> None:
        used = {statement.response.measure for statement in (*self.premises, *self.statements)}
        if used != set(self.registered.margins):
            names = (", ".join(sorted(measures)) for measures in (self.registered.margins, used))
            raise UserError("claims.yaml: {}: it names {}, the code measures {}".format(self.registered.key, *names))

    def judge(self) -> dict:
        """Return {key, claim, says, control, verdict, open, why, premises, statements}, JSON-able.

        open: `NOT_MEASURED`, `POWERLESS` where what a verdict needs could not have been seen, else `UNDECIDED`; None
        with a verdict.
        """
        premises = [premise.judge(1 - LEVEL / len(self.premises)) for premise in self.premises]
        judged = [statement.judge(1 - LEVEL / len(self.statements)) for statement in self.statements]
        if unmet := next((premise for premise in premises if premise["verdict"] != SUPPORTED), None):
            seen = f"{unmet['text']} {unmet['unit']}; true {region(unmet['region'])}"
            verdict, why = OPEN, f"It was not seen that {unmet['statement']} ({seen}){_power(unmet)}."
            cause = unmet["open"] or POWERLESS  # a premise that is wrong leaves nothing to be seen
            why = _why(OPEN, cause, [unmet]) if cause == NOT_MEASURED else why
        else:
            verdict = self._verdict(judged)
            cause = self._cause(judged) if verdict == OPEN else None
            why = _why(verdict, cause, judged)
        estimates = [statement["estimate"] for statement in (*premises, *judged) if statement["estimate"]]
        sampled = {statement.response.sampled for statement in (*self.premises, *self.statements)} - {""}
        if verdict != OPEN and any(estimate["of"] in sampled for estimate in estimates):
            why += " Of one seed: noise between runs is not in it."
        about = {key: getattr(self.registered, key) for key in ("key", "claim", "says", "control")}
        return about | {"verdict": verdict, "open": cause, "why": why, "premises": premises, "statements": judged}

    def _verdict(self, judged: Sequence[dict]) -> str:
        verdicts = [statement["verdict"] for statement in judged]
        decided, other = (CONTRADICTED, SUPPORTED) if self.needs == "all" else (SUPPORTED, CONTRADICTED)
        if decided in verdicts or OPEN in verdicts:
            return decided if decided in verdicts else OPEN
        return EQUIVALENT if EQUIVALENT in verdicts else other

    def _cause(self, judged: Sequence[dict]) -> str:
        """Return why an open claim was not supported, by all of its statements or any."""
        causes = [statement["open"] for statement in judged]
        of_all, of_any = (NOT_MEASURED, POWERLESS, UNDECIDED), (UNDECIDED, NOT_MEASURED, POWERLESS)
        return next(cause for cause in (of_all if self.needs == "all" else of_any) if cause in causes)


def _why(verdict: str, cause: str | None, judged: Sequence[dict]) -> str:
    """Say in one sentence which statement decided it, or what stands in the way."""
    first, *others = [s for s in judged if s["verdict"] == verdict and cause in (None, s["open"])]
    name, value = f"“{first['statement']}”", f"{first['text']} {first['unit']}"
    if verdict != OPEN:
        agreed = len(others) + 1 == len(judged) > 1
        rest = ("; so is the other" if len(judged) == 2 else "; so are the others") if agreed else ""
        return f"{name} is {verdict}: {value}, {_placed(first)}{rest}."
    if first["estimate"] is None:
        return f"{name}: {first['without']}."
    if first["estimate"]["low"] is None:
        return f"{name}: {value}, and one seed with all its cells leaves no interval."
    return f"{name}: {value}, {_spanned(first['region'])}{_power(first)}."


def _power(statement: Mapping) -> str:
    """Say of an open statement how small a difference would have been found, and of a powerless one what counts."""
    if not statement["open"] or statement["detectable"] is None:
        return ""
    margin = f", and {statement['margin']:.3g} would count" if statement["open"] == POWERLESS else ""
    return f"; {statement['open']}: differences from {statement['detectable']:.3g} on are found{margin}"


def _placed(statement: Mapping) -> str:
    """Say where an interval lies that decides a statement."""
    if statement["verdict"] == EQUIVALENT:
        return f"too little to count, where {statement['margin']:.3g} would"
    where = region(statement["region"])
    return f"all of it {where}" if statement["verdict"] == SUPPORTED else f"none of it {where}"


def _spanned(ends: Sequence[float | None]) -> str:
    """Say that an interval lies neither inside of a region nor outside of it."""
    if None in ends:
        end = ends[0] if ends[1] is None else ends[1]
        return f"an interval that contains {end + 0.0:.4g}"
    return f"an interval neither within {region(ends)} nor clear of it"


def region(ends: Sequence[float | None]) -> str:
    """Write a region in words."""
    low, high = ends
    if low is None:
        return f"below {high + 0.0:.4g}"  # no negative zero
    return f"above {low + 0.0:.4g}" if high is None else f"{low:.4g} to {high:.4g}"
