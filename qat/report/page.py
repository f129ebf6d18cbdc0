"""Write the report: once as Markdown, of which the HTML page is a rendering with more figures."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path

import jinja2
import yaml
from markdown_it import MarkdownIt
from markupsafe import Markup

from qat.analysis.compare import pretrained_record
from qat.analysis.decisions import APE_THRESHOLD, DECISIONS, DROP_THRESHOLD
from qat.config import Config
from qat.report import pictures, tables, uncertainty
from qat.report.caveats import caveats, lead, run_warnings
from qat.report.cells import Table, text_table
from qat.report.experiment import Experiment, Pair, labels, published, scientific
from qat.report.panels import score_legend
from qat.report.plots import Panel, svg
from qat.report.studies import studies_in
from qat.report.text import escape, heldout_table, loss_text, qat_verdict, task_table, verdict
from qat.report.verdicts import verdicts
from qat.runs.folder import Run
from qat.utils.environment import brief, commit_name, hardware_name

TITLE = "HiF8 W8A8 training against matched BF16 baselines"
_SHELL = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(experiments: Sequence[Experiment], out: Path) -> tuple[Path, Path]:
    """Write the report into the folder `out`; return the paths of `report.html` and `report.md`.

    Beside the two lie `report.json`, the numbers for other pages, and the pictures of `report.md`: `loss.png`,
    `overshoot.png`, `deltas.png`, where a run has what they show. Results of the factorial and the audit are shown if
    they lie in `out`.
    """
    out, paper = Path(out), published()
    shown = pictures.write_pictures(experiments, paper, out)
    view = _view(experiments, paper) | {"pictures": shown, "studies": studies_in(out)}
    web = html(_markdown(view, page=True), TITLE)
    files = {"report.html": web, "report.md": _markdown(view, page=False), "report.json": _json(experiments, view)}
    for name, text in files.items():
        (out / name).write_text(text, encoding="utf-8")
    return out / "report.html", out / "report.md"


def _markdown(view: Mapping, page: bool) -> str:
    """Return the report in Markdown; page: with figures, as HTML."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    options = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    options |= {"finalize": lambda value: value if isinstance(value, Markup) else escape(str(value))}
    template = jinja2.Environment(loader=loader, **options).get_template("template.md")
    text = template.render(view, page=page, figures=figures)
    return re.sub(r"\n{3,}", "\n\n", text)


def figures(panels: Sequence[Panel], label: str = "") -> Markup:
    """Return panels as images in HTML; their alternative text is the label and their titles."""
    image, images = Markup('<img alt="{}" width="{}" src="{}">'), Markup()
    for panel in panels:
        width = 340 if panel.width < 400 else 526 if panel.width < 800 else 1064  # three in a row, two, or one
        images += image.format(f"{label}: {panel.title}" if label else panel.title, width, svg(panel))
    return Markup('<p class="figures">') + images + Markup("</p>")


