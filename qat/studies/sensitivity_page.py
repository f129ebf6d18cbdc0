"""Write where the damage of W8A8 sits as a page, in the folder of what was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from qat.analysis import sensitivity as analysis
from qat.analysis.sensitivity import MEASURES
from qat.analysis.stats import LEVEL
from qat.eval.subject import Subject
from qat.report.page import made
from qat.report.panels import diverging
from qat.report.plots import INK, Panel
from qat.report.text import change, decided, markdown, signed
from qat.studies.page import Picture, listed, write_page
from qat.utils import environment, files

TITLE = "Where the damage of W8A8 sits"
READING = (
    "A group of tensors, weights or activations, is rounded **alone**, in a model that is otherwise unquantized, or "
    "**left out**, in one that is otherwise W8A8. What it does is the difference from the unquantized model, or of the "
    "W8A8 model from the one without it: above zero it raises the measure either way. Intervals are of 95 %, over "
    "documents or questions; a star stands where p is below 0.05 after Holm's correction over the level. KL says how "
    "far predictions move, not for better or worse; nor do the log-probability of a right letter and the choice mass."
)
_SHIFT = "The log-probability of a right choice moves by {} nats"
_WAYS = {"alone": "alone", "left_out": "left out"}
_LEVELS = {"block": "Blocks", "projection": "Projections", "linear": "Linears"}
_COLUMNS = [("loss", "alone"), ("loss", "left_out"), ("kl", "alone"), ("logprob", "alone"), ("logprob", "left_out")]
_MAPS = [("linear", "kl", "alone"), ("linear", "loss", "alone"), *(("block", *column) for column in _COLUMNS)]
_SHOWN = 12  # rows of a ranking; sensitivity.json has all


def write_sensitivity(content: Mapping, subject: Subject, folder: Path) -> Path:
    """Write the page, and the results into sensitivity.json; returns the path of its HTML."""
    measured, panels = content["measured"], [_map(content, *spec) for spec in _MAPS if analysis.rows(content, *spec)]
    sections = [_lead(content), READING, listed(_facts(content, subject))]
    sections += ["## Maps", Picture("Maps of the damage", panels, columns=1)] if panels else []
    sections += ["## Weights and activations", _whole(content)]
    for level in (level for level in _LEVELS if level in measured):
        sections += [f"## {_LEVELS[level]}", _ranking(content, level)]
    if "block" in measured:
        sections += ["## Blocks to keep in BF16", _CHOICES, _choices(content), _agreement(content)]
    path = write_page(folder / "sensitivity.md", TITLE, sections)
    results = {
        level: {f"{m} {way}": analysis.rows(content, level, m, way) for m in MEASURES for way in _WAYS}
        for level in measured
        if level != "kept"
    }
    files.replace(folder / "sensitivity.json", json.dumps(content | {"results": results}))
    return path.with_suffix(".html")


def _facts(content: Mapping, subject: Subject) -> dict[str, str]:
    quant = subject.cfg.quant
    sizes = {
        name: len(analysis.series(content, level, measure, ["unquantized"], name))
        for level in content["measured"]
        for measure in ("loss", "logprob")
        for name in analysis.sources(content, level, measure)
        if level != "kept"
    }
    return {
        "Model": f"{subject.run.id}, {'by PTQ (max calibration)' if subject.calibrated else 'with its own scales'}",
        "Quantization": f"{quant.format}, {', '.join(quant.scope)}; {len(content['tensors'])} tensors",
        "Measured on": ", ".join(f"{count} of {name}" for name, count in sizes.items()) + " (documents, questions)",
        "Arithmetic": content["request"]["arithmetic"],
        "Hardware": environment.machine_summary(),
        "Time": f"{content['seconds'] / 60:.0f} minutes",
        **made(),
    }


_CHOICES = (
    "The blocks that move predictions most, by the KL of rounding them alone, are kept first: of a text that the "
    "unquantized model had written itself, the expected rise of the loss is the KL, and its noise is far smaller than "
    "that of the loss, or of leaving a block out, after which all later ones round other values. Expected: KL and loss "
    "times the share of the KL that is left, as if that added up. Measured: that model less the unquantized one, on "
    "documents that had no part in the choice; harm and gain hold after Holm's correction over the rows. Keep as many "
    "as the budget of loss asks for; the setting trains or calibrates the model so."
)


def _lead(content: Mapping) -> str:
    """Say what rounding costs, and which role and which groups make most of it."""
    levels, text = content["measured"], ""
    for measure, says in (("loss", "W8A8 costs {} nats a token of held-out text"), ("logprob", _SHIFT)):
        level = next((level for level in levels if analysis.sources(content, level, measure)), None)
        if level is None:
            continue
        whole = analysis.total(content, level, measure)
        text += says.format(_value(whole, measure)) + (f" ({whole['decision']})" if measure == "loss" else "")
        roles = analysis.rows(content, "role", measure, "alone") if "role" in levels else []
        text += "".join(f", {row['group']}s alone {_value(row, measure)}" for row in roles)
        if len(roles) == 2:
            text += f", weights less activations {_value(analysis.between_roles(content, measure), measure)}"
        text += ". "
        groups = analysis.rows(content, "block", measure, "alone") if "block" in levels else []
        marked = sorted((row for row in groups if row["p_holm"] < LEVEL), key=lambda row: -abs(row["difference"]))
        if groups:
            largest = ", ".join(f"{row['group']} {signed(row['difference'], 3)}" for row in marked[:5])
            text += f"Of {len(groups)} groups by block {len(marked)} are beyond noise{': ' * bool(marked)}{largest}. "
    return f"**{text.strip()}**"


def _whole(content: Mapping) -> str:
    """Write what rounding everything does, and each role, a text or task a column."""
    level = "role" if "role" in content["measured"] else next(iter(content["measured"]))
    columns = [(measure, source) for measure in MEASURES for source in analysis.sources(content, level, measure)]
    rows = {"Everything": [_value(analysis.total(content, level, *column), column[0]) for column in columns]}
    for way, name in _WAYS.items() if level == "role" else ():
        for measure, source in columns:
            for row in analysis.rows(content, "role", measure, way, source):
                rows.setdefault(f"{row['group']}s {name}", []).append(_value(row, measure))
    if {"weights alone", "activations alone"} <= rows.keys():
        between = [_value(analysis.between_roles(content, *column), column[0]) for column in columns]
        rows["weights less activations, alone"] = between
    header = [f"{MEASURES[measure].name}, {source}" for measure, source in columns]
    return markdown(["Rounded", *header], [[label, *values] for label, values in rows.items()])


def _ranking(content: Mapping, level: str) -> str:
    """Write the groups of a level, those that matter most first."""
    columns = [(m, way, analysis.rows(content, level, m, way)) for m, way in _COLUMNS]
    columns = [column for column in columns if column[2]]
    kl = next(rows for measure, _, rows in columns if measure == "kl")
    places = sorted(range(len(kl)), key=lambda place: -kl[place]["difference"])
    header = ["Group", *(f"{MEASURES[m].name}, {_WAYS[way]}" for m, way, _ in columns)]
    cells = [[columns[0][2][i]["group"], *(_value(rows[i], m) for m, _, rows in columns)] for i in places[:_SHOWN]]
    least = [
        f"{MEASURES[measure].name.lower()} {np.median([row['detectable'] for row in rows]):.2g}"
        for measure, way, rows in columns
        if way == "alone" and measure != "kl" and rows[0]["detectable"]
    ]
    note = f"Found in four of five cases (nats, median over {len(kl)} groups, alone): {', '.join(least)}."
    return f"{markdown(header, cells)}\n\n{note}"


def _choices(content: Mapping) -> str:
    cells = []
    for row in analysis.choices(content):
        kl, loss = (signed(row["expected"][measure], 5) for measure in ("kl", "loss"))
        kl_measured = _value(row["kl"], "kl") if row["kl"] else "-"
        setting = f"`quant.bf16_also=[{','.join(map(str, row['blocks']))}]`" if row["blocks"] else "-"
        loss_measured = decided(row["loss"], 5) if row["loss"] else "-"
        cells.append([str(len(row["blocks"])), kl, kl_measured, loss, loss_measured, setting])
    header = ["Blocks", "KL expected, nats", "KL measured", "Loss expected, nats", "Loss measured", "Setting"]
    return markdown(header, cells)


def _agreement(content: Mapping) -> str:
    """Say what Model-Optimizer makes of the blocks, where it was asked."""
    scores = content.get("auto_quantize", "it is not asked yet")
    if isinstance(scores, str):
        return f"NVIDIA Model-Optimizer's `auto_quantize` gives no scores here ({scores})."
    order, correlation = analysis.agreement(content)
    rank = "no rank correlation" if correlation is None else f"a rank correlation of {correlation:.2f}"
    return (
        f"NVIDIA Model-Optimizer's `auto_quantize` (gradient score, max calibration, on the same text) puts the blocks "
        f"in the order {', '.join(map(str, order))}. Its scores and the KL of a block rounded alone have {rank} "
        f"(Spearman, {len(order)} block{'s' * (len(order) > 1)})."
    )


def _value(row: Mapping, measure: str) -> str:
    star = r" \*" if row.get("p_holm", 1) < LEVEL and measure != "kl" else ""
    return f"{change(row['difference'], row['ci'], 5)}{star}"


def _map(content: Mapping, level: str, measure: str, way: str) -> Panel:
    """Draw a level's groups as blocks against projection and role."""
    cells = {}
    for row in analysis.rows(content, level, measure, way):
        block, *rest = row["group"].split("/")
        cells[" ".join(rest), int(block)] = row
    lines = list(dict.fromkeys(line for line, _ in cells))
    blocks = sorted({block for _, block in cells})
    largest = max(abs(row["difference"]) for row in cells.values()) or 1.0
    digits = 0 if largest >= 0.02 else 1 if largest >= 0.002 else 2
    nothing = {"difference": np.nan}  # not every block has every linear

    def draw(axes: Axes) -> None:
        values = [[cells.get((line, block), nothing)["difference"] for block in blocks] for line in lines]
        axes.imshow(values, cmap=diverging(), vmin=-largest, vmax=largest, aspect="auto")
        for (line, block), row in cells.items():
            x, y = blocks.index(block), lines.index(line)
            number = signed(1000 * row["difference"], digits, plus="")
            axes.text(x, y, number, ha="center", va="center", fontsize=7.5, color=INK)
            if measure != "kl" and row["p_holm"] < LEVEL:
                axes.add_patch(Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=INK, linewidth=1.4))
        axes.set(xticks=range(len(blocks)), xticklabels=blocks, xlabel="Block")
        axes.set(yticks=range(len(lines)), yticklabels=lines)
        axes.tick_params(length=0, labelcolor=INK)
        axes.spines[:].set_visible(False)

    title = f"{_LEVELS[level]}: {MEASURES[measure].name}, {_WAYS[way]}, in thousandths of a nat"
    return Panel(title, draw, width=1000, height=230, margins=(190, 12, 32, 44))
