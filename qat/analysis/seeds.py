"""Runs that differ in nothing but their seed, as one comparison.

All of them answered the same questions and read the same text, so a difference from BF16 has two sources of noise: the
seed, and the choice of questions or documents. Intervals here cover both (`qat.analysis.stats.crossed`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qat.analysis.compare import APE_THRESHOLD, DROP_THRESHOLD, near_chance, qat_parts
from qat.analysis.results import EvalResult
from qat.analysis.stats import crossed, half_width

Side = tuple[dict[str, EvalResult], EvalResult]  # of one seed: the run by mode, and its baseline


def aggregate(comparisons: Sequence[dict], scored: Sequence[Side]) -> dict:
    """The mean of several comparisons (`qat.analysis.compare.compare`), one a seed, in the same form: scores, points
    and losses are means, `ci` is a 95 % interval over seeds and questions (or documents), `p_value` Student's, `lost`
    and `gained` are sums over the seeds. What not all of them have is left out.

    scored: what each compares (`qat.analysis.compare.sides`). Errors: UserError where one was scored in another way.
    """
    for _, reference in scored[1:]:
        reference.refuse_unlike(scored[0][1])
    apes = [each["loss"]["ape"] for each in comparisons]
    ape, half = float(np.mean(apes)), half_width(apes)
    tasks = list(dict.fromkeys(row["task"] for row in comparisons[0]["tasks"]))
    names = {key: [each[key] for each in comparisons] for key in ("run", "baseline", "ptq")}
    return {
        **{key: ", ".join(found) if all(found) else None for key, found in names.items()},
        "benchmark": comparisons[0]["benchmark"],
        "seeds": len(comparisons),
        "loss": {"ape": ape, "ci": [max(0.0, ape - half), ape + half], "passes": ape < APE_THRESHOLD},
        "heldout": [_heldout(rows, scored) for rows in _aligned(comparisons, "heldout", "text", "mode")],
        "qat": [_recovered(rows, scored) for rows in _aligned(comparisons, "qat", "text")],
        "tasks": [_answers(rows, scored, [rows[0]["task"]]) for rows in _aligned(comparisons, "tasks", "task", "mode")],
        "pooled": [_answers(rows, scored, tasks) for rows in _aligned(comparisons, "pooled", "mode")],
    }


def _aligned(comparisons: Sequence[dict], part: str, *keys: str) -> list[list[dict]]:
    """The rows of a part that every comparison has, one of each."""
    tables = [{tuple(row[key] for key in keys): row for row in each[part]} for each in comparisons]
    return [[table[name] for table in tables] for name in tables[0] if all(name in table for table in tables)]


def _interval(pairs: Sequence[tuple[EvalResult, EvalResult]], text: str, value: float) -> list[float] | None:
    """95 % around `value`, the mean of what the ones' losses on a text are above the others', one pair a seed; None of
    a single document, which has no noise to be had."""
    changes = np.array([ours.document_changes(text, other) for ours, other in pairs])
    return crossed(changes)._replace(value=value).interval() if changes.shape[1] > 1 else None


def _means(rows: Sequence[dict], *keys: str) -> dict:
    """Means over the rows of what they all have, else None."""
    columns = {key: [row.get(key) for row in rows] for key in keys}
    return {key: None if None in column else float(np.mean(column)) for key, column in columns.items()}


def _heldout(rows: Sequence[dict], scored: Sequence[Side]) -> dict:
    text, mode = rows[0]["text"], rows[0]["mode"]
    merged = {key: rows[0][key] for key in ("text", "mode", "documents")}
    merged |= _means(rows, "loss", "baseline", "pretrained", "difference", "kl")
    pairs = [(own[mode], reference) for own, reference in scored]
    return merged | {"ci": _interval(pairs, text, merged["difference"])}


def _recovered(rows: Sequence[dict], scored: Sequence[Side]) -> dict:
    text = rows[0]["text"]
    merged = {"text": text} | _means(rows, "ptq", "w8a8", "recovered")
    merged["ci"] = _interval([(own["ptq"], own["w8a8"]) for own, _ in scored], text, merged["recovered"])
    pairs = [qat_parts(own) for own, _ in scored]
    for part in pairs[0] if all(pairs) else ():
        difference = float(np.mean([row[part]["difference"] for row in rows]))
        merged[part] = {"difference": difference, "ci": _interval([each[part] for each in pairs], text, difference)}
    return merged


def _answers(rows: Sequence[dict], scored: Sequence[Side], tasks: Sequence[str]) -> dict:
    mode = rows[0]["mode"]
    merged = {key: rows[0][key] for key in ("task", "mode", "metric", "n", "chance") if key in rows[0]}
    merged |= _means(rows, "pretrained", "baseline", "score", "points")
    merged |= {key: sum(row[key] for row in rows) for key in ("lost", "gained")}

    def changes(own: dict[str, EvalResult], reference: EvalResult) -> list[int]:
        return [change for task in tasks for change in own[mode].answer_changes(task, reference)]

    mean = crossed(np.array([changes(*side) for side in scored], float), reach=1.0)
    baseline, points = merged["baseline"], merged["points"]
    drop = -100 * points / baseline if baseline else None
    return merged | {
        "ci": [100 * min(1.0, max(-1.0, end)) for end in mean.interval()],
        "p_value": mean.p_value(),
        "relative_drop": drop,
        "passes": None if drop is None else drop < DROP_THRESHOLD,
        "near_chance": "chance" in merged and near_chance(baseline, merged["n"], merged["chance"]),
    }
