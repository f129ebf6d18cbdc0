"""Write a study as Markdown, JSON and a picture, in a folder that stands alone."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qat.config import Config
from qat.report.plots import ACCENT, BASE, INK, MUTED, WARM, Panel, png
from qat.report.studies import TITLES, claims_table, interaction
from qat.report.text import markdown, p_text
from qat.runs.folder import Run
from qat.studies import audit, factorial, measures
from qat.studies.contrasts import OPEN, Response, Weights, region
from qat.studies.measures import MODES, Measured
from qat.studies.registration import Registration
from qat.utils.environment import commit_name, hardware_name

TOGETHER = "Intervals are of 95 %, in a claim of several statements of 95 % together"
VERDICTS = (
    "A verdict asks whether the whole interval lies where the statement is true (supported), wholly outside "
    "(contradicted), or neither; of a direction, whether it lies inside the margin (equivalent: too small to count). "
    "An open statement is powerless where a difference of the margin's size could not have been seen, else undecided. "
    "Detectable: the smallest difference that is found in four of five cases. "
    "Margin: {loss:g} % of the loss"
)
READING = (
    f"{TOGETHER}; p is against zero, after Holm's correction over its column. {VERDICTS}, {{score:g}} % of a score. "
    "What is detectable of loss APE is a factor."
)


def write_factorial(measured: Sequence[Measured], missing: Mapping[str, str], cfg: Config, out: Path) -> Path:
    """Write `factorial.md`, `.json` and `.png` into `out`; returns the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    claims, effects = factorial.claims(measured), factorial.effects(measured)
    sections = [_REPEATED if factorial.repeated(measured) else "", *claims_sections(claims)]
    interactions = _interactions(measured) if measured else []
    if measured:
        png([interaction(panel, legend=not i) for i, panel in enumerate(interactions)], 2, out / "factorial.png")
        sections += ["## Cells", "![Means of the cells, with 95 % intervals](factorial.png)", _cells(measured)]
        sections += ["## Baselines", _NOTE_BASELINES, _rates(measured), "## Effects", _NOTE_EFFECTS]
        sections += [section for table in effects for section in _effects(table)]
    content = {"claims": claims, "interactions": interactions, "effects": effects, "missing": missing}
    return _write("factorial", measured, cfg, out, factorial.registered(), missing, sections, content)


def write_audit(
    measured: Sequence[Measured], missing: Mapping[str, str], left_out: Mapping[str, str], cfg: Config, out: Path
) -> Path:
    """Write `audit.md`, `.json` and `.png` into `out`; returns the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    claims, effects = audit.claims(measured, cfg), audit.effects(measured)
    sections = claims_sections(claims)
    if effects:
        height = max(300, 80 + 20 * len(effects))
        png([_forest(effects, height), _scopes(measured, height)], 2, out / "audit.png")
        sections += ["## Switches", _NOTE_SWITCHES, "![Effects on held-out loss; APE against linears](audit.png)"]
        responses = audit.responses(measured)
        sections += [_switches(effects, responses), "## The cells they are thrown in", _plain(measured)]
        sections += ["\n".join(f"- {name}: {response.noise()}" for name, response in responses.items())]
    content = {"claims": claims, "effects": effects, "missing": missing, "left_out": left_out}
    return _write("audit", measured, cfg, out, audit.registered(), missing | left_out, sections, content)


def write_decide(
    measured: Sequence[Measured], missing: Mapping[str, str], claims: Sequence[Mapping], cfg: Config, out: Path
) -> Path:
    """Write `decide.md` and `.json` into `out`; returns the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    sections = ["**Provisional: some cells are missing (below).**"] if missing else []
    known = [m for m in measured if "control" in m.scored]
    sections += [*claims_sections(claims), *(["## Controls", _NOTE_CONTROLS, _controls(known)] if known else [])]
    sections += ["## Not measured yet", _listed(missing)] if missing else []
    registered = factorial.registered()
    content = {"claims": claims, "missing": missing, "runs": _runs(measured)}
    return write("decide", _facts(measured, cfg, registered), registered, sections, content, out, READING)


