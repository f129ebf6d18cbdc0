"""Read the scores of one model from its run folder, and subtract another's. Unlike things are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qat.analysis.measures import Answers
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import is_ptq

_TASK_IDENTITY = ("task_hash", "version", "metric", "shots", "n", "chance")


@dataclass(frozen=True)
class Outcomes:
    """Hold the losses and the measures of the answers of one model, or of two as a difference.

    losses: by held-out text, FP64 [documents], nats a token; answers: by task and measure
    (`qat.analysis.measures.MEASURES`), FP64 [questions].
    """

    losses: Mapping[str, np.ndarray]
    answers: Mapping[str, Mapping[str, np.ndarray]]

    def __sub__(self, other: Outcomes) -> Outcomes:
        """Subtract unit by unit what both have: of PTQ's scales on QAT's weights there are no answers."""
        losses = {text: self.losses[text] - other.losses[text] for text in self.losses if text in other.losses}
        answers = {
            task: {name: rows[name] - other.answers[task][name] for name in rows if name in other.answers[task]}
            for task, rows in self.answers.items()
            if task in other.answers
        }
        return Outcomes(losses, answers)

    def pooled(self, tasks: Sequence[str] | None = None, measure: str = "accuracy") -> np.ndarray:
        """Return a measure of the answers to several tasks (None: all) as one row."""
        return np.concatenate([self.answers[task][measure] for task in tasks or self.answers])


@dataclass(frozen=True)
class EvalResult:
    """Read the evaluation of `run` on a benchmark in a mode: bf16, w8a8, or PTQ's (`qat.runs.identity.ptq_mode`).

    command: what makes it anew. Whatever is missing or stale raises a `UserError` of one line that names it.
    """

    run: Run
    benchmark: str
    mode: str
    command: str

    @property
    def name(self) -> str:
        return f"{self.run.id} ({self.mode})" if is_ptq(self.mode) or self.mode == "control" else self.run.id

    @property
    def exists(self) -> bool:
        return self.mode in self.run.evaluations().get(self.benchmark, {})

    @cached_property
    def record(self) -> dict:
        """Return its entry of `eval.json`."""
        if not self.exists:
            missing = f"{self.run.id} has no {self.benchmark} evaluation in mode {self.mode}"
            raise UserError(f"{missing}; make it: {self.command}")
        record = self.run.evaluations()[self.benchmark][self.mode]
        self._refuse_stale(record, 0, self.run.fingerprint, "has been trained again since, to other losses")
        return record

    @cached_property
    def outcomes(self) -> Outcomes:
        """Return its losses by document and answers by question."""
        losses = {text: np.array(row["document_losses"]) for text, row in self.record["heldout"].items()}
        return Outcomes(losses, {task: answers.measures for task, answers in self.answers.items()})

    @cached_property
    def answers(self) -> dict[str, Answers]:
        """Return its answers by task."""
        return {task: Answers.of(self._samples(task)) for task in self.record.get("tasks", {})}

    @cached_property
    def qat_weights_ptq_scales(self) -> PtqScalesResult | None:
        """Return the same weights under PTQ's scales; None where they were not scored so."""
        result = PtqScalesResult(self.run, self.benchmark, self.mode, self.command)
        return result if self.record["qat_weights_ptq_scales"] else None

    def less(self, other: EvalResult) -> Outcomes:
        """Subtract the other's outcomes, document by document and question by question.

        Errors: UserError unless both answered the same questions and read the same text, in the same way.
        """
        self.refuse_unlike(other)
        return self.outcomes - other.outcomes

    def refuse_unlike(self, other: EvalResult) -> None:
        """Raise `UserError` unless both answered the same questions and read the same text, in the same way. Where one
        was asked no questions, the text counts."""
        ours, theirs = self.record, other.record
        if not (_asked(ours) and _asked(theirs)):
            return self._refuse_unlike_texts(other)
        self._refuse_unequal(other, "lm-eval version", ours["lm_eval"], theirs["lm_eval"])
        self._refuse_unequal(other, "tasks", sorted(ours["tasks"]), sorted(theirs["tasks"]))
        for task, row in ours["tasks"].items():
            for key in _TASK_IDENTITY:
                self._refuse_unequal(other, f"{task} {key}", row[key], theirs["tasks"][task][key])
        self._refuse_unlike_texts(other)
        for task in ours["tasks"]:
            pairs = zip(self._samples(task), other._samples(task), strict=True)
            for number, (a, b) in enumerate(pairs, start=1):
                for key in ("doc_hash", "prompt_hash"):
                    self._refuse_unequal(other, f"{task} question {number} {key}", a[key], b[key])

    def refuse_other_arithmetic(self, other: EvalResult) -> None:
        """Raise `UserError` where the other was scored in another arithmetic; older scores do not name theirs."""
        ours, theirs = self.record.get("arithmetic"), other.record.get("arithmetic")
        if None not in (ours, theirs) or "training" in (ours, theirs):
            self._refuse_unequal(other, "the arithmetic of scoring", ours, theirs)

    def refuse_other_baseline(self, name: str, fingerprint: str) -> None:
        """Raise `UserError` where its KL divergence is from other weights than the baseline's.

        name, fingerprint: of the baseline.
        """
        self._refuse_stale(self.record, 1, fingerprint, f"beside a baseline of other losses than {name}'s")

    def _refuse_stale(self, record: dict, place: int, fingerprint: str, but: str) -> None:
        if record["weights"][place : place + 1] != [fingerprint]:
            raise UserError(f"{self.name} was scored, but {but}; score it again: {self.command}")

    def _refuse_unlike_texts(self, other: EvalResult) -> None:
        names = (sorted(result.record["heldout"]) for result in (self, other))
        self._refuse_unequal(other, "held-out texts", *names)
        for text, ours in self.record["heldout"].items():
            theirs = other.record["heldout"][text]
            self._refuse_unequal(other, f"held-out {text} text_hash", ours["text_hash"], theirs["text_hash"])
            counts = len(ours["document_losses"]), len(theirs["document_losses"])
            self._refuse_unequal(other, f"held-out {text} documents", *counts)

    def _refuse_unequal(self, other: EvalResult, what: str, a, b) -> None:
        if a != b:
            fix = f"delete the eval.json of the one that is wrong, and make it again: {self.command}"
            raise UserError(f"{what} differs: {a} in {self.name}, {b} in {other.name}; {fix}")

    def _samples(self, task: str) -> list[dict]:
        samples, record = self.run.samples(self.benchmark, self.mode, task), self.record["tasks"][task]
        right = sum(bool(sample["correct"]) for sample in samples)
        if len(samples) != record["n"] or abs(right - record["score"] * record["n"]) > 0.5:
            stale = f"{right} of {len(samples)} right, eval.json says {record['score']:.4f} of {record['n']}"
            raise UserError(f"{self.run.id} samples of {task} in {self.mode}: {stale}; redo it: {self.command}")
        return samples


