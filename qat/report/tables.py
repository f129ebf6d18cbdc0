"""Make the report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qat.analysis.compare import MODES, TASKS, pretrained_record, pretrained_run, task_name
from qat.analysis.decisions import APE_THRESHOLD, DROP_THRESHOLD
from qat.analysis.measures import MEASURES
from qat.report.cells import Cell, Table, text_table
from qat.report.experiment import Curve, Experiment, Recipe, scientific, tasks_of, unlike
from qat.report.text import can_move, change, heading, interval, number, p_text, remark, resolved, setting_text, signed

PASS, FAIL = "✓", "✗"


def verdicts(rows: Sequence[Mapping]) -> Table:
    """Return the first screen, from `qat.report.verdicts`: a recipe and mode a row, a measure a column."""
    columns = {name: answer for row in rows for name, answer in row["answers"].items()}
    cells = []
    for row in rows:
        recipe = row.get("recipe", "") if row["mode"] == "w8a8" else ""
        of_row = [_answer(row["answers"].get(name)) for name in columns]
        cells.append([Cell(recipe, strong=bool(recipe)), Cell(MODES[row["mode"]]), *of_row])
    heads = [heading(answer["name"], answer["unit"]) for answer in columns.values()]
    return Table(["Recipe", "Scored as", *heads], cells)


def _answer(answer: Mapping | None) -> Cell:
    if answer is None:
        return Cell("–")
    digits = 1 if answer["unit"] == "points" else 4
    aside = f"{change(answer['difference'], answer['ci'], digits)}\nmargin {answer['margin']:.{digits}f}"
    if answer["detectable"] is not None:
        aside += f", detectable {answer['detectable']:.{digits}f}"
    return Cell(answer["answer"], aside, strong=True)


def summary(experiments: Sequence[Experiment], paper: Mapping) -> Table:
    """Return relative drops and APE of every recipe in every mode and of the checkpoint, beneath the paper's."""
    compared = [recipe.comparison for e in experiments for recipe in e.recipes if recipe.comparison]
    tasks = tasks_of([[row["task"] for row in c["tasks"]] for c in compared]) or tasks_of([TASKS])
    rows = []
    for experiment in experiments:
        if experiment.bf16 and not experiment.pairs and not experiment.absent:
            continue  # BF16 only: shown with the baselines
        entry = paper["experiments"].get(experiment.name, {})
        rows.append([Cell(experiment.name), Cell("paper"), *_paper_cells(entry, tasks)])
        for recipe in experiment.recipes:
            rows += _recipe_rows(experiment, recipe, tasks)
        if not experiment.pairs:
            rows.append([Cell(""), Cell("no run yet"), *[Cell("–")] * (len(tasks) + 1)])
    return Table(["", "Source", "Loss APE %", *(f"{task_name(t)}, drop %" for t in tasks)], rows)


def _paper_cells(entry: Mapping, tasks: Sequence[str]) -> list[Cell]:
    ape, log = entry.get("ape"), entry.get("ape_log", "–")
    cells = [Cell(str(log), "from its log" if "ape_log" in entry else "")]
    if ape is not None:
        cells = [Cell(f"{ape:.2f}", f"log: {log}", _mark(ape < APE_THRESHOLD))]
    for task in tasks:
        scores = entry.get("scores", {}).get(task, {})
        drop, moved = scores.get("drop"), "quantized" in scores
        aside = f"{scores['bf16']:.2f} → {scores['quantized']:.2f}" if moved else ""
        cells.append(Cell("–") if drop is None else Cell(f"{drop:.2f}", aside, _mark(drop < DROP_THRESHOLD)))
    return cells


def _ape(loss: Mapping, mark: str = "") -> Cell:
    return Cell(f"{loss['ape']:.3f}", interval(loss["ci"], 3, "") if "ci" in loss else "", mark)


def _recipe_rows(experiment: Experiment, recipe: Recipe, tasks: Sequence[str]) -> list[list[Cell]]:
    which, comparison = recipe.label.removeprefix(experiment.name).strip(), recipe.comparison
    if comparison is None:
        return [[Cell(""), Cell("not compared", which), *[Cell("–")] * (len(tasks) + 1)]]
    loss, tested = comparison["loss"], {(r["task"], r["mode"]): r for r in comparison["tasks"]}
    low, high = loss.get("ci", [loss["ape"]] * 2)
    ape = _ape(loss, _mark(loss["passes"], not low < APE_THRESHOLD <= high))
    rows = []
    for mode, name in MODES.items():
        if not any(mode == scored for _, scored in tested):
            continue
        cells = [_drop(tested[task, mode]) if (task, mode) in tested else Cell("–") for task in tasks]
        rows.append([Cell(""), Cell(f"ours, {name}", which), ape if mode == "w8a8" else Cell(""), *cells])
    if any(row.get("pretrained") is not None for row in tested.values()):
        cells = [_pretrained_drop(tested[task, "w8a8"]) if (task, "w8a8") in tested else Cell("–") for task in tasks]
        rows.append([Cell(""), Cell("ours, pretrained", which), Cell(""), *cells])
    return rows


def _pretrained_drop(row: Mapping) -> Cell:
    """Return what the checkpoint lacks of the score that BF16 training led to."""
    start, trained = row["pretrained"], row["baseline"]
    return Cell(signed(100 * (trained - start) / trained, plus="") if trained else "–", f"{trained:.2f} → {start:.2f}")


