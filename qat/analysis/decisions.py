"""Decide what a measured difference says, in five words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qat.analysis.stats import LEVEL, holm

APE_THRESHOLD = 0.5  # percent of a loss: what the paper allows a loss curve to differ by (section 1)
DROP_THRESHOLD = 1.0  # percent of a score: what the paper allows it to drop by (section 1)

DECISIONS = {
    "harm": "worse, beyond noise",
    "gain": "better, beyond noise",
    "equivalent": "the whole interval lies inside the margin: whatever the difference is, it is too small to count",
    "undecided": "noise hides a difference of the margin's size, here",
    "powerless": "this measure could not have seen a difference of the margin's size",
}


def decide(
    difference: float,
    interval: Sequence[float] | None,
    margin: float,
    detectable: float | None = None,
    can_move: bool = True,
) -> str:
    """Return the word of `DECISIONS` for a difference, of which more is worse.

    An interval inside the margin is `equivalent` even where it excludes zero: a difference that small is no harm,
    however surely it is there. All in one unit. interval: of 95 %; None where there is none to be had. detectable: the
    smallest difference that the measure finds in four of five cases; None: not known. can_move: False where nothing
    could have changed the measure, as with one answer to all questions, or no skill to lose.
    """
    if not can_move or interval is None:
        return "powerless"
    low, high = interval
    if -margin < low and high < margin:
        return "equivalent"
    if low > 0 or high < 0:
        return "harm" if difference > 0 else "gain"
    return "powerless" if detectable is not None and detectable > margin else "undecided"


def decided(row: Mapping, margin: float, more_is_worse: bool = True, can_move: bool = True) -> dict:
    """Return the margin of a comparison's row, in its unit, and what its difference says, as `decide`.

    row: difference, ci (95 %, or None) and detectable (or None).
    """
    harm, ci = row["difference"], row["ci"]
    if not more_is_worse:
        harm, ci = -harm, ci and [-end for end in reversed(ci)]
    return {"margin": margin, "decision": decide(harm, ci, margin, row["detectable"], can_move)}


def correct(family: Sequence[dict], word: str = "decision") -> None:
    """Call `undecided`, in place, what is not beyond noise after Holm's correction over a family of decisions.

    family: rows with p_value (None: there is none) and, under the key `word`, a word of `DECISIONS`.
    """
    family = [row for row in family if row["p_value"] is not None and row[word] != "powerless"]
    for row, p_value in zip(family, holm([row["p_value"] for row in family]), strict=True):
        if row[word] in ("harm", "gain") and p_value > LEVEL:
            row[word] = "undecided"
