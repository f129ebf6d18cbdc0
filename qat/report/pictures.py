"""Choose the panels of a run, of an experiment, and of the PNG pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from qat.analysis.compare import task_name
from qat.analysis.decisions import DROP_THRESHOLD
from qat.config import ROLES
from qat.report import panels
from qat.report.experiment import Curve, Experiment, Pair, Telemetry, tasks_of, told_apart
from qat.report.plots import Panel, png


def of_loss(pair: Pair, prefix: str = "") -> list[Panel]:
    """Return the training loss of a run over its baseline's, and the difference of the two."""
    if not len(pair.curve.steps):
        return []
    curves = {pair.config["quant"]["format"]: pair.curve}
    base = Curve.of(pair.baseline) if pair.baseline else None
    if base is None or not len(base.steps):
        return [panels.losses(curves, f"{prefix}Training loss")]
    ape = pair.comparison["loss"]["ape"] if pair.comparison else None
    difference = panels.loss_difference(pair.curve, base, ape, f"{prefix}Difference from BF16")
    return [panels.losses({"BF16": base} | curves, f"{prefix}Training loss"), difference]


def of_forgetting(pair: Pair) -> list[Panel]:
    """Return the loss on held-out texts while the run and its baseline trained."""
    baseline = Telemetry(pair.baseline.telemetry()) if pair.baseline else None
    return [panels.forgetting(pair.telemetry, baseline, "Held-out loss")] if pair.telemetry.texts else []


def of_overshoot(pair: Pair, prefix: str = "") -> list[Panel]:
    """Return the overshoot by role over blocks and steps; [] for current scaling, where it is 1 by construction."""
    if pair.config["scaling"]["algo"] == "current" or not len(pair.curve.steps):
        return []
    last = int(pair.curve.steps[-1])
    roles = [role for role in ROLES if any(r["overshoot"] is not None for r in pair.telemetry.tensors.get(role, ()))]
    title = {role: f"{prefix}{role.capitalize()}" for role in roles}
    return [panels.overshoot(pair.telemetry, role, title[role], last, role == roles[-1]) for role in roles]


def of_amax(pair: Pair) -> tuple[str | None, list[Panel]]:
    """Return the layer with the largest overshoot and its amax histories, a panel a role; as of `of_overshoot`."""
    layer = pair.telemetry.worst_layer() if of_overshoot(pair) else None
    roles = [role for role in ROLES if layer and len(pair.telemetry.amax_history(role, layer)[0])]
    return layer, [panels.amax(pair.telemetry, role, layer, int(pair.curve.steps[-1])) for role in roles]


def of_precision(pair: Pair) -> list[Panel]:
    """Return the mantissa bits left by role, and the share of weights that an update changes."""
    bits = [panels.mantissa_bits(pair.telemetry)] if pair.telemetry.tensors else []
    return bits + ([panels.updates(pair.telemetry)] if pair.telemetry.updates else [])


def of_blocks(pair: Pair) -> list[Panel]:
    """Return the mantissa bits left by block, a panel a role."""
    return [panels.mantissa_bits_by_block(pair.telemetry, role) for role in pair.telemetry.tensors]


def of_learning_rates(experiment: Experiment) -> list[Panel]:
    """Return the training losses of the BF16 runs of an experiment that has no other."""
    runs = [] if experiment.pairs else experiment.bf16
    runs = sorted(runs, key=lambda run: experiment.configs[run.id]["optim"]["lr"], reverse=True)
    labels = told_apart({run.id: experiment.configs[run.id] for run in runs})
    curves = {labels[run.id] or "BF16": Curve.of(run) for run in runs}
    curves = {label: curve for label, curve in curves.items() if len(curve.steps)}
    return [panels.losses(curves, "Training loss in BF16")] if curves else []


