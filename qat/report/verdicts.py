"""List for every recipe what W8A8 training does to it: the first screen of the report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from qat.analysis.compare import TASKS
from qat.analysis.decisions import DECISIONS
from qat.report.experiment import Experiment, distinct


def verdicts(experiments: Sequence[Experiment]) -> list[dict]:
    """Return a row for every recipe that was compared, of the first held-out text and of the accuracy of all tasks.

    recipe: its label; seeds: how many; text, answer, difference, ci, margin, detectable: of the held-out loss in W8A8
    less the baseline's, nats a token; tasks: {word: the tasks of which it is the answer}.
    """
    return [_row(label, recipe.comparison) for label, recipe in distinct(experiments).items() if recipe.comparison]


def _row(label: str, comparison: Mapping) -> dict:
    held = next(row for row in comparison["heldout"] if row["mode"] == "w8a8")
    row = {"recipe": label, "seeds": comparison["seeds"], "answer": held["decision"]}
    row |= {key: held[key] for key in ("text", "difference", "ci", "margin", "detectable")}
    words = defaultdict(list)
    for task in comparison["measures"]:
        if (task["mode"], task["measure"]) == ("w8a8", "accuracy") and task["task"] != "pooled":
            words[task["decision"]].append(TASKS.get(task["task"], task["task"]))
    return row | {"tasks": {word: words[word] for word in DECISIONS if word in words}}
