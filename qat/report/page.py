"""Puts tables, figures and sentences together, once for the page and once for Markdown."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import jinja2
import yaml
from markupsafe import Markup, escape

from qat.analysis.compare import APE_THRESHOLD, TASKS
from qat.report import pictures, tables
from qat.report.experiment import Experiment, Pair, distinct, published, scientific, told_apart
from qat.report.panels import score_legend, share_legend
from qat.report.pictures import write_pictures
from qat.report.plots import PALETTE, svg
from qat.report.studies import studies_in
from qat.report.text import heldout_verdict, loss_text, qat_verdict, verdict
from qat.runs.folder import Run
from qat.utils.environment import brief, commit_name, hardware_name

TITLE = "HiF8 W8A8 training against matched BF16 baselines"


def render(
    experiments: Sequence[Experiment], paper: Mapping, context: Mapping, images: Mapping, studies: Sequence[Mapping]
) -> tuple[str, str]:
    """Return the report as (HTML, Markdown). `images` are the README's pictures, {file name: what it shows}; `studies`
    are of `studies_in`."""
    folder = Path(__file__).parent
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), **options)
    page = environment.overlay(autoescape=True)
    page.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    page.filters["minus"] = _minus
    page.filters["command"] = _command
    numbers = itertools.count(1)
    page.filters["svg"] = lambda panel: svg(panel, next(numbers))
    view = _view(experiments, paper, context) | {"images": images, "studies": studies, "palette": PALETTE}
    return page.get_template("template.html").render(view), environment.get_template("template.md").render(view)


def _view(experiments: Sequence[Experiment], paper: Mapping, context: Mapping) -> dict:
    return {
        "title": TITLE,
        "lead": _lead(experiments),
        "provenance": _provenance(experiments) | context,
        "paper": paper["paper"],
        "glance": tables.overview(experiments, paper),
        "summary": tables.summary(experiments, paper),
        "forests": [*pictures.of_differences(experiments), *pictures.of_scores(experiments, paper)],
        "score_legend": score_legend(),
        "resolution": tables.resolution(experiments),
        "seeds": tables.seeds(experiments),
        "floor": tables.rerun_noise(experiments),
        "cautions": _caveats(experiments),
        "baselines": tables.baselines(experiments, paper),
        "experiments": _experiments(experiments, paper["experiments"]),
        "disagreements": tables.disagreements(paper),
        "configurations": _configurations(experiments),
        "share_legend": share_legend(),
    }


def _lead(experiments: Sequence[Experiment]) -> list[str]:
    """Return the verdict: loss, benchmarks, and what is not known."""
    if not _compared(experiments):
        return ["No quantized run has been compared with its BF16 baseline yet."]
    recipes = {label: recipe for label, recipe in distinct(experiments).items() if recipe.comparison}
    compared = {label: recipe.comparison for label, recipe in recipes.items()}
    runs = sum(len(recipe.compared) for recipe in recipes.values())
    absent = []
    for e in experiments:
        absent += [each.label for each in (*e.pairs, *e.recipes) if each.missing]
        absent += [e.name] if not e.pairs and (e.absent or not e.configs) else []
        gone = sum(run.id in e.absent for run in e.runs)
        absent += [f"{e.name} ({gone} of {len(e.runs)} runs missing)"] if e.pairs and gone else []
    lines = (
        _loss_verdict(compared.values(), runs),
        heldout_verdict(compared.values()),
        qat_verdict(compared.values()),
        verdict(compared),
        f"Not compared: {', '.join(absent)}." if absent else "",
    )
    return [line for line in lines if line]


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


def _labels(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return {run id: label}; a run that several experiments share is under all their names."""
    labels = {}
    for pair in (pair for e in experiments for pair in e.pairs):
        labels[pair.run.id] = f"{labels[pair.run.id]}/{pair.label}" if pair.run.id in labels else pair.label
    plain = told_apart({run.id: e.configs[run.id] for e in experiments for run in e.bf16})
    return labels | {name: f"BF16 {label}".strip() for name, label in plain.items()}


def _compared(experiments: Sequence[Experiment]) -> dict[str, dict]:
    """Return {label: comparison}, each run once."""
    labels = _labels(experiments)
    return {labels[pair.run.id]: pair.comparison for e in experiments for pair in e.pairs if pair.comparison}


