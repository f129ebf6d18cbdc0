"""Read what the finished runs of a study measured, beside their matched baseline, PTQ and the pretrained checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qat.analysis.compare import eval_command, match
from qat.analysis.results import EvalResult, Outcomes
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, pretrained_of
from qat.studies.contrasts import Response
from qat.studies.design import Cell, Key, of_seeds

MODES = {"w8a8": "W8A8", "bf16": "BF16 weights"}  # what a run is scored as
_NAMES = MODES | {"ptq": "PTQ"}


@dataclass
class Measured:
    """Hold the numbers of one run.

    scored: by what was scored: w8a8 and bf16 (the run in either mode), baseline, ptq (the baseline in W8A8 without QAT,
    by the mode `ptq`), pretrained, and control (the baseline with 4-bit weights) where it was scored; text: the data's
    own; other: the text of another kind, empty where there is none; ape: percent; overshoot: share of tensors
    beyond their predicted amax, over quantized steps; clipped: share of elements beyond the target, over probed steps
    and tensors; linears: how many are quantized.
    """

    key: Key
    seed: int
    benchmark: str
    run: str
    baseline: str
    ptq: str
    text: str
    other: str
    scored: Mapping[str, Outcomes]
    ape: float
    overshoot: float
    clipped: float
    linears: int

    def losses(self, ours: str, theirs: str | None = None, other: bool = False) -> np.ndarray:
        """Return losses by document of the data's own text or the other one, FP64, or those less the ones of `theirs`.
        NaN where there is no such text."""
        return self._outcomes(ours, theirs).losses.get(self.other if other else self.text, np.full(1, np.nan))

    def answers(self, ours: str, theirs: str | None = None) -> np.ndarray:
        """Return answers by question, FP64, or what they are above those of `theirs`. NaN where none were asked."""
        outcomes = self._outcomes(ours, theirs)
        return outcomes.pooled() if outcomes.answers else np.full(1, np.nan)

    def contrasts(self, ours: str, theirs: str | None = None) -> np.ndarray:
        """Return the answer contrast by question, FP64 bits per byte, of all tasks that have it; or less `theirs`."""
        outcomes = self._outcomes(ours, theirs)
        tasks = [task for task, rows in outcomes.answers.items() if "contrast" in rows]
        return outcomes.pooled(tasks, "contrast") if tasks else np.full(1, np.nan)

    def with_answers(self, asked: Measured | None) -> Measured:
        """Return these losses with the answers of another benchmark, where it was asked."""
        if asked is None:
            return self
        both = self.scored.keys() & asked.scored.keys()
        scored = {name: Outcomes(self.scored[name].losses, asked.scored[name].answers) for name in both}
        return replace(self, scored={**self.scored, **scored})

    def _outcomes(self, ours: str, theirs: str | None) -> Outcomes:
        return self.scored[ours] - self.scored[theirs] if theirs else self.scored[ours]


def read(cells: Iterable[Cell]) -> tuple[list[Measured], dict[str, str]]:
    """Read the cells; (what they measured, {name and seeds: why not} of those that cannot be read or were scored
    otherwise)."""
    measured, missing, first = [], defaultdict(list), {}  # seeds by name and reason; by benchmark and other text
    for cell in cells:
        try:
            numbers, reference = _read(cell)
            for (_, text), other in first.items():
                if text == numbers.other:
                    reference.refuse_unlike(other)
            measured.append(numbers)
            first.setdefault((reference.benchmark, numbers.other), reference)
        except UserError as reason:
            missing[cell.name, str(reason)].append(cell.cfg.seed)
    return measured, {f"{name}, {of_seeds(seeds)}": reason for (name, reason), seeds in missing.items()}


def _read(cell: Cell) -> tuple[Measured, EvalResult]:
    """Read a cell, and what its baseline was scored as."""
    cfg, benchmark = cell.cfg, cell.cfg.benchmark.name
    run, base, origin = (Run.of(side) for side in (cfg, baseline_of(cfg), pretrained_of(cfg)))
    if not run.path.exists():
        raise UserError("not begun")
    matched = match(run, base, benchmark, origin)
    results = matched.own | {"baseline": matched.reference, "pretrained": matched.origin}
    if "ptq" not in results:
        missing = f"{base.id} has no {benchmark} evaluation by PTQ"
        raise UserError(f"{missing}; make it: {eval_command(run, benchmark)}")
    measured = Measured(
        key=cell.key,
        seed=cfg.seed,
        benchmark=benchmark,
        run=run.id,
        baseline=base.id,
        ptq=results["ptq"].mode,
        text=cfg.data.name,
        other=cfg.validation.name if cfg.validation else "",
        scored={name: result.outcomes for name, result in results.items()},
        ape=matched.loss["ape"],
        overshoot=_mean(row["overshoot_share"] for row in run.metrics() if row.get("overshoot_share") is not None),
        clipped=_mean(row["beyond"] for row in run.telemetry() if "beyond" in row),
        linears=len(run.coverage().get("linears", ())),
    )
    return measured, matched.reference


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return float(np.mean(values)) if values else float("nan")


# ------------------------------------------------------------------------------------------------- responses


def heldout(measured: Sequence[Measured], ours: str, theirs: str = "baseline", other: bool = False, **more) -> Response:
    """Measure the held-out loss of what `ours` names less that of `theirs`, on the data's own text or the other one."""
    measure = "other_loss" if other else "heldout_loss"
    name = f"{'Loss on other text' if other else 'Held-out loss'}, {_versus(ours, theirs)}"
    return _response(measured, measure, name, "nats", 4, lambda m: m.losses(ours, theirs, other), "documents", **more)


