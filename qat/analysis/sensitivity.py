"""Say where the damage of W8A8 sits, from what `qat.studies.sensitivity` measured.

What a group of tensors does is a difference of two models on the same documents or questions: rounded alone, less
nothing rounded; or everything rounded, less everything but the group. Its noise is that of the documents or questions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import spearmanr

from qat.analysis.decisions import APE_THRESHOLD, correct, decided
from qat.analysis.measures import Answers
from qat.analysis.stats import holm, noise, student

WAYS = ("alone", "left_out")
_CHOSEN = (1, 2, 3, 5, 10)  # blocks left in BF16 whose model is measured


class Measure(NamedTuple):
    """Describe a measure of a model: its name, its unit, and what it is taken on."""

    name: str
    unit: str
    of_text: bool


MEASURES = {
    "loss": Measure("Loss", "nats a token", True),
    "kl": Measure("KL", "nats a token", True),
    "logprob": Measure("ln p of the right choice", "nats", False),
    "mass": Measure("Choice mass", "share", False),
    "cross_entropy": Measure("Choice cross-entropy", "nats", False),
}


def series(content: Mapping, level: str, measure: str, path: Sequence[str], source: str | None = None) -> np.ndarray:
    """Return what a model has, FP64 [documents or questions], in the order in which they were measured.

    path: of the model, as in ("alone", "12/weight"). source: one text, else all. Errors: KeyError where a unit lacks
    the model.
    """
    units = list(_units(content, level, MEASURES[measure].of_text, source))
    values = [_at(unit, path) for _, unit in units]
    if not MEASURES[measure].of_text:
        pairs = zip(units, values, strict=True)
        answers = Answers.of([sample for (_, unit), own in pairs for sample in _samples(unit, own)])
        right = np.take_along_axis(answers.logprobs, answers.target[:, None], axis=1)[:, 0]
        return {"logprob": right, "mass": answers.mass}.get(measure, answers.measures.get(measure))
    by_document: dict[tuple, list[float]] = {}
    for (text, unit), own in zip(units, values, strict=True):
        for document, value in zip(unit["documents"], own[measure], strict=True):
            by_document.setdefault((text, document), []).append(value)
    return np.array([np.mean(losses) for losses in by_document.values()])


def _units(content: Mapping, level: str, of_text: bool, source: str | None) -> Iterator[tuple[str, Mapping]]:
    for name, units in content["measured"].get(level, {}).items():
        for unit in units.values():
            if ("documents" in unit) == of_text and source in (None, name):
                yield name, unit


def _at(unit: Mapping, path: Sequence[str]) -> Mapping:
    for key in path:
        unit = unit[key]
    return unit


def _samples(unit: Mapping, values: Mapping) -> list[dict]:
    """Return the questions of a unit, which have equally many choices."""
    rows = np.reshape(values["logprobs"], (len(unit["targets"]), -1)).tolist()
    pairs = zip(rows, unit["targets"], strict=True)
    return [{"logprobs": row, "target": target, "choice": 0, "correct": 0} for row, target in pairs]


def sources(content: Mapping, level: str, measure: str) -> list[str]:
    """Return the texts, or the task, that a level was measured on."""
    return list(dict.fromkeys(name for name, _ in _units(content, level, MEASURES[measure].of_text, None)))


def names(content: Mapping, level: str, measure: str, way: str) -> list[str]:
    """Return the groups of a level that were measured so, in the model's order."""
    units = _units(content, level, MEASURES[measure].of_text, None)
    return next((list(unit.get(way, ())) for _, unit in units), [])


def total(content: Mapping, level: str, measure: str, source: str | None = None) -> dict:
    """Return what rounding everything does, on what a level was measured on."""
    ends = [series(content, level, measure, [end], source) for end in ("quantized", "unquantized")]
    return _row(ends[0] - ends[1], ends[1], measure)


def between_roles(content: Mapping, measure: str, source: str | None = None) -> dict:
    """Return what rounding weights alone does, less what rounding activations alone does; needs the level `role`."""
    weights, activations, plain = (
        series(content, "role", measure, path, source)
        for path in (("alone", "weight"), ("alone", "activation"), ("unquantized",))
    )
    return _row(weights - activations, plain, measure)