_NOTE_CONTROLS = (
    "The damage of 4-bit weights to the recipe's BF16 baseline, by the same measures on the same text and questions. "
    "Where a measure does not see it, its verdicts mean nothing."
)
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


def _write(
    study: str,
    measured: Sequence[Measured],
    cfg: Config,
    out: Path,
    registered: Registration,
    missing: Mapping[str, str],
    sections: Sequence[str],
    content: Mapping,
) -> Path:
    """Write a study that measured runs, with what is missing of them."""
    sections = [*(["## Missing", _listed(missing)] if missing else []), *sections]
    content = {**content, "runs": _runs(measured)}
    return write(study, _facts(measured, cfg, registered), registered, sections, content, out, READING)


def write(
    study: str,
    facts: Mapping[str, str],
    registered: Registration,
    sections: Sequence[str],
    content: Mapping,
    out: Path,
    reading: str,
) -> Path:
    """Write what all studies open with and then `sections` as Markdown, and `content` as JSON.

    reading: how to read the page, with the names of margins in braces.
    """
    opening = [f"# {TITLES[study]}", _summary(content["claims"]), reading.format_map(registered.margins)]
    parts = [*opening, _listed(facts), *sections]
    content = {"facts": facts, **content}
    (out / f"{study}.json").write_text(json.dumps(_json(content), indent=1, allow_nan=False), encoding="utf-8")
    path = out / f"{study}.md"
    path.write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    return path


def _json(value):
    """Replace infinities and NaN, which JSON has not, by None."""
    if isinstance(value, Mapping):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------- parts


def _summary(claims: Sequence[Mapping]) -> str:
    verdicts = [_verdict(claim) for claim in claims]
    counts = [f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts)]
    return f"**Of {len(claims)} claims: {', '.join(counts)}.**" if claims else "**Nothing has been measured yet.**"


def _verdict(judged: Mapping) -> str:
    """Write a verdict; of one that is open, why."""
    return judged["verdict"] + (f" ({judged['open']})" if judged["verdict"] == OPEN else "")


def _facts(measured: Sequence[Measured], cfg: Config, registered: Registration) -> dict[str, str]:
    runs = Path(cfg.runs_dir)
    seeds = ", ".join(str(seed) for seed in sorted({m.seed for m in measured})) or "none"
    sizes = sorted({(len(m.losses("baseline")), int(np.isfinite(m.answers("baseline")).sum())) for m in measured})
    planned = ", ".join(map(str, registered.seeds))
    asked = "; ".join(f"{documents} held-out documents, {questions} questions" for documents, questions in sizes)
    return {
        "Model": cfg.model.name,
        "Data": cfg.data.name,
        "Budget": f"{cfg.budget.name}, {cfg.size}",
        "Benchmark": f"{cfg.benchmark.name}: {asked}" if asked else cfg.benchmark.name,
        "Runs": f"{len({m.run for m in measured})} quantized runs, {'seeds' if ',' in seeds else 'seed'} {seeds}",
        "Registered": f"seeds {planned}; {registered.texts}; {registered.questions}",
    } | origin(Run(runs / m.run) for m in measured)


def origin(runs: Iterable[Run]) -> dict[str, str]:
    """Return where numbers come from: hardware and code of the runs, and this command."""
    environments = [environment for run in runs for environment in run.environments()]
    return {
        "Hardware": "; ".join(dict.fromkeys(map(hardware_name, environments))) or "unknown",
        "Code": "; ".join(dict.fromkeys(commit_name(environment["git"]) for environment in environments)) or "unknown",
        "Command": f"python {' '.join(sys.argv)}",
        "Date": str(date.today()),
    }


def _listed(lines: Mapping[str, str]) -> str:
    return "\n".join(f"- {label}: {text}" for label, text in lines.items())


