"""A record beside what its runs came to when they were repeated here: on like hardware, inside the stated intervals."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qat import records
from qat.compare import compare
from qat.config import UserError
from qat.floor import floor
from qat.report.experiment import untouched
from qat.runs import Run, baseline_of, run_id
from qat.wording import FLOOR_HEADER, floor_cells, interval, markdown, signed

HEADER = ["Run", "Held-out text", "W8A8 less BF16, nats: the record", "Here", ""]


def verify(record: Path, runs: Path) -> tuple[str, int]:
    """Every run of a record that is in `runs`, too: what it differs by from the record's, and whether its difference
    from its baseline lies inside the record's interval; (Markdown, how many differences lie outside).

    Errors: UserError where no run is in both, or the two were trained on other text or scored in another way.
    """
    with tempfile.TemporaryDirectory() as folder:
        records.restore(record, Path(folder))
        kept = [Run(path) for path in sorted(Path(folder).iterdir())]
        both = [(run, Run(runs / run.id)) for run in kept if run.finished and Run(runs / run.id).finished]
        if not both:
            raise UserError(
                f"{runs} has none of the {len(kept)} runs of {record}; repeat its command (see its README.md)"
            )
        floors = [floor_cells(floor(first, again, _benchmark(first))) for first, again in both]
        rows = [row for first, again in both if first.typed_config().quantized for row in _differences(first, again)]
    drop = FLOOR_HEADER.index("Repeat")
    parts = [markdown(_without(FLOOR_HEADER, drop), [_without(cells, drop) for cells in floors])]
    parts += [markdown(HEADER, rows)] if rows else []
    return "\n\n".join(parts) + "\n", sum(row[-1] == "outside" for row in rows)


def _benchmark(run: Run) -> str:
    return run.typed_config().benchmark.name


def _without(cells: Sequence[str], place: int) -> list[str]:
    return [*cells[:place], *cells[place + 1 :]]


def _differences(first: Run, again: Run) -> list[list[str]]:
    """A row a held-out text; none where the baseline was not repeated."""
    sides = []
    for run in (first, again):
        base = Run(run.path.parent / run_id(baseline_of(run.typed_config())))
        if not (base.finished and base.evaluations() and run.evaluations()):
            return []
        origin = untouched(run)
        found = compare(run.path, base.path, _benchmark(run), origin and origin.path)
        sides.append({row["text"]: row for row in found["heldout"] if row["mode"] == "w8a8"})
    rows = []
    for text, stated in sides[0].items():
        here = sides[1][text]["difference"]
        low, high = stated["ci"] or [stated["difference"]] * 2
        cells = [first.id, text, f"{signed(stated['difference'], 4)} {interval(stated['ci'], 4)}", signed(here, 4)]
        rows.append([*cells, "inside" if low <= here <= high else "outside"])
    return rows
