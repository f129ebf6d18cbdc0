"""What the finished runs of a study measured, each beside its matched baseline, PTQ and the pretrained checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qat.analysis.compare import TASKS, compare, eval_command
from qat.analysis.results import EvalResult
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of
from qat.studies.contrasts import Response
from qat.studies.design import Cell, Key

MODES = {"w8a8": "W8A8", "bf16": "BF16 weights"}  # what a run is scored as
_NAMES = MODES | {"ptq": "PTQ"}


@dataclass
class Measured:
    """The numbers of one run. Keys of `losses` and `right` are what was scored: w8a8 and bf16 (the run in either mode),
    baseline, ptq (the baseline in W8A8 without QAT, by the mode `ptq`), pretrained.

    losses: FP64 [held-out documents], nats a token; right: by task, FP64 [questions], 1 or 0; ape: percent;
    overshoot: share of tensors beyond their predicted amax, over quantized steps; clipped: share of elements beyond the
    target, over probed steps and tensors; linears: how many are quantized.
    """

    key: Key
    seed: int
    run: str
    baseline: str
    ptq: str
    losses: dict[str, np.ndarray]
    right: dict[str, dict[str, np.ndarray]]
    ape: float
    overshoot: float
    clipped: float
    linears: int

    def answers(self, scored: str) -> np.ndarray:
        """All tasks' questions in one row."""
        return np.concatenate(list(self.right[scored].values()))


def read(cells: Iterable[Cell]) -> tuple[list[Measured], dict[str, str]]:
    """What the cells measured, and {label: why not} of those that cannot be read, or were not scored as the first."""
    found, missing, first = [], {}, None
    for cell in cells:
        try:
            base = _baseline(cell)
            if first:
                base.refuse_unlike(first)
            found.append(_read(cell))
            first = first or base
        except UserError as reason:
            missing[cell.label] = str(reason)
    return found, missing


def _baseline(cell: Cell) -> EvalResult:
    run, benchmark = Run.of(cell.cfg), cell.cfg.benchmark.name
    return EvalResult(Run.of(baseline_of(cell.cfg)), benchmark, "bf16", eval_command(run, benchmark))


def _read(cell: Cell) -> Measured:
    cfg, benchmark = cell.cfg, cell.cfg.benchmark.name
    run, base, origin = (Run.of(each) for each in (cfg, baseline_of(cfg), pretrained_of(cfg)))
    comparison = compare(Path(run.path), Path(base.path), benchmark, Path(origin.path))  # refuses what is unlike
    scored = {"w8a8": (run, "w8a8"), "bf16": (run, "bf16"), "baseline": (base, "bf16"), "pretrained": (origin, "bf16")}
    if comparison["ptq"] is None:
        missing = f"{base.id} has no {benchmark} evaluation by PTQ"
        raise UserError(f"{missing}; make it: {eval_command(run, benchmark)}")
    scored["ptq"] = base, comparison["ptq"]
    losses, right = {}, {}
    for name, (owner, mode) in scored.items():
        record = owner.evaluations()[benchmark][mode]
        losses[name] = np.array(record["heldout"][cfg.data.name]["document_losses"])
        right[name] = {
            task: np.array([float(row["correct"]) for row in owner.samples(benchmark, mode, task)])
            for task in record["tasks"]
        }
    return Measured(
        key=cell.key,
        seed=cfg.seed,
        run=run.id,
        baseline=base.id,
        ptq=comparison["ptq"],
        losses=losses,
        right=right,
        ape=comparison["loss"]["ape"],
        overshoot=_mean(row["overshoot_share"] for row in run.metrics() if row.get("overshoot_share") is not None),
        clipped=_mean(row["beyond"] for row in run.telemetry() if "beyond" in row),
        linears=len(run.coverage().get("linears", ())),
    )


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


# ------------------------------------------------------------------------------------------------- responses


def heldout(measured: Sequence[Measured], ours: str, theirs: str = "baseline", **more) -> Response:
    """Held-out loss of what `ours` names less that of `theirs`."""
    name = f"Held-out loss, {_versus(ours, theirs)}"
    return _response(measured, name, "nats", 4, lambda m: m.losses[ours] - m.losses[theirs], "documents", **more)


def points(measured: Sequence[Measured], ours: str, theirs: str = "baseline", task: str | None = None, **more):
    """Percentage points of right answers of `ours` less those of `theirs`, over all questions or those of one task."""

    def change(m: Measured) -> np.ndarray:
        sides = ((m.right[s][task] if task else m.answers(s)) for s in (ours, theirs))
        return 100 * np.subtract(*sides)

    name = f"{TASKS.get(task, task) if task else 'All questions'}, {_versus(ours, theirs)}"
    return _response(measured, name, "points", 2, change, "questions", **more)


def ape(measured: Sequence[Measured]) -> Response:
    """Logarithm of the loss APE: its effects are factors, its means geometric."""
    with np.errstate(divide="ignore"):  # a run that equals its baseline has none, and is left out
        return _response(measured, "Loss APE, geometric mean", "%", 3, lambda m: np.log([m.ape]), log=True)


def overshoot(measured: Sequence[Measured]) -> Response:
    name = "Share of tensors beyond their predicted amax"
    return _response(measured, name, "points", 2, lambda m: [100 * m.overshoot])


def clipped(measured: Sequence[Measured]) -> Response:
    name = "Elements beyond the target"
    return _response(measured, name, "in a million", 2, lambda m: [1e6 * m.clipped])


def _versus(ours: str, theirs: str) -> str:
    return f"{_NAMES.get(ours, ours)} less {_NAMES.get(theirs, theirs)}"


def _response(
    measured: Sequence[Measured],
    name: str,
    unit: str,
    digits: int,
    of: Callable[[Measured], Sequence[float]],
    sampled: str = "",
    key: Callable[[Measured], Key] = lambda m: m.key,
    log: bool = False,
) -> Response:
    values = {(key(m), m.seed): np.asarray(of(m), float) for m in measured}
    finite = {k: v for k, v in values.items() if np.isfinite(v).all()}
    return Response(name, unit, digits, finite, sampled, log, without=len(values) - len(finite))
