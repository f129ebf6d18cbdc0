"""What a study of another size would see, by the noise of one that was run: how `make decide` was planned."""

from __future__ import annotations

import math

from qat.analysis import stats
from qat.studies.contrasts import Response, Weights


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