def contrast(measured: Sequence[Measured], ours: str, theirs: str = "baseline", **more) -> Response:
    """Measure the answer contrast of `ours` less that of `theirs`, over all questions whose choices are text."""
    name = f"Answer contrast, {_versus(ours, theirs)}"
    unit = "bits per byte"
    return _response(measured, "contrast", name, unit, 4, lambda m: m.contrasts(ours, theirs), "questions", **more)


def points(measured: Sequence[Measured], ours: str, theirs: str = "baseline", **more) -> Response:
    """Measure the points of right answers of `ours` less those of `theirs`, over all questions."""
    name, unit = f"All questions, {_versus(ours, theirs)}", "points"
    return _response(measured, "accuracy", name, unit, 2, lambda m: 100 * m.answers(ours, theirs), "questions", **more)


def ape(measured: Sequence[Measured]) -> Response:
    """Measure the logarithm of the loss APE: its effects are factors, its means geometric."""
    with np.errstate(divide="ignore"):  # a run that equals its baseline has none, and is left out
        return _response(measured, "loss_ape", "Loss APE, geometric mean", "%", 3, lambda m: np.log([m.ape]), log=True)


def overshoot(measured: Sequence[Measured]) -> Response:
    """Measure the share of tensors beyond their predicted amax, in points."""
    name = "Share of tensors beyond their predicted amax"
    return _response(measured, "overshoot", name, "points", 2, lambda m: [100 * m.overshoot])


def clipped(measured: Sequence[Measured]) -> Response:
    """Measure the share of elements beyond the target, in a million."""
    name = "Elements beyond the target"
    return _response(measured, "clipped", name, "in a million", 2, lambda m: [1e6 * m.clipped])


def _versus(ours: str, theirs: str) -> str:
    return f"{_NAMES.get(ours, ours)} less {_NAMES.get(theirs, theirs)}"


def _response(
    measured: Sequence[Measured],
    measure: str,
    name: str,
    unit: str,
    digits: int,
    take: Callable[[Measured], Sequence[float]],
    sampled: str = "",
    key: Callable[[Measured], Key] = lambda m: m.key,
    log: bool = False,
) -> Response:
    values = [((key(m), m.seed), np.asarray(take(m), float)) for m in measured]
    finite = {place: row for place, row in values if np.isfinite(row).all()}
    without = len({place for place, _ in values}) - len(finite)
    return Response(name, unit, digits, finite, sampled, log, without, measure)