def of_differences(experiments: Sequence[Experiment]) -> list[Panel]:
    """Return the differences of all recipes in all modes: held-out loss by text, and answers of all tasks."""
    compared = [recipe for e in experiments for recipe in e.recipes if recipe.comparison]
    texts = dict.fromkeys(row["text"] for recipe in compared for row in recipe.comparison["heldout"])
    forests = []
    for text in texts:
        rows = [
            (recipe.label, {r["mode"]: panels.Estimate(r["difference"], r["ci"]) for r in shown}, None)
            for recipe in compared
            if (shown := [row for row in recipe.comparison["heldout"] if row["text"] == text])
        ]
        name = "Loss on held-out text" + (f", {text}" if len(texts) > 1 else "")
        forests.append(panels.forest(name, rows, "nats a token"))
    for measure, name in (("contrast", "Answer contrast"), ("bits_per_byte", "Continuations")):
        bits = [(recipe.label, _pooled(recipe.comparison, measure), None) for recipe in compared]
        if any(modes for _, modes, _ in bits):
            forests.append(panels.forest(name, bits, "bits per byte"))
    pooled = [
        (recipe.label, {row["mode"]: _points(row) for row in recipe.comparison["pooled"]}, None)
        for recipe in compared
        if recipe.comparison["pooled"]
    ]
    return forests + ([panels.forest("All questions of all tasks", pooled, "percentage points")] if pooled else [])


def _pooled(comparison: Mapping, measure: str) -> dict[str, panels.Estimate]:
    """Return the change of a measure of all answers by mode."""
    rows = [row for row in comparison["measures"] if (row["task"], row["measure"]) == ("pooled", measure)]
    return {row["mode"]: panels.Estimate(row["difference"], row["ci"]) for row in rows}


def of_scores(experiments: Sequence[Experiment], paper: Mapping) -> list[Panel]:
    """Return the differences of all recipes by task, in all modes, beside the paper's."""
    compared = [(e.name, recipe) for e in experiments for recipe in e.recipes if recipe.comparison]
    tasks = [row for _, recipe in compared for row in recipe.comparison["tasks"] if row["mode"] != "control"]
    limits = [abs(limit) for row in tasks for limit in row["ci"]]
    forests = []
    for task in tasks_of([row["task"] for row in recipe.comparison["tasks"]] for _, recipe in compared):
        rows = []
        for name, recipe in compared:
            own = [row for row in recipe.comparison["tasks"] if row["task"] == task and row["can_move"]]
            modes = {row["mode"]: _points(row) for row in own}
            score = paper["experiments"].get(name, {}).get("scores", {}).get(task, {})
            rows.append((recipe.label, modes, score["quantized"] - score["bf16"] if "quantized" in score else None))
        forests.append(panels.forest(task_name(task), rows, "percentage points", 1.04 * max(limits)))
    return forests


def _points(row: Mapping) -> panels.Estimate:
    return panels.Estimate(row["points"], row["ci"], -row["baseline"] * DROP_THRESHOLD / 100)


def write_pictures(experiments: Sequence[Experiment], paper: Mapping, out: Path) -> dict[str, str]:
    """Draw the PNG pictures into `out`; return {file name: what it shows} of those that have content."""
    pairs = [(recipe.compared or recipe.pairs)[0] for e in experiments for recipe in e.recipes]  # of several seeds one
    legend = "    ".join(f"{mark} {meaning}" for mark, meaning in panels.score_legend().items())
    loss = [replace(p, width=340) for pair in pairs for p in of_loss(pair, f"{pair.label} · ")[1:]]
    overshoot = [panel for pair in pairs for panel in of_overshoot(pair, f"{pair.label} · ")]
    colour = "colour: largest amax / predicted amax among a block's linears"
    pictures = {
        "deltas.png": (of_scores(experiments, paper), 2, legend, "Score differences from BF16 with 95 % intervals"),
        "loss.png": (loss, 3, "", "Training loss relative to BF16"),
        "overshoot.png": (overshoot, 3, colour, "Overshoot of the predicted amax by block and step"),
    }
    out.mkdir(parents=True, exist_ok=True)  # after everything that is drawn has been read
    for name, (drawn, columns, note, _) in pictures.items():
        if drawn:
            png(drawn, columns, out / name, note)
    return {name: shows for name, (drawn, _, _, shows) in pictures.items() if drawn}
