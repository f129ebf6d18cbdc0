"""A record beside what its runs came to when they were repeated here: on like hardware, inside the stated intervals."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from qat.analysis.compare import against_baseline
from qat.analysis.rerun_noise import rerun_noise
from qat.errors import UserError
from qat.report.text import RERUN_HEADER, change, markdown, rerun_cells, signed
from qat.runs import archive
from qat.runs.folder import Run

_UNLIKE = "not comparable with the record"
HEADER = ["Run", "Held-out text", "W8A8 less BF16, nats: the record [95 % CI over texts]", "Here"]
HEADER += ["Decision: the record's, here", ""]


def verify(record: Path, runs: Path) -> tuple[str, int]:
    """Return every run of a record that is in `runs`, too: what it differs by from the record's, and whether its
    difference from its baseline lies inside the record's interval; (Markdown, how many lie outside or cannot be
    compared).

    The interval is that of other text of the kind, so it is wide beside what a repetition on like hardware should show;
    the paired differences, in the first table, are the closer look. Errors: UserError where no run was repeated.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive.restore(record, Path(folder))
        done = [run for run in map(Run, sorted(Path(folder).iterdir())) if run.finished]
        both = [(run, Run(runs / run.id)) for run in done if Run(runs / run.id).finished]
        if not both:
            raise UserError(f"{runs} has none of the {len(done)} runs of {record}; repeat its command (its README.md)")
        both = [pair for pair in both if not _copied(*pair)]
        if not both:
            restored = f"{runs} has the runs of {record} as they were put back, none repeated"
            raise UserError(f"{restored}; repeat its command, and this one, with ARGS=runs_dir=<another folder>")
        noises = [_rerun_noise(*pair) for pair in both]
        rows = [row for pair, (noise, _) in zip(both, noises, strict=True) for row in _differences(*pair, noise)]
    drop = RERUN_HEADER.index("Repeat")
    parts = [markdown(_without(RERUN_HEADER, drop), [_without(cells, drop) for _, cells in noises])]
    parts += [markdown(HEADER, [row for row, _ in rows])] if rows else []
    if len(both) < len(done):
        parts += [f"{len(both)} of the record's {len(done)} runs were repeated here; nothing is said of the others."]
    failed = sum(noise is None for noise, _ in noises) + sum(amiss for _, amiss in rows)
    return "\n\n".join(parts) + "\n", failed


def _copied(first: Run, again: Run) -> bool:
    """Return whether the one was put back from the other: two runs never take the same time in every step."""
    return first.metrics() == again.metrics()


def _rerun_noise(first: Run, again: Run) -> tuple[dict | None, list[str]]:
    """Return what the two differ by, None where they cannot be compared, and the cells that say so."""
    try:
        noise = rerun_noise(first, again, _benchmark(first))
    except UserError as reason:
        return None, [first.id, *["-"] * (len(RERUN_HEADER) - 2), f"{_UNLIKE}: {reason}"]
    return noise, rerun_cells(noise)


def _benchmark(run: Run) -> str:
    return run.typed_config().benchmark.name


def _without(cells: Sequence[str], place: int) -> list[str]:
    return [*cells[:place], *cells[place + 1 :]]


def _differences(first: Run, again: Run, noise: dict | None) -> list[tuple[list[str], bool]]:
    """Return a row a held-out text of a quantized run, one that says why where either cannot be compared with its
    baseline, and whether it is amiss. Nothing of a run that is unlike or not scored, or identical without a baseline.
    """
    if not (first.typed_config().quantized and noise and noise["heldout"]):
        return []
    try:
        stated, here = (_against_baseline(run, _benchmark(first)) for run in (first, again))
    except UserError as reason:
        why, *_ = str(reason).split("; ")  # what follows is of a folder that is about to go
        return [] if noise["identical"] else [([first.id, *["-"] * 4, f"{_UNLIKE}: {why}"], True)]
    rows = []
    for text, row in stated.items():
        difference, ci = here[text]["difference"], row["ci"]
        outside = ci is not None and not ci[0] <= difference <= ci[1]
        place = "-" if ci is None else "outside" if outside else "inside"
        cells = [first.id, text, change(row["difference"], ci), signed(difference, 4)]
        rows.append(([*cells, f"{row['decision']}, {here[text]['decision']}", place], outside))
    return rows


def _against_baseline(run: Run, benchmark: str) -> dict[str, dict]:
    rows = against_baseline(run, benchmark)["heldout"]
    return {row["text"]: row for row in rows if row["mode"] == "w8a8"}