def claims_sections(claims: Sequence[Mapping]) -> list[str]:
    """Write the claims as tables, with the damage that is known to be there."""
    if not claims:
        return []
    rows = [
        [
            claim["claim"] if not number else "",
            statement["statement"],
            f"{statement['response']}, {statement['unit']}",
            statement["text"],
            region(statement["region"]),
            _verdict(statement),
            "–" if statement["detectable"] is None else f"{statement['detectable']:.3g}",
            statement["decision"] or "–",
        ]
        for claim in claims
        for number, statement in enumerate([*claim["premises"], *claim["statements"]])
    ]
    header = ["Claim", "Statement", "Response", "Estimate [interval]", "True where", "Verdict"]
    controls = dict.fromkeys(f"- {claim['control']}" for claim in claims)
    shown = "Damage that is known to be there, and what these measures saw of it:\n\n" + "\n".join(controls)
    statements = markdown([*header, "Detectable", "Difference"], rows)
    return ["## Claims", claims_table(claims).markdown(), statements, shown]


def _controls(known: Sequence[Measured]) -> str:
    """Write what the measures see of 4-bit weights, a row a cell."""
    responses = [measures.heldout(known, "control", other=other) for other in (False, True)]
    responses += [measures.contrast(known, "control"), measures.points(known, "control")]
    return _rows({", ".join(key): {key: 1} for key in dict.fromkeys(m.key for m in known)}, responses)


def _cells(measured: Sequence[Measured]) -> str:
    """Write a row a cell of the factorial, over its seeds."""
    responses = factorial.responses(measured).values()
    rows = [
        [*key, *(response.cell(response.contrast({key: 1})) for response in responses)]
        for key in dict.fromkeys(m.key for m in measured)
    ]
    return markdown([*factorial.FACTORS, *map(_heading, responses)], rows)


def _heading(response: Response) -> str:
    return f"{response.name}, {response.unit}"


def _rates(measured: Sequence[Measured]) -> str:
    rates = {f"lr {rate}": {(rate,): 1} for rate in factorial.RATES} | {"lr 1e-5 − 1e-4": {("1e-5",): 1, ("1e-4",): -1}}
    return _rows(rates, factorial.baselines(measured).values())


def _plain(measured: Sequence[Measured]) -> str:
    keys = [key for key in dict.fromkeys(m.key for m in measured) if key[1] == audit.PLAIN]
    return _rows({key[0]: {key: 1} for key in keys}, audit.responses(measured).values())


def _rows(rows: Mapping[str, Weights], responses: Iterable[Response]) -> str:
    """Write a table of a contrast a row, a response a column."""
    responses = list(responses)
    cells = [[label, *(r.cell(r.contrast(weights)) for r in responses)] for label, weights in rows.items()]
    return markdown(["", *map(_heading, responses)], cells)


def _effects(table: Mapping) -> list[str]:
    """Write the effects on one response."""
    rows = [[row["effect"], row["text"], _p(row["p_holm"]) or "–"] for row in table["effects"]]
    unit = "ratio" if table["log"] else table["unit"]
    return [f"### {table['response']}", table["noise"], markdown(["Effect", f"{unit} [95 % CI]", "p, Holm"], rows)]


def _switches(effects: Sequence[Mapping], responses: Mapping[str, Response]) -> str:
    """Write a row a switch and base, a response a column."""
    rows = []
    for row in effects:
        cells = [
            cell["text"] + (f", p {_p(cell['p_holm'])}" if _p(cell["p_holm"]) else "")
            for cell in row["effects"].values()
        ]
        rows.append(
            ["–" if row["row"] is None else str(row["row"]), row["switch"], row["base"], str(row["linears"]), *cells]
        )
    headings = [f"{name}, {'ratio' if response.log else response.unit}" for name, response in responses.items()]
    return markdown(["Row", "Switch", "Off", "Linears", *headings], rows)


def _p(value: float | None) -> str:
    return "" if value is None else p_text(value)


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
    means = {rate: ptq.contrast({(rate,): 1}) for rate in factorial.RATES}
    drawn[0]["ptq"] = {rate: mean.value for rate, mean in means.items() if mean is not None}
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
            points = sorted((m.linears, m.ape) for m in measured if m.key[0] == base and m.key[1] in audit.SCOPES)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=5, linewidth=1.0, label=base)
        axes.set_xlabel("Quantized linears")
        axes.set_ylabel("Loss APE (%)", color=MUTED)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend()

    return Panel("Loss APE by scope", draw, width=520, height=height, margins=(62, 14, 32, 44))
