"""Write the ladder of PTQ methods as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qat.analysis.decisions import DECISIONS
from qat.analysis.measures import MEASURES
from qat.eval.subject import calibration_size
from qat.quant.ptq import METHODS, rung
from qat.report.plots import INK, Mark, Panel, forest
from qat.report.text import decided, heading, markdown, number
from qat.studies import ptq
from qat.studies.design import of_seeds
from qat.studies.page import TOGETHER, VERDICTS, Picture, claims_sections, facts_of
from qat.studies.page import write as write_study
from qat.studies.ptq import Ladder

_ABOUT = (
    "Every row quantizes the same weights of the same model, without training, and is compared with that model in BF16 "
    "and with the row `max`, document by document, question by question. Registered: what was expected before the "
    "first run, of the difference from max (of max itself: from BF16). Seconds: of calibration, the "
    "library's own start in its first row included."
)
_READING = f"{TOGETHER}. {VERDICTS}, {{score:g}} % of a score."
_LEGEND = "Band: the margin; dotted: max; bars: 95 % intervals; arrows: beyond the axis"
_ANSWERS = {"accuracy": 1, "cross_entropy": 4, "contrast": 4}  # digits


def write(ladders: Sequence[Ladder], out: Path) -> Path:
    """Write the ladder into `out`; returns the path of its HTML."""
    rows, claims = ptq.rows(ladders), ptq.claims(ladders)
    texts = list(rows[0]["bf16"])
    shows = "What each row adds to the held-out loss, with 95 % intervals"
    sections = [Picture(shows, [_forest(rows, text) for text in texts], note=_LEGEND), "## Held-out loss", _ABOUT]
    sections += [section for text in texts for section in (f"### {text}", _losses(rows, text))]
    sections += ["## Answers", _answers(rows), *claims_sections(claims), "## What the rows do"]
    sections += ["\n".join(f"- `{row['rung']}`: {_does(row['rung'])}" for row in rows)]
    sections += ["## Words", "\n".join(f"- **{word}**: {meaning}" for word, meaning in DECISIONS.items())]
    runs = [{"run": ladder.reference.run.id, "baseline": ladder.reference.run.id} for ladder in ladders]
    content = {"claims": claims, "rows": rows, "runs": runs}
    path = write_study("ptq", _facts(ladders), ptq.registered(), sections, content, out, _READING)
    return path.with_suffix(".html")


def _facts(ladders: Sequence[Ladder]) -> dict[str, str]:
    cfg, reference, record = ladders[0].cfg, ladders[0].reference, ladders[0].match().reference.record
    documents = [f"{len(row['document_losses'])} documents of {name}" for name, row in record["heldout"].items()]
    questions = sum(row["n"] for row in record["tasks"].values())
    sequences, length = calibration_size(cfg)
    own = {
        "Runs": f"{cfg.ptq.on} model in BF16, {of_seeds([ladder.cfg.seed for ladder in ladders])}",
        "Quantized": f"{', '.join(cfg.quant.scope)}, {cfg.quant.bf16_blocks} blocks in BF16",
        "Calibration": f"{sequences} sequences of {length} tokens of {cfg.data.name}",
        "Measured on": f"{', '.join(documents)}; {questions} questions of benchmark {cfg.benchmark.name}",
    }
    return facts_of(reference.cfg, own, ptq.registered(), [ladder.reference.run for ladder in ladders])


def _losses(rows: Sequence[Mapping], text: str) -> str:
    cells = []
    for row in rows:
        less_max = decided(row["max"][text]) if row["max"] else "–"
        about = [row["expected"] or "–", number(row["seconds"], 1)]
        cells.append([f"`{row['rung']}`", decided(row["bf16"][text]), less_max, *about])
    return markdown(["Row", "Less BF16, nats", "Less max, nats", "Registered", "Seconds"], cells)


def _answers(rows: Sequence[Mapping]) -> str:
    """Write the answers of the rows that were asked, less BF16's."""
    asked = [row for row in rows if row["answers"]]
    if not asked:
        return "No row was asked the benchmark's questions."
    names = [name for name in _ANSWERS if name in asked[0]["answers"]]
    cells = [[f"`{row['rung']}`", *(decided(row["answers"][name], _ANSWERS[name]) for name in names)] for row in asked]
    return markdown(["Row", *(heading(MEASURES[name].name, MEASURES[name].unit) for name in names)], cells)


def _does(name: str) -> str:
    one = rung(name)
    return f"As max, in {one.format}." if one.format else " ".join(METHODS[one.method].prepare.__doc__.split())


def _forest(rows: Sequence[Mapping], text: str) -> Panel:
    """Draw what every row adds to the loss on a text."""
    shown = {row["rung"]: row["bf16"][text] for row in rows}
    marks = [
        (name, [Mark(row["difference"], row["ci"], style={"color": INK} if name == "max" else {})])
        for name, row in shown.items()
    ]
    limits = {"margin": shown["max"]["margin"], "dotted": shown["max"]["difference"]}
    return forest(f"Held-out loss, {text}", marks, "Loss less BF16's (nats a token)", **limits)