def _asked(record: dict) -> bool:
    """Return whether questions were to be answered; rows of the PTQ ladder may go without."""
    return record.get("request", {}).get("benchmark", {}).get("tasks") != {}


class PtqScalesResult(EvalResult):
    """Read the held-out losses, and nothing else, of a quantized run's weights under PTQ's scales."""

    @cached_property
    def record(self) -> dict:
        return EvalResult(self.run, self.benchmark, self.mode, self.command).record["qat_weights_ptq_scales"]

    def refuse_unlike(self, other: EvalResult) -> None:
        """Raise `UserError` unless the other, a PTQ, was calibrated on as much text, and both read the same."""
        ours, theirs = self.record["sequences"], other.record["request"]["calibration_sequences"]
        self._refuse_unequal(other, "calibration sequences", ours, theirs)
        self._refuse_unlike_texts(other)


@dataclass(frozen=True)
class Match:
    """Hold a quantized run and what it is compared with: finished, scored, and alike in all but quantization.

    loss: as `training_loss`; own: the run by mode, and its baseline by PTQ and with 4-bit weights where these were
    scored; reference: the baseline in BF16; origin: the pretrained checkpoint, where it is named; changes: `own` less
    the reference; qat: what QAT recovers of PTQ's loss and, where the run was scored under PTQ's scales, the parts of
    QAT less PTQ: its weights, both under PTQ's scales, and its scales, both on its weights.
    """

    loss: dict
    own: dict[str, EvalResult]
    reference: EvalResult
    origin: EvalResult | None
    changes: dict[str, Outcomes]
    qat: dict[str, Outcomes]


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean; None where one of the values is missing."""
    return None if None in values else float(np.mean(values))
