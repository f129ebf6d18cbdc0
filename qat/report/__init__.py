"""The report: every experiment beside the paper's numbers, with the noise of each difference, on one page.

`write` makes `report.html` (self-contained), `report.md` with the same tables, and three pictures for a README. What
is missing (a run, a baseline, an evaluation) becomes a line with the command that makes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qat.report.experiment import Experiment, published
from qat.report.page import render
from qat.report.pictures import write_pictures
from qat.report.selection import described, selected
from qat.report.studies import studies_in

__all__ = ["Experiment", "described", "selected", "write"]


def write(experiments: Sequence[Experiment], out: Path, context: Mapping) -> tuple[Path, Path]:
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
