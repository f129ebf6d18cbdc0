"""Write a study as Markdown, HTML, JSON and a picture, in a folder that stands alone."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from qat.config import Config
from qat.report.page import figures, html, made, origin
from qat.report.plots import ACCENT, INK, MUTED, WARM, Mark, Panel, forest, png
from qat.report.studies import TITLES, claims_table, interaction, verdict
from qat.report.text import heading, markdown, number, p_text
from qat.runs.folder import Run
from qat.studies import audit, factorial, measures
from qat.studies.contrasts import CONTRADICTED, EQUIVALENT, OPEN, SUPPORTED, Response, Weights, region
from qat.studies.design import of_seeds
from qat.studies.measures import MODES, Measured
from qat.studies.registration import Registration
from qat.utils import files

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
    """Write the factorial into `out`; returns the path of its Markdown."""
    claims, effects = factorial.claims(measured), factorial.effects(measured)
    sections = [*_missing(missing), _REPEATED if factorial.repeated(measured) else "", *claims_sections(claims)]
    interactions = _interactions(measured) if measured else []
    if measured:
        panels = [interaction(panel, legend=not i) for i, panel in enumerate(interactions)]
        cells = {", ".join(key): {key: 1} for key in dict.fromkeys(m.key for m in measured)}
        rates = {f"lr {rate}": {(rate,): 1} for rate in factorial.RATES}
        rates |= {"lr 1e-5 − 1e-4": {("1e-5",): 1, ("1e-4",): -1}}
        sections += ["## Cells", Picture("Means of the cells, with 95 % intervals", panels)]
        sections += [_contrasts(", ".join(factorial.FACTORS), cells, factorial.responses(measured).values())]
        sections += ["## Baselines", _NOTE_BASELINES, _contrasts("", rates, factorial.baselines(measured).values())]
        sections += ["## Effects", _NOTE_EFFECTS, *(section for table in effects for section in _effects(table))]
    content = {"claims": claims, "interactions": interactions, "effects": effects, "missing": missing}
    return _write("factorial", measured, cfg, out, factorial.registered(), sections, content)


def write_audit(
    measured: Sequence[Measured], missing: Mapping[str, str], left_out: Mapping[str, str], cfg: Config, out: Path
) -> Path:
    """Write the audit into `out`; returns the path of its Markdown."""
    claims, effects = audit.claims(measured, cfg), audit.effects(measured)
    sections = [*_missing(missing | left_out), *claims_sections(claims)]
    if effects:
        responses = audit.responses(measured)
        panels = [_forest(effects), _scopes(measured)]
        cells = {key[0]: {key: 1} for key in dict.fromkeys(m.key for m in measured) if key[1] == audit.PLAIN}
        sections += ["## Switches", _NOTE_SWITCHES, Picture("Effects on held-out loss; APE against linears", panels)]
        sections += [_switches(effects, responses)]
        sections += ["## The cells they are thrown in", _contrasts("", cells, responses.values())]
        sections += [listed({name: response.noise() for name, response in responses.items()})]
    content = {"claims": claims, "effects": effects, "missing": missing, "left_out": left_out}
    return _write("audit", measured, cfg, out, audit.registered(), sections, content)


def write_decide(
    measured: Sequence[Measured], missing: Mapping[str, str], claims: Sequence[Mapping], cfg: Config, out: Path
) -> Path:
    """Write the verdicts on all claims into `out`; returns the path of its Markdown."""
    sections = ["**Provisional: some cells are missing (below).**"] if missing else []
    known = [m for m in measured if "control" in m.scored]
    rows = _in_margins(claims)
    sections += [Picture(_SHOWS_CLAIMS, [_of_claims(rows)], columns=1, note=_COLOURS)] if rows else []
    sections += [*claims_sections(claims), *(["## Controls", _NOTE_CONTROLS, _controls(known)] if known else [])]
    sections += _missing(missing, "Not measured yet")
    content = {"claims": claims, "missing": missing}
    return _write("decide", measured, cfg, out, factorial.registered(), sections, content)


_SHOWS_CLAIMS = "The difference that each statement is about, in units of its margin, with its interval"
_COLOURS = "Blue: supported; orange: contradicted; black: equivalent; grey: open. Band: too small to count"
_NOTE_CONTROLS = (
    "The damage of 4-bit weights to the recipe's BF16 baseline, by the same measures on the same text and questions, "
    "beside W8A8. Where a measure does not see the one, its verdicts mean nothing. Finds: in four of five cases."
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
    sections: Sequence[str | Picture],
    content: Mapping,
) -> Path:
    """Write a study that measured runs."""
    seeds = sorted({m.seed for m in measured})
    own = {
        "Benchmark": "; ".join(sorted(set(map(_sizes, measured)))) or cfg.benchmark.name,
        "Runs": f"{len({m.run for m in measured})} quantized runs, {of_seeds(seeds)}",
    }
    runs = [Run(Path(cfg.runs_dir) / m.run) for m in measured]
    content = {**content, "runs": _runs(measured)}
    return write(study, facts_of(cfg, own, registered, runs), registered, sections, content, out, READING)


def _sizes(m: Measured) -> str:
    """Write on how much a run was scored."""
    own, other = len(m.losses("baseline")), len(m.losses("baseline", other=True))
    questions = int(np.isfinite(m.answers("baseline")).sum())
    return f"{m.benchmark}: {own} documents of {m.text}, {other} of {m.other}, {questions} questions"


def _missing(missing: Mapping[str, str], title: str = "Missing") -> list[str]:
    return [f"## {title}", listed(missing)] if missing else []


class Picture(NamedTuple):
    """Hold the panels of a page's one picture, its alternative text, and what is written below it."""

    shows: str
    panels: Sequence[Panel]
    columns: int = 2
    note: str = ""


