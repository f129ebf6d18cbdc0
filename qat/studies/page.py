"""Write a study as Markdown, JSON and a picture, in a folder that stands alone."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qat.analysis.compare import APE_THRESHOLD, DROP_THRESHOLD
from qat.config import Config
from qat.report.plots import ACCENT, BASE, INK, MUTED, WARM, Panel, png
from qat.report.studies import TITLES, claims_table, interaction
from qat.report.text import markdown, p_text
from qat.runs.folder import Run
from qat.studies import audit, factorial, measures
from qat.studies.contrasts import Response, Weights, region
from qat.studies.measures import MODES, Measured
from qat.utils.environment import commit_name, hardware_name

READING = (
    "Intervals are of 95 %, in a claim of several statements of 95 % together; p is against zero, after Holm's "
    "correction over its column. A verdict asks whether the whole interval lies where the statement is true "
    "(supported), wholly outside (contradicted), or neither. "
    f"Thresholds: {APE_THRESHOLD:g} % of the loss, {DROP_THRESHOLD:g} % of a score."
)


def write_factorial(measured: Sequence[Measured], missing: Mapping[str, str], cfg: Config, out: Path) -> Path:
    """Write `factorial.md`, `.json` and `.png` into `out`; returns the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    claims, effects = factorial.claims(measured), factorial.effects(measured)
    cells, header = _cells(measured)
    parts = [f"# {TITLES['factorial']}", _summary(claims), READING, _listed(_facts(measured, cfg))]
    parts += [*_missing(missing), _REPEATED if factorial.repeated(measured) else "", *_claims(claims)]
    interactions = _interactions(measured) if measured else []
    if measured:
        png([interaction(each, legend=not i) for i, each in enumerate(interactions)], 2, out / "factorial.png")
        parts += ["## Cells", "![Means of the cells, with 95 % intervals](factorial.png)", markdown(header, cells)]
        parts += ["## Baselines", _NOTE_BASELINES, _rates(measured), "## Effects", _NOTE_EFFECTS]
        parts += [part for each in effects for part in _effects(each)]
    content = {"facts": _facts(measured, cfg), "claims": claims, "interactions": interactions, "effects": effects}
    return _write(out, "factorial", parts, content | {"missing": missing, "runs": _runs(measured)})