def html(text: str, title: str) -> str:
    """Return Markdown as a page that stands alone."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens, links = parser.parse(text), []
    for token, content in pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            anchor = re.sub(r"[^\w\- ]", "", content.content.lower()).replace(" ", "-")  # as GitHub's
            token.attrSet("id", anchor)
            links.append(f'<a href="#{anchor}">{parser.renderInline(content.content.partition(":")[0])}</a>')
        elif token.type == "td_open":
            longest = max(map(len, re.split("<br>", content.content)))
            token.attrSet("class", "short" if longest < 36 else "long")
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<h2", f"<nav>{' '.join(links)}</nav>\n<h2", 1)
    style = (Path(__file__).parent / "style.css").read_text(encoding="utf-8")
    return _SHELL.format(title=title, style=style, body=body)


def _json(experiments: Sequence[Experiment], view: Mapping) -> str:
    """Return the numbers of the report: what other pages take from it."""
    recipes = [(e, recipe) for e in experiments for recipe in e.recipes if recipe.comparison]
    numbers = {
        "provenance": view["provenance"],
        "lengths": {e.name: "; ".join(_sizes(e)) for e in experiments},
        "verdicts": view["rows"],
        "recipes": [{"experiment": e.name, "label": r.label, "comparison": r.comparison} for e, r in recipes],
        "bf16": [_bf16(e, run) for e in experiments for run in e.bf16],
    }
    return json.dumps(numbers, indent=1, ensure_ascii=False) + "\n"


def _bf16(experiment: Experiment, run: Run) -> dict:
    """Return the held-out losses of a BF16 run and of the checkpoint that it started from."""
    config = experiment.configs[run.id]
    benchmark = config["benchmark"]["name"]
    scored = run.evaluations().get(benchmark, {}).get("bf16", {})
    row = {"experiment": experiment.name, "run": run.id, "lr": config["optim"]["lr"]}
    for name, record in (("heldout", scored), ("pretrained", pretrained_record(run, benchmark))):
        row[name] = {text: result["loss"] for text, result in record.get("heldout", {}).items()}
    return row


def _view(experiments: Sequence[Experiment], paper: Mapping) -> dict:
    rows = verdicts(experiments)
    return {
        "title": TITLE,
        "lead": lead(experiments),
        "rows": rows,
        "decisions": DECISIONS,
        "verdicts": tables.verdicts(rows),
        "provenance": _provenance(experiments) | made(),
        "paper": paper["paper"],
        "thresholds": {"drop": DROP_THRESHOLD, "ape": APE_THRESHOLD},
        "summary": tables.summary(experiments, paper),
        "forests": [*pictures.of_differences(experiments), *pictures.of_scores(experiments, paper)],
        "score_legend": score_legend(),
        "seeds": uncertainty.seeds(experiments),
        "rerun_noise": uncertainty.rerun_noise(experiments),
        "caveats": caveats(experiments),
        "warnings": run_warnings(experiments),
        "baselines": tables.baselines(experiments, paper),
        "experiments": _experiments(experiments, paper["experiments"]),
        "few": sum(len(e.pairs) for e in experiments) <= 2,
        "disagreements": tables.disagreements(paper),
        "configurations": _configurations(experiments),
        "configs": _run_configs(experiments),
    }


def _provenance(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return what the runs' own configs say; several values where they differ."""
    configs = [config for e in experiments for config in e.configs.values()]
    runs = {name: run for e in experiments for name, run in e.existing.items()}
    lines = {
        "Model": [c["model"]["name"] for c in configs],
        "Data": [c["data"]["name"] for c in configs],
        "Budget": [c["budget"]["name"] for c in configs],
        "Length": _lengths(experiments),
        "Protocol": [c["protocol"] for c in configs],
        "Seed": [str(c["seed"]) for c in configs],
        "Benchmark": [c["benchmark"]["name"] for c in configs],
        "Arithmetic": [c["budget"]["arithmetic"].upper() for c in configs],
    }
    about = {label: "; ".join(dict.fromkeys(values)) for label, values in lines.items() if values}
    return about | origin(runs.values())


def origin(runs: Iterable[Run]) -> dict[str, str]:
    """Return what computed runs: hardware, versions and code, several where they differ."""
    environments = [environment for run in runs for environment in run.environments()]
    versions = [", ".join(map(" ".join, e["packages"].items())) for e in environments]
    codes = [commit_name(e["git"]) for e in environments]
    lines = {"Hardware": map(hardware_name, environments), "Versions": versions, "Code": codes}
    return {label: "; ".join(dict.fromkeys(values)) or "unknown" for label, values in lines.items()}


def made() -> dict[str, str]:
    """Return what made a page, and when."""
    return {"Command": f"python {' '.join(sys.argv)}", "Date": str(date.today())}


def _lengths(experiments: Sequence[Experiment]) -> list[str]:
    """Return steps and batch, with the experiments that have them where they are several."""
    names: dict[str, dict[str, None]] = {}
    for e in experiments:
        for size in _sizes(e):
            names.setdefault(size, {})[e.name] = None
    return [f"{size} ({', '.join(own)})" for size, own in names.items()] if len(names) > 1 else list(names)


def _sizes(experiment: Experiment) -> list[str]:
    """Return steps and batch of its runs, in words."""
    return list(dict.fromkeys(config.size for config in experiment.typed.values()))