def write(
    study: str,
    facts: Mapping[str, str],
    registered: Registration,
    sections: Sequence[str | Picture],
    content: Mapping,
    out: Path,
    reading: str,
) -> Path:
    """Write what all studies open with and then `sections` as a page, and `content` as JSON; returns the Markdown.

    reading: how to read the page, with the names of margins in braces.
    """
    opening = [_summary(content["claims"]), reading.format_map(registered.margins), listed(facts)]
    path = write_page(out / f"{study}.md", TITLES[study], [*opening, *sections])
    finite = json.loads(json.dumps({"facts": facts, **content}), parse_constant=lambda _: None)  # JSON has no NaN
    files.replace(out / f"{study}.json", json.dumps(finite, indent=1))
    return path


def write_page(path: Path, title: str, sections: Sequence[str | Picture]) -> Path:
    """Write `sections` as Markdown into `path`, as .html and its picture as .png beside it; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [f"# {title}", *filter(None, sections)]

    def text(shown: Callable[[Picture], str]) -> str:
        return "\n\n".join(part if isinstance(part, str) else shown(part) for part in parts) + "\n"

    def drawn(picture: Picture) -> str:
        png(picture.panels, picture.columns, path.with_suffix(".png"), picture.note)
        return f"![{picture.shows}]({path.stem}.png)"

    def embedded(picture: Picture) -> str:
        return f"{figures(picture.panels)}\n\n{picture.note}"

    files.replace(path, text(drawn))
    files.replace(path.with_suffix(".html"), html(text(embedded), title))
    return path


# ---------------------------------------------------------------------------------------------------- parts


def _summary(claims: Sequence[Mapping]) -> str:
    counts = [f"{count} {verdict}" for verdict, count in Counter(map(_verdict, claims)).items()]
    return f"**Of {len(claims)} claims: {', '.join(counts)}.**" if claims else "**Nothing has been measured yet.**"


def _verdict(judged: Mapping) -> str:
    """Write a verdict; of one that is open, why."""
    word = verdict(judged)
    return f"{word} ({judged['open']})" if word == OPEN else word


def facts_of(cfg: Config, own: Mapping[str, str], registered: Registration, runs: Iterable[Run]) -> dict[str, str]:
    """Return what the numbers of a study rest on: what all have, with its own, and where its runs come from."""
    planned = f"{of_seeds(registered.seeds)}; {registered.texts}; questions: {registered.questions}"
    return {
        "Model": cfg.model.name,
        "Data": cfg.data.name,
        "Budget": f"{cfg.budget.name}, {cfg.size}",
        **own,
        "Registered": planned,
        **origin(runs),
        **made(),
    }


def listed(lines: Mapping[str, str]) -> str:
    """Write a list of labels and texts."""
    return "\n".join(f"- {label}: {text}" for label, text in lines.items())


def claims_sections(claims: Sequence[Mapping]) -> list[str]:
    """Write the claims as tables, with the damage that is known to be there."""
    if not claims:
        return []
    rows = [
        [
            claim["claim"] if not number else "",
            statement["statement"],
            heading(statement["response"], statement["unit"]),
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
    """Write what the measures see of 4-bit weights and of W8A8, with the smallest difference that they would find."""
    rows, cell = [], {known[0].key: 1}  # of the recipe alone
    for scored, name in (("control", "4-bit weights"), ("w8a8", "W8A8")):
        responses = [measures.heldout(known, scored, other=other) for other in (False, True)]
        responses += [measures.contrast(known, scored), measures.points(known, scored)]
        estimates = [(response, response.contrast(cell)) for response in responses]
        rows.append([name, *(f"{r.cell(e)}, finds {number(r.detectable(e), r.digits)}" for r, e in estimates)])
    headings = [heading(response.name.partition(",")[0], response.unit) for response in responses]
    return markdown(["Less the baseline", *headings], rows)


def _contrasts(about: str, rows: Mapping[str, Weights], responses: Collection[Response]) -> str:
    """Write a table of a contrast a row, a response a column; about: the heading of the rows."""
    cells = [[label, *(r.cell(r.contrast(weights)) for r in responses)] for label, weights in rows.items()]
    return markdown([about, *(heading(r.name, r.unit) for r in responses)], cells)


def _effects(table: Mapping) -> list[str]:
    """Write the effects on one response."""
    tests = [(row["effect"], row["text"], row["p_holm"]) for row in table["effects"]]
    rows = [[effect, text, "–" if p is None else p_text(p)] for effect, text, p in tests]
    unit = "ratio" if table["log"] else table["unit"]
    return [f"### {table['response']}", table["noise"], markdown(["Effect", f"{unit} [95 % CI]", "p, Holm"], rows)]


def _switches(effects: Sequence[Mapping], responses: Mapping[str, Response]) -> str:
    """Write a row a switch and base, a response a column."""
    rows = []
    for row in effects:
        of_row = ["–" if row["row"] is None else str(row["row"]), row["switch"], row["base"], str(row["linears"])]
        tests = [(c["text"], c["p_holm"]) for c in row["effects"].values()]
        rows.append(of_row + [text if p is None else f"{text}, p {p_text(p)}" for text, p in tests])
    headings = [f"{name}, {'ratio' if response.log else response.unit}" for name, response in responses.items()]
    return markdown(["Row", "Switch", "Off", "Linears", *headings], rows)


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
        cells = []
        for key in itertools.product(*factorial.FACTORS.values()):
            if mean := response.contrast({key: 1}):
                ends = {end: getattr(mean, end) for end in ("value", "low", "high")}
                ends |= {end: math.exp(at) for end, at in ends.items() if response.log and at is not None}
                cells.append(dict(zip(factorial.FACTORS, key, strict=True)) | ends)
        drawn.append({"title": title, "around_zero": not response.log, "cells": cells})
    ptq = factorial.baselines(measured)["ptq"]
    means = {rate: ptq.contrast({(rate,): 1}) for rate in factorial.RATES}
    drawn[0]["ptq"] = {rate: mean.value for rate, mean in means.items() if mean is not None}
    return drawn


def _forest(effects: Sequence[Mapping]) -> Panel:
    """Draw the effect of every switch on the held-out loss in W8A8."""
    shown = [marks(row["effects"]["Held-out loss, W8A8"]["estimate"]) for row in effects]
    labels = [f"{row['switch']} ({row['base'].partition(',')[0]})" for row in effects]
    rows = list(zip(labels, shown, strict=True))
    return replace(forest("Held-out loss in W8A8", rows, "Change of run − BF16 (nats)"), width=520)


def _in_margins(claims: Sequence[Mapping]) -> list[tuple[str, list[Mark]]]:
    """Return the difference of every statement that has a margin and an interval, in units of that margin."""
    colours, rows = {SUPPORTED: ACCENT, CONTRADICTED: WARM, EQUIVALENT: INK}, []
    for claim in claims:
        for statement in claim["statements"]:
            estimate, margin = statement["estimate"], statement["margin"]
            if margin and estimate and estimate["low"] is not None:
                value, *ends = (estimate[end] / margin for end in ("value", "low", "high"))
                style = {"color": colours.get(statement["verdict"], MUTED)}
                label = f"{claim['key'].replace('_', ' ')}: {statement['statement']}"
                rows.append((label, [Mark(value, ends, style=style)]))
    return rows


def _of_claims(rows: Sequence[tuple[str, list[Mark]]]) -> Panel:
    return replace(forest("Differences of all statements", rows, "margins", (-3, 3), margin=1), width=1100)


def marks(estimate: Mapping | None) -> list[Mark]:
    """Return what a forest shows of a `qat.studies.contrasts.Estimate`."""
    if estimate is None:
        return []
    return [Mark(estimate["value"], None if estimate["low"] is None else (estimate["low"], estimate["high"]))]


def _scopes(measured: Sequence[Measured]) -> Panel:
    """Draw the loss APE against the number of quantized linears."""

    def draw(axes: Axes) -> None:
        for base, colour in (("exp8", ACCENT), ("exp3", WARM)):
            points = sorted((m.linears, m.ape) for m in measured if m.key[0] == base and m.key[1] in audit.SCOPES)
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=5, linewidth=1.0, label=base)
        axes.set(xlabel="Quantized linears", ylabel="Loss APE (%)", ylim=(0, None))
        axes.grid(axis="y")
        axes.legend()

    return Panel("Loss APE by scope", draw, width=520)