def rows(content: Mapping, level: str, measure: str, way: str, source: str | None = None) -> list[dict]:
    """Return what every group of a level does, a row each, in the measure's unit.

    group, difference, ci (95 %), p_value, p_holm (over the level), detectable, n; of the loss also margin and
    decision, of which harm and gain hold after Holm's correction.
    """
    groups = names(content, level, measure, way)
    if not groups:
        return []
    base = series(content, level, measure, ["unquantized" if way == "alone" else "quantized"], source)
    sign, plain = 1 if way == "alone" else -1, series(content, level, measure, ["unquantized"], source)
    effects = []
    for group in groups:
        changes = sign * (series(content, level, measure, [way, group], source) - base)
        effects.append({"group": group} | _row(changes, plain, measure))
    if measure == "loss":
        correct(effects)
    corrected = holm([row["p_value"] for row in effects])
    return [row | {"p_holm": 1.0 if p is None else p} for row, p in zip(effects, corrected, strict=True)]


def _row(changes: np.ndarray, plain: np.ndarray, measure: str) -> dict:
    mean = student(changes) if len(changes) > 1 else None
    row = {"difference": float(changes.mean()), "n": len(changes)} | noise(mean)
    return row | (decided(row, APE_THRESHOLD / 100 * float(plain.mean())) if measure == "loss" else {})


def order(content: Mapping) -> dict[int, float]:
    """Return what the rounding of each block alone does, as KL of both its roles; the largest first.

    Ranked by KL and not by loss: of a text that the unquantized model had written itself, the expected rise of the loss
    is the KL, whose noise between documents is far smaller. Alone and not left out: a block that is left out changes
    what all later ones round, and that noise is larger than what the block does.
    """
    moved: dict[int, float] = {}
    for row in rows(content, "block", "kl", "alone"):
        block = int(row["group"].partition("/")[0])
        moved[block] = moved.get(block, 0.0) + row["difference"]
    return dict(sorted(moved.items(), key=lambda pair: -pair[1]))


def first_choices(content: Mapping) -> list[list[int]]:
    """Return the sets of blocks to keep in BF16 whose models are measured."""
    blocks = list(order(content))
    return [sorted(blocks[:count]) for count in _CHOSEN if count < len(blocks)]


def choices(content: Mapping) -> list[dict]:
    """Return what is left of the damage with no further block in BF16 and with each of `first_choices`.

    blocks; expected: loss and KL of W8A8 times the share of the KL that is left, as if that added up; loss and kl: on
    other documents, less the unquantized model's, as `rows` has them, corrected over the sets; None where not measured.
    """
    whole = {measure: total(content, "block", measure)["difference"] for measure in ("loss", "kl")}
    moved, measured, sets = order(content), names(content, "kept", "kl", "left_out"), []
    for blocks in ([], *first_choices(content)):
        name = ",".join(map(str, blocks))
        share = 1 - sum(moved[block] for block in blocks) / whole["kl"] if whole["kl"] else 1.0
        row = {"blocks": blocks, "expected": {measure: share * value for measure, value in whole.items()}}
        sets.append(row | dict.fromkeys(whole))
        for measure in whole if name in measured or (measured and not blocks) else ():
            plain = series(content, "kept", measure, ["unquantized"])
            left = series(content, "kept", measure, ["left_out", name] if blocks else ["quantized"])
            sets[-1][measure] = _row(left - plain, plain, measure)
    correct([row["loss"] for row in sets if row["loss"]])
    return sets


def agreement(content: Mapping) -> tuple[list[int], float | None]:
    """Return the blocks in the order of Model-Optimizer's scores, and Spearman's correlation with ours: KL, alone.

    None where there is none: of one block, or of values that are all alike.
    """
    theirs, ours = {int(block): score for block, score in content["auto_quantize"].items()}, order(content)
    pairs = [(ours[block], score) for block, score in theirs.items()]
    varied = all(len(set(values)) > 1 for values in zip(*pairs, strict=True))
    correlation = float(spearmanr(pairs)[0]) if varied else None
    return sorted(theirs, key=lambda block: -theirs[block]), correlation