def write_audit(
    measured: Sequence[Measured], missing: Mapping[str, str], left_out: Mapping[str, str], cfg: Config, out: Path
) -> Path:
    """Write `audit.md`, `.json` and `.png` into `out`; returns the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    claims, effects = audit.claims(measured, cfg), audit.effects(measured)
    parts = [f"# {TITLES['audit']}", _summary(claims), READING]
    parts += [_listed(_facts(measured, cfg)), *_missing(missing | left_out), *_claims(claims)]
    if effects:
        height = max(300, 80 + 20 * len(effects))
        png([_forest(effects, height), _scopes(measured, height)], 2, out / "audit.png")
        names = list(effects[0]["effects"])
        units = {name: "ratio" if r.log else r.unit for name, r in audit.responses(measured).items()}
        rows = [
            ["–" if row["row"] is None else str(row["row"]), row["switch"], row["base"], str(row["linears"])]
            + [_with_p(row["effects"][name]["text"], row["effects"][name]["p_holm"]) for name in names]
            for row in effects
        ]
        header = ["Row", "Switch", "Off", "Linears", *(f"{name}, {units[name]}" for name in names)]
        parts += ["## Switches", _NOTE_SWITCHES, "![Effects on held-out loss; APE against linears](audit.png)"]
        parts += [markdown(header, rows), "## The cells they are thrown in", _plain(measured)]
        parts += ["\n".join(f"- {name}: {each.noise()}" for name, each in audit.responses(measured).items())]
    content = {"facts": _facts(measured, cfg), "claims": claims, "effects": effects, "missing": missing}
    return _write(out, "audit", parts, content | {"left_out": left_out, "runs": _runs(measured)})


_NOTE_BASELINES = (
    "What BF16 training made of the pretrained checkpoint, and what W8A8 costs its result without QAT (PTQ). No "
    "scaling rule or warmup has a part in either."
)
_NOTE_EFFECTS = (
    "Against most_recent, lr 1e-4 and no warmup, each the mean over the other factors (current predicts nothing, and "
    "has no part in what exceeds a prediction or the target); × is an interaction, the change of the one effect by the "
    "other. Window 1 of `max` is most_recent itself. Effects on the loss APE are ratios."
)
_REPEATED = (
    "No run is longer than a window of 16, so max w16 and max w64 are the same numbers here; effects count them once."
)
_NOTE_SWITCHES = (
    "What each changes: the cell with it, less its own baseline, less the same of the cell it is thrown in. Row: of "
    "the table of disagreements. Forgetting: the switch's own baseline less the other's, in points over all questions; "
    "– where they share one, as for PTQ. Effects on the loss APE are ratios."
)


def _write(out: Path, name: str, parts: Sequence[str], content: Mapping) -> Path:
    (out / f"{name}.json").write_text(json.dumps(_json(content), indent=1, allow_nan=False), encoding="utf-8")
    path = out / f"{name}.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _json(value):
    """Replace infinities and NaN, which JSON has not, by None."""
    if isinstance(value, Mapping):
        return {key: _json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_json(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------- parts


def _summary(claims: Sequence[Mapping]) -> str:
    verdicts = [claim["verdict"] for claim in claims]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    return f"**Of {len(claims)} claims: {', '.join(counts)}.**" if claims else "**Nothing has been measured yet.**"


def _facts(measured: Sequence[Measured], cfg: Config) -> dict[str, str]:
    runs = Path(cfg.runs_dir)
    environments = [environment for m in measured for environment in Run(runs / m.run).environments()]
    machines = "; ".join(dict.fromkeys(map(hardware_name, environments)))
    commits = "; ".join(dict.fromkeys(commit_name(each["git"]) for each in environments))
    seeds = ", ".join(str(seed) for seed in sorted({m.seed for m in measured})) or "none"
    sizes = {(len(m.losses("baseline")), len(m.answers("baseline"))) for m in measured}
    asked = "; ".join(f"{documents} held-out documents, {questions} questions" for documents, questions in sizes)
    return {
        "Model": cfg.model.name,
        "Data": cfg.data.name,
        "Budget": f"{cfg.budget.name}, {cfg.size}",
        "Benchmark": f"{cfg.benchmark.name}: {asked}" if asked else cfg.benchmark.name,
        "Runs": f"{len({m.run for m in measured})} quantized runs, {'seeds' if ',' in seeds else 'seed'} {seeds}",
        "Hardware": machines or "unknown",
        "Code": commits or "unknown",
        "Command": f"python {' '.join(sys.argv)}",
        "Date": str(date.today()),
    }


def _listed(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- {label}: {text}" for label, text in lines.items())


def _missing(missing: Mapping[str, str]) -> list[str]:
    return ["## Missing", _listed(missing)] if missing else []


def _claims(claims: Sequence[Mapping]) -> list[str]:
    if not claims:
        return []
    details = [
        [
            claim["claim"],
            each["statement"],
            f"{each['response']}, {each['unit']}",
            each["text"],
            region(each["region"]),
            each["verdict"],
        ]
        for claim in claims
        for each in (*claim["premises"], *claim["statements"])
    ]
    header = ["Claim", "Statement", "Response", "Estimate [interval]", "True where", "Verdict"]
    return ["## Claims", claims_table(claims).markdown(), markdown(header, details)]


def _cells(measured: Sequence[Measured]) -> tuple[list[list[str]], list[str]]:
    """Return a row a cell, over its seeds, and their header."""
    found = factorial.responses(measured)
    rows = [
        [*key, *(response.cell(response.contrast({key: 1})) for response in found.values())]
        for key in dict.fromkeys(m.key for m in measured)
    ]
    return rows, [*factorial.FACTORS, *(f"{response.name}, {response.unit}" for response in found.values())]


def _rates(measured: Sequence[Measured]) -> str:
    rates = {f"lr {rate}": {(rate,): 1} for rate in factorial.RATES} | {"lr 1e-5 − 1e-4": {("1e-5",): 1, ("1e-4",): -1}}
    return _rows(rates, factorial.baselines(measured).values())


def _rows(rows: Mapping[str, Weights], responses: Iterable[Response]) -> str:
    """Write a table of a contrast a row, a response a column."""
    responses = list(responses)
    cells = [[label, *(each.cell(each.contrast(weights)) for each in responses)] for label, weights in rows.items()]
    return markdown(["", *(f"{each.name}, {each.unit}" for each in responses)], cells)


def _plain(measured: Sequence[Measured]) -> str:
    plain = [key for key in dict.fromkeys(m.key for m in measured) if key[1] == audit.PLAIN]
    return _rows({key[0]: {key: 1} for key in plain}, audit.responses(measured).values())


def _effects(each: Mapping) -> list[str]:
    rows = [
        [row["effect"], row["text"], "–" if row["p_holm"] is None else p_text(row["p_holm"])] for row in each["effects"]
    ]
    unit = "ratio" if each["log"] else each["unit"]
    return [f"### {each['response']}", each["noise"], markdown(["Effect", f"{unit} [95 % CI]", "p, Holm"], rows)]


def _with_p(text: str, p: float | None) -> str:
    return text if p is None else f"{text}, p {p_text(p)}"


def _runs(measured: Sequence[Measured]) -> list[dict]:
    """List the folders that everything was read from, with their plain numbers."""
    return [
        {"cell": m.key, "seed": m.seed, "run": m.run, "baseline": m.baseline, "ape_percent": m.ape}
        | {"overshoot": m.overshoot, "clipped": m.clipped, "linears": m.linears}
        | {f"heldout_{scored}": float(m.losses(scored, "baseline").mean()) for scored in (*MODES, "ptq")}
        for m in measured
    ]


# ------------------------------------------------------------------------------------------------- pictures


def _interactions(measured: Sequence[Measured]) -> list[dict]:
    """Return every cell's mean and interval in two responses, as `qat.report.studies.interaction` draws them."""
    responses = {
        "Held-out loss in W8A8, run less BF16 (nats)": measures.heldout(measured, "w8a8"),
        "Loss APE (%)": measures.ape(measured),
    }
    drawn = []
    for title, response in responses.items():
        means = {key: response.contrast({key: 1}) for key in itertools.product(*factorial.FACTORS.values())}
        cells = [
            dict(zip(factorial.FACTORS, key, strict=True))
            | {end: _shown(getattr(mean, end), response) for end in ("value", "low", "high")}
            for key, mean in means.items()
            if mean is not None
        ]
        drawn.append({"title": title, "around_zero": not response.log, "cells": cells})
    ptq = factorial.baselines(measured)["ptq"]
    found = {rate: ptq.contrast({(rate,): 1}) for rate in factorial.RATES}
    drawn[0]["ptq"] = {rate: each.value for rate, each in found.items() if each is not None}
    return drawn