def _experiments(experiments: Sequence[Experiment], entries: Mapping) -> list[dict]:
    shown: dict[str, str] = {}  # run id -> the experiment that has shown it: some recipes come to the same run
    return [_experiment(experiment, entries.get(experiment.name, {}), shown) for experiment in experiments]


def _experiment(experiment: Experiment, entry: Mapping, shown: dict[str, str]) -> dict:
    missing = [part.missing for part in (*experiment.pairs, *experiment.recipes) if part.missing]
    absent = experiment.absent or ([] if experiment.configs else [experiment.name])
    missing += [f"{name} has not been run yet; make it: {experiment.command}" for name in absent]
    words = {key: entry.get(key, "") for key in ("title", "question", "recipe")}
    return words | {
        "name": experiment.name,
        "notes": entry.get("notes", []),
        "missing": missing,
        "curves": pictures.of_learning_rates(experiment),
        "pairs": [_pair(pair, experiment, shown) for pair in experiment.pairs],
    }


def _pair(pair: Pair, experiment: Experiment, shown: dict[str, str]) -> dict:
    compared, first = pair.comparison, shown.setdefault(pair.run.id, experiment.name)
    rows = [text_table(*task_table(compared)), tables.measures(compared)] if compared and compared["tasks"] else []
    rows += [text_table(*heldout_table(compared))] if compared and compared["heldout"] else []
    rows += [tables.settings(pair.config, experiment.configs[pair.baseline.id])] if pair.baseline else []
    return {
        "label": pair.label,
        "recipe": _recipe(pair, experiment.typed[pair.run.id]),
        "runs": f"{pair.run.id} against {pair.baseline.id}" if pair.baseline else pair.run.id,
        "same_as": first if first != experiment.name else "",
        "sentences": [loss_text(compared), qat_verdict([compared]), verdict({"": compared})] if compared else [],
        "tables": rows,
        "figures": _figures(pair) if first == experiment.name else [],
    }


def _figures(pair: Pair) -> list[tuple[str, list[Panel]]]:
    """Return the figures of a run, panels with their captions."""
    layer, histories = pictures.of_amax(pair)
    return [
        ("", pictures.of_loss(pair) + pictures.of_forgetting(pair)),
        ("Overshoot:", pictures.of_overshoot(pair)),
        (f"amax of {layer}:", histories),
        ("", pictures.of_precision(pair)),
        ("Mantissa bits left, by block:", pictures.of_blocks(pair)),
    ]


def _configurations(experiments: Sequence[Experiment]) -> Table:
    configs = {name: config for e in experiments for name, config in e.configs.items()}
    return tables.configurations({label: configs[name] for name, label in labels(experiments).items()})


def _run_configs(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Return configuration, environment and status of every run as YAML, by id."""
    return {name: _details(run, e.configs[name]) for e in experiments for name, run in e.existing.items()}


def _recipe(pair: Pair, cfg: Config) -> str:
    quant, scaling = pair.config["quant"], pair.config["scaling"]
    detail = {"max": f" of the last {scaling['window']}", "exp_smooth": f", alpha {scaling['alpha']:g}"}
    detail["lsq"] = f", learning rate {scaling['lr']:g}"
    bf16 = {0: "quantized from the first step", 1: "first step in BF16"}
    warmup = bf16.get(cfg.bf16_warmup_steps, f"first {cfg.bf16_warmup_steps} steps in BF16")
    parts = [quant["format"], scaling["algo"] + detail.get(scaling["algo"], ""), *cfg.variations, warmup]
    in_bf16 = quant["bf16_blocks"] + len(quant["bf16_also"])
    parts += [f"lr {scientific(pair.config['optim']['lr'])}", f"{in_bf16} BF16 blocks"]
    return " · ".join([*parts, ", ".join(quant["scope"])])


def _details(run: Run, config: Mapping) -> str:
    parts = {"config": config, "environment": brief(run.environment()), "status": run.status()}
    return yaml.safe_dump({name: part for name, part in parts.items() if part}, sort_keys=False, allow_unicode=True)