def _drop(row: Mapping) -> Cell:
    if not can_move(row):
        return Cell("powerless", remark(row))
    drop = "–" if row["relative_drop"] is None else signed(row["relative_drop"], plus="")
    aside = f"{change(row['points'], row['ci'], 1)} points, -{row['lost']}/+{row['gained']}, "
    aside += f"p {p_text(row['p_value'])}{', near chance' if row['near_chance'] else ''}"
    return Cell(drop, aside, "" if row["passes"] is None else _mark(row["passes"], resolved(row)))


def _mark(passes: bool, sure: bool = True) -> str:
    mark = PASS if passes else FAIL
    return mark if sure else f"({mark})"


def measures(comparison: Mapping) -> Table:
    """Return what the log-probabilities of the choices say of every task in every mode, and of all tasks pooled."""
    measured = {(row["task"], row["mode"], row["measure"]): row for row in comparison["measures"]}
    names = [name for name in MEASURES if name != "accuracy" and any(name == key[2] for key in measured)]
    diagnoses = {(row["task"], row["mode"]): row for row in comparison["tasks"]}
    rows = []
    for task, mode in dict.fromkeys(key[:2] for key in measured):
        cells = [_measure(measured.get((task, mode, name))) for name in names]
        rows.append([Cell(task_name(task)), Cell(MODES[mode]), *cells, *_diagnosis(diagnoses.get((task, mode)))])
    heads = ["Answers of", "Mode", *(heading(MEASURES[name].name, MEASURES[name].unit) for name in names)]
    return Table([*heads, "Flips", "Choice KL, nats", "Choice mass", "Bits per byte, right and wrong answers"], rows)


def _measure(row: Mapping | None) -> Cell:
    if row is None:
        return Cell("–")
    aside = f"{row['decision']}; BF16 {row['baseline']:.4f}, detectable {number(row['detectable'], 4)}"
    return Cell(change(row["difference"], row["ci"]), aside)


def _diagnosis(row: Mapping | None) -> list[Cell]:
    if row is None:
        return [Cell("–")] * 4
    mass = f"{row['baseline_mass']:.3g} → {row['mass']:.3g}"
    bits = ", ".join(signed(change, 4) for change in row["bits_per_byte"]) if row["bits_per_byte"] else "–"
    return [Cell(f"{100 * row['flips']:.1f} %"), Cell(f"{row['choice_kl']:.4f}"), Cell(mass), Cell(bits)]


def settings(run: Mapping, baseline: Mapping) -> Table:
    """Return the settings in which the configs of a run and its baseline differ."""
    rows = [[key, *map(setting_text, row.values())] for key, row in unlike({"run": run, "baseline": baseline}).items()]
    return text_table(["Setting", "Run", "Baseline"], rows)


def configurations(configs: Mapping[str, Mapping]) -> Table:
    """Return the settings in which any of the configs {label: config} differ, a row for every config."""
    columns = unlike(configs)
    rows = [[label, *(setting_text(column[label]) for column in columns.values())] for label in configs]
    return text_table(["Run", *columns], rows if columns else [])


def baselines(experiments: Sequence[Experiment], paper: Mapping) -> Table:
    """Return scores (percent, with standard errors) and losses of the pretrained checkpoint and the BF16 runs."""
    runs = {run.id: (run, e.configs[run.id]) for e in experiments for run in e.bf16}
    starts, records = {}, {}
    for run, config in runs.values():
        benchmark = config["benchmark"]["name"]
        records[run.id] = run.evaluations().get(benchmark, {}).get("bf16", {})
        if origin := pretrained_run(run):
            starts[origin.id] = pretrained_record(run, benchmark)
    records = starts | records
    names = tasks_of(record.get("tasks", {}) for record in records.values()) or tasks_of([TASKS])
    rows = []
    for name, record in records.items():
        run, config = runs.get(name, (None, None))
        loss = Curve.of(run).loss if run else []
        scores = {t: f"{100 * r['score']:.2f} ± {100 * r['stderr']:.2f}" for t, r in record.get("tasks", {}).items()}
        held = ", ".join(f"{name} {text['loss']:.4f}" for name, text in record.get("heldout", {}).items())
        cells = [scientific(config["optim"]["lr"]) if run else "–"]
        cells += [f"{loss[-1]:.4f}" if len(loss) else "–", held or "–"]
        label = name if run else "pretrained checkpoint"
        rows.append([label, *cells, *(scores.get(task, "–") for task in names)])
    for name in ("exp1", "exp8"):
        entry = paper["experiments"][name]
        known = {task: row["bf16"] for task, row in entry["scores"].items()}  # a number, or a list
        scores = {task: "/".join(f"{score:.2f}" for score in np.atleast_1d(bf16)) for task, bf16 in known.items()}
        cells = [scientific(entry["lr"][-1]), f"{entry['loss']['bf16']:.4f}", "–"]
        rows.append([f"paper, {name} BF16", *cells, *(scores.get(task, "–") for task in names)])
    header = ["Weights", "Learning rate", "Final loss, nats", "Held-out loss, nats"]
    return text_table([*header, *(f"{task_name(t)} %" for t in names)], rows)


def disagreements(paper: Mapping) -> Table:
    """Return where the paper's text and its released code or logs part."""
    rows = [[str(i), row["says"], row["did"], row["switch"]] for i, row in enumerate(paper["disagreements"], start=1)]
    return text_table(["", "The text", "The released code and logs", "Our switch: the text's value, the code's"], rows)