def _caveats(experiments: Sequence[Experiment]) -> list[str]:
    """Return what a reader must know before believing a number."""
    rows = [row for comparison in _compared(experiments).values() for row in comparison["tasks"]]
    found = _near_chance(experiments)
    seeds = {label: len(recipe.compared) for label, recipe in distinct(experiments).items() if recipe.compared}
    alone = [label for label, count in seeds.items() if count == 1]
    if alone:
        of = f"of {', '.join(alone)}" if len(alone) < len(seeds) else "a cell"
        found.append(f"One seed {of}: intervals cover the choice of questions, not the noise between training runs.")
    if rows and all(row["pretrained"] is None for row in rows):
        found.append("The pretrained checkpoint was not evaluated, so what BF16 training itself changed is unknown.")
    without = [label for label, comparison in _compared(experiments).items() if not comparison["ptq"]]
    if without:
        found.append(
            f"W8A8 without QAT (PTQ) was not scored beside {', '.join(without)}, so whether QAT was needed is unknown; "
            "scripts/eval.py scores it."
        )
    moved = {tuple(each["scored_on"]) for each in _compared(experiments).values()}
    found += [
        f"A run and what it is compared with were scored by unlike machines or versions ({'; '.join(by)}), whose "
        "sums differ in their last bits."
        for by in sorted(moved)
        if len(by) > 1
    ]
    runs = {run.id: run for e in experiments for run in (*e.runs, *e.baselines) if run.id in e.configs}
    return found + [line for run in runs.values() for line in _warnings(run)]


def _near_chance(experiments: Sequence[Experiment]) -> list[str]:
    """Return a sentence on each task that BF16 runs answer no better than by guessing, and on which runs those are."""
    labels, scores = _labels(experiments), {}
    for comparison in _compared(experiments).values():
        for row in comparison["tasks"]:
            scores.setdefault(row["task"], {})[comparison["baseline"]] = row
    found = []
    for task, rows in scores.items():
        near = {run: row for run, row in rows.items() if row["near_chance"]}
        if not near:
            continue
        of = next(iter(near.values()))
        which = "BF16" if len(near) == len(rows) else f"{', '.join(labels[run] for run in near)} alone"
        span = " to ".join(dict.fromkeys(f"{end(row['baseline'] for row in near.values()):.1f}" for end in (min, max)))
        found.append(
            f"{TASKS.get(task, task)} in {which}, {span} % of {of['n']:,} questions, cannot be told from chance, "
            f"{of['chance']:.0f} % (binomial test, 5 %). A score at chance has nothing left to lose, so that it did "
            "not drop is no evidence of health."
        )
    return found


def _warnings(run: Run) -> list[str]:
    """Return what the run itself noticed while it trained."""
    skipped = [str(row["step"]) for row in run.metrics() if row.get("skipped")]
    lines = [f"{run.id} skipped steps without a finite gradient: {', '.join(skipped)}."] if skipped else []
    # It repeats itself only to say that something became twice as bad: the last of a kind is the worst.
    worst = {(row.get("kind"), row.get("role")): row for row in run.warnings()}
    return lines + [f"{run.id}, step {row['step']}: {row['warning']}." for row in worst.values()]


