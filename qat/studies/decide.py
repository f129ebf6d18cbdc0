"""Decide the claims of the factorial and the audit with the fewest runs: the cells that statements name, and no others.

A statement is about the difference of two or four cells around the recipe, within a seed. What hides it is mostly the
noise between seeds and between documents, so hours go into seeds and held-out text rather than into the grid's other
cells. The size was chosen by `planned` from the noise of `make factorial` at the laptop budget, and is registered with
what it can see in experiments/claims.yaml: every cell with the first `FEW` seeds, and exps 7 and 8, on which several
claims rest alone, with all of them. Questions, which take as long as the training, are asked of exp8 with few.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence

from qat.analysis import stats
from qat.runs.identity import baseline_of, run_id
from qat.studies import audit, factorial
from qat.studies.audit import PLAIN, SPLIT
from qat.studies.contrasts import Response, Weights
from qat.studies.design import Cell, Compose, refuse, with_seeds
from qat.studies.factorial import RECIPE
from qat.studies.measures import Measured

FEW = 4  # seeds of a cell that is not one of `OFTEN`
OFTEN = (RECIPE, ("max w64", "1e-4", "5 %"), ("exp8", PLAIN))  # exp8, exp7; the last is the first, as the audit has it
# In the order in which claims can be judged.
FACTORIAL = (
    RECIPE,
    ("most_recent", "1e-5", "5 %"),
    ("max w64", "1e-5", "0"),
    ("current", "1e-5", "5 %"),
    ("exp_smooth", "1e-5", "5 %"),
    ("most_recent", "1e-5", "0"),
    ("max w64", "1e-4", "5 %"),
    ("most_recent", "1e-4", "5 %"),
    ("max w64", "1e-4", "0"),
)
AUDIT = (
    ("exp8", PLAIN),
    ("exp8", "overflow saturates"),
    ("exp8", "overflow to Inf"),
    (SPLIT, PLAIN),
    (SPLIT, "a tick a call"),
    ("exp3", PLAIN),
    ("exp3", "labels shifted twice"),
)


def design(overrides: Sequence[str], compose: Compose, seeds: Sequence[int]) -> tuple[list[Cell], dict[str, str]]:
    """Return the cells under command-line overrides, and {switch: why it is left out}.

    A record keeps no weights. So cells come seed by seed and baseline by baseline, with which they are compared, exp8
    first and then asked questions: of a record of whole baselines nothing is trained again.
    """
    refuse(overrides, ["benchmark.control"], "study")
    exp8 = compose("exp8", [*overrides, "benchmark.control=true"], [])
    text = [override for override in overrides if not override.startswith("benchmark")] + ["benchmark=text"]
    crossed = {cell.key: cell for cell in factorial.design(text, compose)}
    switched, left_out = audit.design(text, compose, AUDIT)
    asked = Cell(exp8.cfg, exp8.overrides, RECIPE)
    by_baseline = defaultdict(list)
    for cell in (*(crossed[key] for key in FACTORIAL), *switched):
        by_baseline[run_id(baseline_of(cell.cfg))].append(cell)
    first, *others = itertools.chain(*by_baseline.values())
    often = [cell for cell in (first, *others) if cell.key in OFTEN]
    return with_seeds([first, asked, *others], seeds[:FEW]) + with_seeds(often, seeds[FEW:]), left_out


def claims(measured: Sequence[Measured], exp8: Cell) -> list[dict]:
    """Judge the claims of both studies by what was measured of their cells (`qat.studies.contrasts.Claim`)."""
    crossed = [m for m in measured if m.key in FACTORIAL]
    switched = [m for m in measured if m.key in AUDIT]
    return [*factorial.claims(crossed), *audit.claims(switched, exp8.cfg)]


def planned(response: Response, weights: Weights, level: float, seeds: int, units: int) -> float | None:
    """Return the smallest difference that so many seeds and units would find in four of five cases, by the noise of
    what was measured: the variances between seeds, between units and of both together (`qat.analysis.stats.crossed`).

    None where fewer than two seeds have the cells.
    """
    changes = response.changes(weights)
    if changes is None or len(changes) < 2:
        return None
    have = changes.shape
    of_seeds, of_units = changes.mean(1), changes.mean(0)
    rest = changes - of_seeds[:, None] - of_units + changes.mean()
    both = (rest**2).sum() / max(1, (have[0] - 1) * (have[1] - 1))
    # What a mean over units, or seeds, has of `both` is no noise between seeds, or units.
    between_seeds = max(0.0, of_seeds.var(ddof=1) - both / have[1])
    between_units = max(0.0, of_units.var(ddof=1) - both / have[0]) if have[1] > 1 else 0.0
    over_seeds = (between_seeds + both / units) / seeds
    over_units = (between_units + both / seeds) / units
    noise = ((math.sqrt(over_seeds), seeds - 1),)
    if have[1] > 1:
        variance = between_seeds / seeds + between_units / units + both / seeds / units
        spread = over_seeds**2 / (seeds - 1) + over_units**2 / (units - 1)
        df = max(variance**2 / spread if spread else 0, min(seeds, units) - 1)
        noise += ((math.sqrt(over_units), units - 1), (math.sqrt(variance), df))
    return stats.Mean(0.0, noise).detectable(level)
