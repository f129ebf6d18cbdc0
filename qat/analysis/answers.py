"""Compare answers to questions with the baseline's: accuracy, and what the log-probabilities of the choices say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qat.analysis.decisions import DROP_THRESHOLD, decided
from qat.analysis.measures import MEASURES, Answers
from qat.analysis.results import EvalResult, Match, mean_of
from qat.analysis.stats import LEVEL, above_chance, detectable, mcnemar, noise, paired_mean, tang, tango


def task_row(matches: Sequence[Match], task: str, mode: str) -> dict:
    """Return the answers to a task, and how unlike the baseline's they are for better or worse: flips and choice mass
    as shares, choice KL in nats (`qat.analysis.measures`)."""
    row = {"task": task, "mode": mode} | pooled_answers(matches, [task], mode)
    chance = 100 * matches[0].reference.record["tasks"][task]["chance"]
    pairs = [(m.own[mode].answers[task], m.reference.answers[task]) for m in matches]
    diagnosis = {
        "flips": float(np.mean([own.flips(reference) for own, reference in pairs])),
        "choice_kl": float(np.mean([own.kl(reference) for own, reference in pairs])),
        "mass": float(np.mean([own.mass for own, _ in pairs])),
        "baseline_mass": float(np.mean([reference.mass for _, reference in pairs])),
        "can_move": any(own.can_move(reference) for own, reference in pairs),
        "bits_per_byte": _bits_per_byte(pairs),
    }
    near_chance = _near_chance(row["baseline"], row["n"], chance)
    return row | diagnosis | {"chance": chance, "near_chance": near_chance}


def _bits_per_byte(pairs: Sequence[tuple[Answers, Answers]]) -> list[float] | None:
    """Return the mean changes of bits per byte of right and wrong answers; None where there are no choices of text."""
    if pairs[0][0].sizes is None or pairs[0][0].logprobs.shape[1] == 1:
        return None
    sides = (zip(own.bits_per_byte, reference.bits_per_byte, strict=True) for own, reference in pairs)
    return np.mean([[(a - b).mean() for a, b in side] for side in sides], axis=0).tolist()


def _near_chance(score: float, n: int, chance: float) -> bool:
    """Return whether a score of n questions, in percent as chance, is not told from guessing.

    Below chance a drop says as little as at chance, so the test is one-sided.
    """
    return above_chance(round(score * n / 100), n, chance / 100) > LEVEL


def pooled_answers(matches: Sequence[Match], tasks: Sequence[str], mode: str) -> dict:
    """Return what the answers to all questions of some tasks come to, as one test."""

    def percent(results: Sequence[EvalResult | None]) -> float | None:
        return mean_of([result and 100 * float(result.outcomes.pooled(tasks).mean()) for result in results])

    baseline, score = percent([m.reference for m in matches]), percent([m.own[mode] for m in matches])
    changes = np.array([m.changes[mode].pooled(tasks) for m in matches])
    lost, gained, n = int((changes < 0).sum()), int((changes > 0).sum()), changes.shape[1]
    drop = 100 * (baseline - score) / baseline if baseline else None
    row = {"pretrained": percent([m.origin for m in matches]), "baseline": baseline, "score": score}
    row |= {"points": score - baseline, "lost": lost, "gained": gained, "n": n}
    row |= {"relative_drop": drop, "passes": None if drop is None else drop < DROP_THRESHOLD}
    if len(matches) > 1:
        return row | noise(paired_mean(100 * changes, reach=100.0))
    ratio = tang(round(baseline * n / 100) - lost, lost, gained)
    return row | {
        "ci": [100 * end for end in tango(lost, gained, n)],
        "relative_drop_ci": ratio and [100 * (1 - end) for end in reversed(ratio)],
        "p_value": mcnemar(lost, gained),
        "detectable": 100 * detectable(lost + gained, n),
    }


def measure_rows(matches: Sequence[Match], tasks: Sequence[str], mode: str) -> list[dict]:
    """Return what each of `MEASURES` says of every task, and of all that it can see as `pooled`, a row each.

    value, baseline, difference, ci, margin and detectable are in the measure's unit, of several seeds means; n:
    questions; tasks: which were pooled, those with skill where the measure is about skill.
    """
    rows = []
    for name, measure in MEASURES.items():
        own = [task for task in tasks if name in matches[0].reference.answers[task].measures]
        rows += [{"task": task} | _measure(matches, [task], mode, name) for task in own]
        seen = [task for task in own if not measure.of_skill or _has_skill(matches, task, name)] or own
        if own:
            rows += [{"task": "pooled", "tasks": seen} | _measure(matches, seen, mode, name)]
    return rows


def _measure(matches: Sequence[Match], tasks: Sequence[str], mode: str, name: str) -> dict:
    """Return one measure of the answers to the questions of some tasks."""
    measure, row = MEASURES[name], {"mode": mode, "measure": name}
    if name == "accuracy":
        answers = pooled_answers(matches, tasks, mode)
        row |= {"value": answers["score"], "difference": answers["points"]}
        row |= {key: answers[key] for key in ("baseline", "ci", "p_value", "detectable", "n")}
        pairs = [(m.own[mode].answers[task], m.reference.answers[task]) for m in matches for task in tasks]
        can_move = any(own.can_move(reference) for own, reference in pairs)
        return row | decided(row, row["baseline"] * measure.margin / 100, measure.more_is_worse, can_move)
    baseline, value = (
        float(np.mean([result.outcomes.pooled(tasks, name) for result in results]))
        for results in ([m.reference for m in matches], [m.own[mode] for m in matches])
    )
    row |= {"value": value, "baseline": baseline, "difference": value - baseline}
    row |= {"n": sum(len(matches[0].reference.answers[task].target) for task in tasks)}
    row |= noise(paired_mean(np.array([m.changes[mode].pooled(tasks, name) for m in matches])))
    if not measure.of_skill:
        return row | decided(row, baseline * measure.margin / 100)
    skills = _skills(matches, tasks, name)
    row["skill"] = float(skills.mean())
    has_skill = any(_has_skill(matches, task, name) for task in tasks)
    return row | decided(row, max(0.0, row["skill"]) * measure.margin / 100, can_move=has_skill)


def _skills(matches: Sequence[Match], tasks: Sequence[str], measure: str) -> np.ndarray:
    """Return the baselines' skill, FP64 [seeds, questions]."""
    return np.array([np.concatenate([m.reference.answers[task].skill(measure) for task in tasks]) for m in matches])


def _has_skill(matches: Sequence[Match], task: str, measure: str) -> bool:
    """Return whether the baselines know more than a guess, beyond the noise of questions and seeds (one-sided, 5 %)."""
    mean = paired_mean(_skills(matches, [task], measure))
    return mean is not None and mean.interval(1 - 2 * LEVEL)[0] > 0
