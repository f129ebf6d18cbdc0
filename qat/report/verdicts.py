"""List what W8A8 training does to every recipe: the first screen of the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from qat.analysis.compare import MODES
from qat.analysis.decisions import correct
from qat.analysis.measures import MEASURES
from qat.report.experiment import Experiment, distinct

_POOLED = ("contrast", "bits_per_byte", "accuracy")  # of the measures of answers, those on the first screen
_NUMBERS = ("difference", "ci", "margin", "detectable", "p_value")


def verdicts(experiments: Sequence[Experiment]) -> list[dict]:
    """Return a row for every recipe that was compared and every way in which it was scored.

    recipe: its label; mode: of `qat.analysis.compare.MODES`; seeds: how many; answers: as `answers`, of which harm and
    gain hold after Holm's correction over the recipes.
    """
    rows = []
    for label, recipe in distinct(experiments).items():
        if recipe.comparison:
            rows += [row | {"recipe": label} for row in comparison_rows(recipe.comparison)]
    _correct(rows)
    return rows


def comparison_rows(comparison: Mapping) -> list[dict]:
    """Return a row for every way in which one recipe was scored, W8A8 first: mode, seeds and `answers`."""
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in comparison["heldout"])]
    return [{"mode": mode, "seeds": comparison["seeds"], "answers": answers(comparison, mode)} for mode in modes]


def answers(comparison: Mapping, mode: str) -> dict[str, dict]:
    """Return what is decided: {measure: answer, name, unit, and difference, ci, margin, detectable in that unit}.

    Of the loss on every held-out text, and of the pooled measures of the answers to questions.
    """
    shown = {}
    for row in comparison["heldout"]:
        if row["mode"] == mode:
            shown[row["text"]] = {"name": f"Loss, {row['text']}", "unit": "nats"} | _numbers(row)
    for row in comparison["measures"]:
        if row["mode"] == mode and row["task"] == "pooled" and row["measure"] in _POOLED:
            measure = MEASURES[row["measure"]]
            shown[row["measure"]] = {"name": measure.name, "unit": measure.unit} | _numbers(row)
    return shown


def _numbers(row: Mapping) -> dict:
    return {"answer": row["decision"]} | {key: row[key] for key in _NUMBERS}


def _correct(rows: Sequence[Mapping]) -> None:
    """Call `undecided` what is not beyond noise after Holm's correction over the recipes, measure by measure."""
    families = defaultdict(list)
    for row in rows:
        for name, answer in row["answers"].items():
            families[row["mode"], name].append(answer)
    for family in families.values():
        correct(family, "answer")
