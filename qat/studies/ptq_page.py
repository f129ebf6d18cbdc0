"""Write the ladder of PTQ methods as a page, JSON and a picture, in a folder that stands alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from qat.analysis.decisions import DECISIONS
from qat.analysis.measures import MEASURES
from qat.eval.subject import calibration_size
from qat.quant.ptq import METHODS, rung
from qat.report.page import Figures, html
from qat.report.plots import ACCENT, BASE, INK, MUTED, RULE, Panel, png
from qat.report.studies import TITLES
from qat.report.text import interval, markdown, number, signed
from qat.studies import ptq
from qat.studies.page import TOGETHER, VERDICTS, claims_sections, origin
from qat.studies.page import write as write_study
from qat.studies.ptq import Ladder

_ABOUT = (
    "Every row quantizes the same weights of the same model, without training, and is compared with that model in BF16 "
    "and with the row `max`, document by document, question by question. Registered: what was expected before the "
    "first run, of the difference from max (of max itself: from BF16). Seconds: of calibration, the "
    "library's own start in its first row included."
)
_READING = f"{TOGETHER}. {VERDICTS}, {{score:g}} % of a score."
_LEGEND = "band: the margin; dotted: max; bars: 95 % intervals"


def write(ladders: Sequence[Ladder], out: Path) -> Path:
    """Write `ptq.html`, `.md`, `.json` and `.png` into `out`; returns the path of the first."""
    out.mkdir(parents=True, exist_ok=True)
    rows, claims, figures = ptq.rows(ladders), ptq.claims(ladders), Figures()
    texts = list(rows[0]["bf16"])
    panels = [_forest(rows, text) for text in texts]
    png(panels, 2, out / "ptq.png", _LEGEND)
    sections = ["![What each row adds to the held-out loss, with 95 % intervals](ptq.png)", "## Held-out loss", _ABOUT]
    sections += [section for text in texts for section in (f"### {text}", _losses(rows, text))]
    sections += ["## Answers", _answers(rows), *claims_sections(claims), "## What the rows do", _methods(rows)]
    sections += ["## Words", "\n".join(f"- **{word}**: {meaning}" for word, meaning in DECISIONS.items())]
    runs = [{"run": ladder.reference.run.id, "baseline": ladder.reference.run.id} for ladder in ladders]
    content = {"claims": claims, "rows": rows, "runs": runs}
    path = write_study("ptq", _facts(ladders), ptq.registered(), sections, content, out, _READING)
    text = path.read_text(encoding="utf-8")
    text = text.replace(sections[0], f"{figures.add(panels)}\n\n{_LEGEND.capitalize()}.")
    (out / "ptq.html").write_text(html(text, figures, TITLES["ptq"]), encoding="utf-8")
    return out / "ptq.html"


def _facts(ladders: Sequence[Ladder]) -> dict[str, str]:
    cfg, reference = ladders[0].cfg, ladders[0].match().reference
    heldout = reference.record["heldout"].items()
    documents = [f"{len(row['document_losses'])} documents of {name}" for name, row in heldout]
    questions = sum(row["n"] for row in reference.record["tasks"].values())
    trained = "the pretrained model, not trained" if cfg.ptq.on == "pretrained" else f"BF16 baseline, {cfg.size}"
    seeds = ", ".join(str(ladder.cfg.seed) for ladder in ladders)
    (sequences, length), registered = calibration_size(cfg), ptq.registered()
    return {
        "Model": f"{cfg.model.name}, {trained}, seeds {seeds}",
        "Quantized": f"{', '.join(cfg.quant.scope)}, {cfg.quant.bf16_blocks} blocks in BF16",
        "Calibration": f"{sequences} sequences of {length} tokens of {cfg.data.name}",
        "Measured on": f"{', '.join(documents)}; {questions} questions of benchmark {cfg.benchmark.name}",
        "Registered": "; ".join((registered.texts, registered.questions)),
        **origin(ladder.reference.run for ladder in ladders),
    }


def _losses(rows: Sequence[Mapping], text: str) -> str:
    cells = [
        [
            f"`{row['rung']}`",
            _change(row["bf16"][text]),
            _change(row["max"].get(text)),
            row["expected"] or "–",
            number(row["seconds"], 1),
        ]
        for row in rows
    ]
    return markdown(["Row", "Less BF16, nats", "Less max, nats", "Registered", "Seconds"], cells)


def _change(row: Mapping | None, digits: int = 4) -> str:
    """Write a difference with its interval, and below it what that says."""
    if row is None:
        return "–"
    limits = f"finds {number(row['detectable'], digits)}, margin {number(row['margin'], digits)}"
    difference = f"{signed(row['difference'], digits)} {interval(row['ci'], digits)}"
    return f"{difference}<br>**{row['decision']}** ({limits})"


def _answers(rows: Sequence[Mapping]) -> str:
    """Write the answers of the rows that were asked, less BF16's."""
    asked = [row for row in rows if row["answers"]]
    if not asked:
        return "No row was asked the benchmark's questions."
    names = [name for name in ("accuracy", "cross_entropy", "contrast") if name in asked[0]["answers"]]
    cells = [
        [f"`{row['rung']}`", *(_change(row["answers"][name], 1 if name == "accuracy" else 4) for name in names)]
        for row in asked
    ]
    return markdown(["Row", *map(_heading, names)], cells)


def _heading(measure: str) -> str:
    return ", ".join(filter(None, (MEASURES[measure].name, MEASURES[measure].unit)))


def _methods(rows: Sequence[Mapping]) -> str:
    def does(name: str) -> str:
        one = rung(name)
        if one.format:
            return f"As max, in {one.format}."
        return " ".join(METHODS[one.method].prepare.__doc__.split())

    return "\n".join(f"- `{row['rung']}`: {does(row['rung'])}" for row in rows)


def _forest(rows: Sequence[Mapping], text: str) -> Panel:
    """Draw what every row adds to the loss on a text."""

    def draw(axes: Axes) -> None:
        places = range(len(rows))[::-1]
        margin = rows[0]["bf16"][text]["margin"]
        axes.axvspan(-margin, margin, color=RULE, alpha=0.6, linewidth=0)
        axes.axvline(0, color=BASE, linewidth=1.4)
        for y, row in zip(places, rows, strict=True):
            shown, colour = row["bf16"][text], INK if row["rung"] == "max" else ACCENT
            if row["rung"] == "max":
                axes.axvline(shown["difference"], color=MUTED, linewidth=1.0, linestyle=":")
            if shown["ci"]:
                axes.hlines(y, *shown["ci"], color=colour, linewidth=1.3)
            axes.plot(shown["difference"], y, "o", color=colour, markersize=5)
        axes.set_yticks(places, [row["rung"] for row in rows])
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("Loss less BF16's (nats a token)")

    height = 80 + 20 * len(rows)
    return Panel(f"Held-out loss, {text}", draw, width=430, height=height, margins=(110, 14, 32, 44))