def _shown(value: float | None, response: Response) -> float | None:
    return math.exp(value) if response.log and value is not None else value


def _forest(effects: Sequence[Mapping], height: float) -> Panel:
    """Draw the effect of every switch on the held-out loss in W8A8."""

    def draw(axes: Axes) -> None:
        axes.axvline(0, color=BASE, linewidth=1.4)
        for y, row in zip(range(len(effects))[::-1], effects, strict=True):
            estimate = row["effects"]["Held-out loss, W8A8"]["estimate"]
            if estimate is None:
                continue
            if estimate["low"] is not None:
                axes.hlines(y, estimate["low"], estimate["high"], color=ACCENT, linewidth=1.3)
            axes.plot(estimate["value"], y, "o", color=ACCENT, markersize=5)
        labels = [f"{row['switch']} ({row['base'].partition(',')[0]})" for row in effects]
        axes.set_yticks(range(len(effects))[::-1], labels)
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_xlabel("Change of run − BF16 (nats)")

    return Panel("Held-out loss in W8A8", draw, width=520, height=height, margins=(206, 14, 32, 44))


def _scopes(measured: Sequence[Measured], height: float) -> Panel:
    """Draw the loss APE against the number of quantized linears."""

    def draw(axes: Axes) -> None:
        for base, colour in (("exp8", ACCENT), ("exp3", WARM)):
            found = sorted((m.linears, m.ape) for m in measured if m.key[0] == base and m.key[1] in audit.SCOPES)
            if found:
                axes.plot(*zip(*found, strict=True), "o-", color=colour, markersize=5, linewidth=1.0, label=base)
        axes.set_xlabel("Quantized linears")
        axes.set_ylabel("Loss APE (%)", color=MUTED)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend()

    return Panel("Loss APE by scope", draw, width=520, height=height, margins=(62, 14, 32, 44))
