"""Make the tables of noise: between seeds, and of reruns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qat.analysis import rerun_noise as reruns
from qat.analysis.compare import MODES
from qat.analysis.stats import student
from qat.errors import UserError
from qat.report.cells import Table, text_table
from qat.report.experiment import Experiment, distinct
from qat.report.text import RERUN_HEADER, change, rerun_cells


def seeds(experiments: Sequence[Experiment]) -> Table:
    """Return the noise between seeds of every recipe that ran with several, by mode and of the pretrained checkpoint.

    Mean and 95 % interval over seeds (Student's t) of the differences from the matched BF16 runs, beside the mean half
    interval that one run has from its sampled text and questions.
    """
    rows = []
    for label, recipe in distinct(experiments).items():
        compared = [pair.comparison for pair in recipe.compared]
        if len(compared) < 2 or recipe.missing:
            continue
        apes = [c["loss"]["ape"] for c in compared]
        for mode, name in (MODES | {"pretrained": "pretrained checkpoint"}).items():
            held = [_changed(c["heldout"], mode) for c in compared]  # the first text is the data's own
            if not all(held):
                continue
            ape = _spread(apes, 3, "") if mode == "w8a8" else ""
            loss = [_spread([row["difference"] for row in held], 4), _half_interval(held, 4)]
            pooled, points = [_changed(c["pooled"], mode) for c in compared], ["–", "–"]
            if all(pooled):
                points = [_spread([row["points"] for row in pooled], 2), _half_interval(pooled, 2)]
            rows.append([label if mode == "w8a8" else "", name, str(len(compared)), ape, *loss, *points])
    header = ["", "Scored", "Seeds", "Loss APE %", "Held-out loss, nats: over seeds", "one run's ±"]
    return text_table([*header, "All questions, points: over seeds", "one run's ±"], rows)


def _changed(rows: Sequence[Mapping], mode: str) -> Mapping | None:
    """Return a comparison's row of a mode, or a pretrained checkpoint's, which has no interval."""
    row = next((row for row in rows if row["mode"] == (mode if mode in MODES else "w8a8")), None)
    if row is None or mode in MODES:
        return row
    start = row["pretrained"]
    return None if start is None else dict.fromkeys(("difference", "points"), start - row["baseline"]) | {"ci": None}


def rerun_noise(experiments: Sequence[Experiment]) -> Table:
    """Return every run and baseline beside its repetitions, or why they cannot be compared."""
    runs = {name: (run, e.configs[name]) for e in experiments for name, run in e.existing.items()}
    rows = []
    for run, config in runs.values():
        for place, repeat in enumerate(reruns.reruns(run), start=1):
            try:
                rows.append(rerun_cells(reruns.rerun_noise(run, repeat, config["benchmark"]["name"])))
            except UserError as reason:
                rows.append([run.id, str(place), *["–"] * (len(RERUN_HEADER) - 3), str(reason)])
    return text_table(RERUN_HEADER, rows)


def _spread(values: Sequence[float], digits: int, plus: str = "+") -> str:
    mean, agree = student(np.array(values)), max(values) - min(values) < 1e-9  # which is no certainty
    return change(mean.value, None if agree else mean.interval(), digits, plus)


def _half_interval(rows: Sequence[Mapping], digits: int) -> str:
    halves = [_width(row) / 2 for row in rows if row["ci"]]
    return f"{sum(halves) / len(halves):.{digits}f}" if halves else "–"


def _width(row: Mapping) -> float:
    return row["ci"][1] - row["ci"][0]
