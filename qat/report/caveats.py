"""Say what the comparisons come to, and what a reader must know before believing a number."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from qat.analysis.compare import task_name
from qat.analysis.decisions import APE_THRESHOLD
from qat.report.experiment import Experiment, distinct, labels
from qat.report.text import heldout_verdict, qat_verdict, verdict
from qat.runs.folder import Run


def lead(experiments: Sequence[Experiment]) -> dict[str, list[str]]:
    """Return sentences: `open`, on what was not compared, and `sentences`, on loss, QAT and benchmarks."""
    if not _compared(experiments):
        return {"open": ["No quantized run has been compared with its BF16 baseline yet."], "sentences": []}
    recipes = {label: recipe for label, recipe in distinct(experiments).items() if recipe.comparison}
    compared = {label: recipe.comparison for label, recipe in recipes.items()}
    runs = sum(len(recipe.compared) for recipe in recipes.values())
    absent = []
    for e in experiments:
        absent += [part.label for part in (*e.pairs, *e.recipes) if part.missing]
        absent += [e.name] if not e.pairs and (e.absent or not e.configs) else []
        gone = sum(run.id in e.absent for run in e.runs)
        absent += [f"{e.name} ({gone} of {len(e.runs)} runs missing)"] if e.pairs and gone else []
    comparisons = compared.values()
    sentences = [_loss_verdict(comparisons, runs), heldout_verdict(comparisons), qat_verdict(comparisons)]
    return {
        "open": [f"Not compared: {', '.join(absent)}."] if absent else [],
        "sentences": [sentence for sentence in (*sentences, verdict(compared)) if sentence],
    }


def _loss_verdict(comparisons: Collection[Mapping], runs: int) -> str:
    """Return a sentence on the loss APE of recipes that so many runs were compared of."""
    apes = [comparison["loss"]["ape"] for comparison in comparisons]
    if not apes:
        return ""
    below = sum(comparison["loss"]["passes"] for comparison in comparisons)
    span = f"{min(apes):.2f} to {max(apes):.2f} %" if len(apes) > 1 else f"{apes[0]:.2f} %"
    what = f"recipes, of {runs} compared runs" if runs > len(apes) else "compared runs"
    ends = [comparison["loss"]["ci"] for comparison in comparisons if "ci" in comparison["loss"]]
    unsure = sum(low < APE_THRESHOLD <= high for low, high in ends)
    rest = f"; {unsure} of their intervals over seeds {'span' if unsure > 1 else 'spans'} it" if unsure else ""
    return f"Loss APE is below the paper's {APE_THRESHOLD} % threshold in {below} of {len(apes)} {what} ({span}){rest}."


def _compared(experiments: Sequence[Experiment]) -> dict[str, dict]:
    """Return {label: comparison} of every run that was compared, once."""
    names = labels(experiments)
    return {names[pair.run.id]: pair.comparison for e in experiments for pair in e.pairs if pair.comparison}


def caveats(experiments: Sequence[Experiment]) -> list[str]:
    """Return what limits the numbers: scores at chance, single seeds, what was not scored, unlike machines."""
    compared = _compared(experiments)
    tasks = [row for comparison in compared.values() for row in comparison["tasks"]]
    lines = _near_chance(experiments)
    seeds = {label: len(recipe.compared) for label, recipe in distinct(experiments).items() if recipe.compared}
    single = [label for label, count in seeds.items() if count == 1]
    if single:
        of = f"of {', '.join(single)}" if len(single) < len(seeds) else "a cell"
        lines.append(f"One seed {of}: intervals cover the choice of questions, not the noise between training runs.")
    if tasks and all(row["pretrained"] is None for row in tasks):
        lines.append("The pretrained checkpoint was not evaluated, so what BF16 training itself changed is unknown.")
    without = [label for label, comparison in compared.items() if not comparison["ptq"]]
    if without:
        lines.append(
            f"W8A8 without QAT (PTQ) was not scored beside {', '.join(without)}, so whether QAT was needed is unknown; "
            "scripts/eval.py scores it."
        )
    machines = {tuple(comparison["scored_on"]) for comparison in compared.values()}
    return lines + [
        f"A run and what it is compared with were scored by unlike machines or versions ({'; '.join(names)}), whose "
        "sums differ in their last bits."
        for names in sorted(machines)
        if len(names) > 1
    ]


def _near_chance(experiments: Sequence[Experiment]) -> list[str]:
    """Return a sentence on each task that BF16 runs answer no better than by guessing, and on which runs those are."""
    names, scores = labels(experiments), {}
    for comparison in _compared(experiments).values():
        for row in comparison["tasks"]:
            scores.setdefault(row["task"], {})[comparison["baseline"]] = row
    lines = []
    for task, rows in scores.items():
        near = {run: row for run, row in rows.items() if row["near_chance"]}
        if not near:
            continue
        first = next(iter(near.values()))
        which = "BF16" if len(near) == len(rows) else f"{', '.join(names[run] for run in near)} alone"
        span = " to ".join(dict.fromkeys(f"{end(row['baseline'] for row in near.values()):.1f}" for end in (min, max)))
        lines.append(
            f"{task_name(task)} in {which}, {span} % of {first['n']:,} questions, cannot be told from chance, "
            f"{first['chance']:.0f} % (binomial test, 5 %). A score at chance has nothing left to lose, so that it did "
            "not drop is no evidence of health."
        )
    return lines


def run_warnings(experiments: Sequence[Experiment]) -> list[str]:
    """Return what the runs themselves warned of while they trained."""
    runs = {name: run for e in experiments for name, run in e.existing.items()}
    return [line for run in runs.values() for line in _warnings(run)]


def _warnings(run: Run) -> list[str]:
    skipped = [str(row["step"]) for row in run.metrics() if row.get("skipped")]
    lines = [f"{run.id} skipped steps without a finite gradient: {', '.join(skipped)}."] if skipped else []
    # It repeats itself only to say that something became twice as bad: the last of a kind is the worst.
    worst = {(row.get("kind"), row.get("role")): row for row in run.warnings()}
    return lines + [f"{run.id}, step {row['step']}: {row['warning']}." for row in worst.values()]
