"""Show the studies in the report, from the JSON in their folders beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes

from qat.errors import UserError
from qat.report.cells import Cell, Table
from qat.report.plots import ACCENT, BASE, INK, PAPER, WARM, Panel

NOT_MEASURED = "not measured yet"  # why a claim is open, where cells are missing
TITLES = {
    "decide": "The paper's claims, decided",
    "factorial": "Scaling × learning rate × BF16 warmup",
    "replay": "Scaling rules on the amaxes of the same run",
    "audit": "The switches between the paper's text and its released code",
    "ptq": "Post-training quantization",
}


def results(out: Path) -> dict[str, dict]:
    """Return the results of the studies in `out`, a report's folder, by name. Errors: UserError for a damaged file."""
    studies = {}
    for name in TITLES:
        path = out / name / f"{name}.json"
        if path.exists():
            try:
                studies[name] = json.loads(path.read_text(encoding="utf-8"))
                claims_table(studies[name]["claims"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is damaged ({error}); write it again: make {name}") from error
    return studies


def claims_table(claims: Sequence[Mapping]) -> Table:
    """Return the claims that were judged, one a row."""
    header = ["Claim", "The paper", "Verdict", "What was measured"]
    return Table(header, [[Cell(text) for text in (c["claim"], c["says"], verdict(c), c["why"])] for c in claims])


def verdict(judged: Mapping) -> str:
    """Return the verdict on a claim or statement, or that it is not measured yet."""
    return NOT_MEASURED if judged["open"] == NOT_MEASURED else judged["verdict"]


def studies_in(out: Path) -> list[dict]:
    """Return the studies with a result in `out`, a report's folder: name, title, facts, claims as a table, panels."""
    studies = []
    for name, result in results(out).items():
        # Only the factorial has interactions.
        drawn = [interaction(response, legend=not i) for i, response in enumerate(result.get("interactions", []))]
        facts = " · ".join(f"{label}: {text}" for label, text in result["facts"].items())
        claims = claims_table(result["claims"])
        studies.append({"name": name, "title": TITLES[name], "facts": facts, "claims": claims, "panels": drawn})
    return studies


def interaction(response: Mapping, legend: bool) -> Panel:
    """Draw mean and interval of all cells over the scalings, a line a learning rate and warmup, and what PTQ costs.

    response: {"title", "around_zero": whether 0 is no effect, "cells": [{"scaling", "lr", "warmup", "value", "low" and
    "high" (null without noise)}], "ptq": {learning rate: value}, where PTQ has one}.
    """
    cells = response["cells"]
    scalings, rates, warmups = (list(dict.fromkeys(cell[key] for cell in cells)) for key in ("scaling", "lr", "warmup"))

    def draw(axes: Axes) -> None:
        shifts = iter((-0.18, -0.06, 0.06, 0.18))
        for rate, colour in zip(rates, (WARM, ACCENT), strict=False):
            for warmup, fill, dash in zip(warmups, (PAPER, colour), ((3, 2), (None, None)), strict=False):
                shift = next(shifts)
                line = [cell for cell in cells if (cell["lr"], cell["warmup"]) == (rate, warmup)]
                places = [scalings.index(cell["scaling"]) + shift for cell in line]
                for x, cell in zip(places, line, strict=True):
                    if cell["low"] is not None:
                        axes.vlines(x, cell["low"], cell["high"], color=colour, linewidth=1.2)
                label = f"lr {rate}, {'no' if warmup == '0' else 'BF16'} warmup"
                style = {"color": colour, "markerfacecolor": fill, "markersize": 5, "linewidth": 1.0, "dashes": dash}
                axes.plot(places, [cell["value"] for cell in line], marker="o", label=label, **style)
        for rate, value in response.get("ptq", {}).items():
            colour = dict(zip(rates, (WARM, ACCENT), strict=False))[rate]
            axes.axhline(value, color=colour, linewidth=1.2, linestyle=":", label=f"lr {rate}, PTQ", zorder=0)
        if response["around_zero"]:
            axes.axhline(0, color=BASE, linewidth=1.4, zorder=0)
        axes.set_xticks(range(len(scalings)), scalings)
        axes.tick_params(axis="x", length=0, labelcolor=INK)
        axes.grid(axis="y")
        if legend:
            axes.legend(ncols=2, loc="lower center", bbox_to_anchor=(0.5, -0.44))

    return Panel(response["title"], draw, width=430, height=314, margins=(62, 14, 32, 86))