def _provenance(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return what the runs' own configs say; several values where they differ."""
    configs = [config for e in experiments for config in e.configs.values()]
    runs = {run.id: run for e in experiments for run in (*e.runs, *e.baselines)}
    environments = [environment for run in runs.values() for environment in run.environments()]
    lines = {
        "Model": [c["model"]["name"] for c in configs],
        "Data": [c["data"]["name"] for c in configs],
        "Budget": [c["budget"]["name"] for c in configs],
        "Length": _lengths(experiments),
        "Protocol": [c["protocol"] for c in configs],
        "Seed": [str(c["seed"]) for c in configs],
        "Benchmark": [c["benchmark"]["name"] for c in configs],
        "Hardware": [hardware_name(e) for e in environments],
        "Arithmetic": [c["budget"]["arithmetic"].upper() for c in configs],
        "Versions": [", ".join(map(" ".join, e["packages"].items())) for e in environments],
        "Code": [commit_name(e["git"]) for e in environments if e["git"]],
    }
    return {label: "; ".join(dict.fromkeys(values)) for label, values in lines.items() if values}


def _lengths(experiments: Sequence[Experiment]) -> list[str]:
    """Steps and batch, each with the experiments that have it where they are several."""
    names: dict[str, dict[str, None]] = {}
    for e in experiments:
        for config in e.typed.values():
            names.setdefault(config.size, {})[e.name] = None
    return [f"{size} ({', '.join(those)})" for size, those in names.items()] if len(names) > 1 else list(names)


def _experiments(experiments: Sequence[Experiment], entries: Mapping) -> list[dict]:
    shown: dict[str, str] = {}  # run id -> the experiment that has shown it: some recipes come to the same run
    return [_experiment(experiment, entries.get(experiment.name, {}), shown) for experiment in experiments]


def _experiment(experiment: Experiment, entry: Mapping, shown: dict[str, str]) -> dict:
    missing = [each.missing for each in (*experiment.pairs, *experiment.recipes) if each.missing]
    absent = experiment.absent or ([] if experiment.configs else [experiment.name])
    missing += [f"{name} has not been run yet; make it: {experiment.command}" for name in absent]
    runs = {run.id: run for run in (*experiment.runs, *experiment.baselines) if run.id in experiment.configs}
    pairs = [_pair(pair, experiment, shown) for pair in experiment.pairs]
    return {
        "name": experiment.name,
        "title": entry.get("title", ""),
        "question": entry.get("question", ""),
        "recipe": entry.get("recipe", ""),
        "notes": entry.get("notes", []),
        "missing": missing,
        "curves": pictures.of_learning_rates(experiment),
        "pairs": pairs,
        "runs": {name: _details(run, experiment.configs[name]) for name, run in runs.items()},
    }


def _configurations(experiments: Sequence[Experiment]) -> tables.Table:
    configs = {name: config for e in experiments for name, config in e.configs.items()}
    return tables.configurations({label: configs[name] for name, label in _labels(experiments).items()})


def _pair(pair: Pair, experiment: Experiment, shown: dict[str, str]) -> dict:
    compared, first = pair.comparison, shown.setdefault(pair.run.id, experiment.name)
    again = first != experiment.name
    return {
        "label": pair.label,
        "recipe": _recipe(pair, experiment.typed[pair.run.id].bf16_warmup_steps),
        "runs": f"{pair.run.id} against {pair.baseline.id}" if pair.baseline else pair.run.id,
        "same_as": first if again else "",
        "sentences": [loss_text(compared), qat_verdict([compared]), verdict({"": compared})] if compared else [],
        "tasks": tables.tasks(compared) if compared and not again else None,
        "heldout": tables.heldout(compared) if compared and compared["heldout"] and not again else None,
        "loss": [] if again else pictures.of_loss(pair) + pictures.of_forgetting(pair),
        "overshoot": [] if again else pictures.of_overshoot(pair),
        "amax": None if again else _amax(pair),
        "precision": [] if again else pictures.of_precision(pair),
        "blocks": [] if again else pictures.of_blocks(pair),
        "settings": tables.settings(pair.config, experiment.configs[pair.baseline.id]) if pair.baseline else None,
    }


def _amax(pair: Pair) -> dict | None:
    """Return what the page's script draws, and its layers with their largest overshoot; None for current scaling, which
    predicts nothing."""
    worst = pair.telemetry.worst()
    if pair.config["scaling"]["algo"] == "current" or not worst or not len(pair.curve.steps):
        return None
    data = pair.telemetry.histories() | {"last": int(pair.curve.steps[-1])}
    return {"data": data, "worst": worst, "chosen": max(worst, key=worst.get)}


def _recipe(pair: Pair, bf16_steps: int) -> str:
    quant, scaling = pair.config["quant"], pair.config["scaling"]
    detail = {"max": f" of the last {scaling['window']}", "exp_smooth": f", alpha {scaling['alpha']:g}"}
    bf16 = {0: "quantized from the first step", 1: "first step in BF16"}
    warmup = bf16.get(bf16_steps, f"first {bf16_steps} steps in BF16")
    parts = [quant["format"], scaling["algo"] + detail.get(scaling["algo"], ""), warmup]
    parts += [f"lr {scientific(pair.config['optim']['lr'])}", f"{quant['bf16_blocks']} BF16 blocks"]
    return " · ".join([*parts, ", ".join(quant["scope"])])


def _details(run: Run, config: Mapping) -> str:
    parts = {"config": config, "environment": brief(run.environment()), "status": run.status()}
    return yaml.safe_dump({name: part for name, part in parts.items() if part}, sort_keys=False, allow_unicode=True)


def _command(line: str) -> Markup:
    """Return a line that ends in "make it: <command>" or the like, its command set as code."""
    text, colon, command = line.rpartition(" it: ")
    return escape(text + colon) + Markup("<code>{}</code>").format(command) if colon else escape(line)


def _minus(text) -> str:
    """Put minus signs for the hyphens that stand for one; exponents and names keep theirs."""
    return re.sub(r"(?<![\w.)])-(?=\d)", "−", str(text))


def write_report(experiments: Sequence[Experiment], out: Path, context: Mapping) -> tuple[Path, Path]:
    """Write the report into the folder `out`; returns the paths of `report.html` and `report.md`.

    `context` is shown as provenance of the page itself, {label: text}: command, date. That of the numbers is read from
    the runs: model, data, budget, protocol, seeds, benchmark, hardware, arithmetic, versions, code. Pictures
    (`loss.png`, `overshoot.png`, `deltas.png`) are left out where no run has what they show. Results of the factorial
    and the audit are shown if they lie in `out`.
    """
    out, paper = Path(out), published()
    pictures = write_pictures(experiments, paper, out)
    paths = out / "report.html", out / "report.md"
    for path, text in zip(paths, render(experiments, paper, context, pictures, studies_in(out)), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths
