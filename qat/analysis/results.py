"""The scores of one model as its run folder keeps them, paired with another's. Unlike things are refused."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from qat.analysis.stats import Answers, detectable_mean, half_width
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import is_ptq

_TASK_IDENTITY = ("task_hash", "version", "metric", "shots", "n", "chance")


@dataclass(frozen=True)
class EvalResult:
    """The evaluation of `run` on a benchmark in a mode: bf16, w8a8, or PTQ's (`qat.runs.identity.ptq_mode`).

    command: what makes it anew. Whatever is missing or stale raises a `UserError` of one line that names it.
    """

    run: Run
    benchmark: str
    mode: str
    command: str

    @property
    def name(self) -> str:
        return f"{self.run.id} ({self.mode})" if is_ptq(self.mode) else self.run.id

    @property
    def exists(self) -> bool:
        return self.mode in self.run.evaluations().get(self.benchmark, {})

    @cached_property
    def record(self) -> dict:
        """Its entry of `eval.json`."""
        if not self.exists:
            missing = f"{self.run.id} has no {self.benchmark} evaluation in mode {self.mode}"
            raise UserError(f"{missing}; make it: {self.command}")
        record = self.run.evaluations()[self.benchmark][self.mode]
        self._refuse_stale(record, 0, self.run.fingerprint, "has been trained again since, to other losses")
        return record

    def refuse_other_baseline(self, name: str, fingerprint: str) -> None:
        """Raise `UserError` where it was compared, as KL divergence, with other weights than those of the baseline
        `name`, which has this fingerprint."""
        self._refuse_stale(self.record, 1, fingerprint, f"beside a baseline of other losses than {name}'s")

    def _refuse_stale(self, record: dict, place: int, fingerprint: str, but: str) -> None:
        weights = record["weights"][place : place + 1]
        if weights and weights != [fingerprint]:
            raise UserError(f"{self.name} was scored, but {but}; score it again: {self.command}")

    @cached_property
    def qat_weights_ptq_scales(self) -> PtqScalesResult | None:
        """The same weights under PTQ's scales; None where they were not scored so."""
        found = PtqScalesResult(self.run, self.benchmark, self.mode, self.command)
        return found if self.record["qat_weights_ptq_scales"] else None

    def refuse_unlike(self, other: EvalResult) -> None:
        """Raise `UserError` unless both answered the same questions and read the same text, in the same way."""
        ours, theirs = self.record, other.record
        facts = [("lm-eval version", ours["lm_eval"], theirs["lm_eval"])]
        facts.append(("tasks", sorted(ours["tasks"]), sorted(theirs["tasks"])))
        facts.append(("held-out texts", sorted(ours["heldout"]), sorted(theirs["heldout"])))
        for what, a, b in facts:
            self._refuse_unequal(other, what, a, b)
        for task, record in ours["tasks"].items():
            for key in _TASK_IDENTITY:
                self._refuse_unequal(other, f"{task} {key}", record[key], theirs["tasks"][task][key])
        self._refuse_unlike_texts(other)

    def _refuse_unlike_texts(self, other: EvalResult) -> None:
        for text, record in self.record["heldout"].items():
            reference = other.record["heldout"][text]
            self._refuse_unequal(other, f"held-out {text} text_hash", record["text_hash"], reference["text_hash"])
            counts = len(record["document_losses"]), len(reference["document_losses"])
            self._refuse_unequal(other, f"held-out {text} documents", *counts)

    def _refuse_unequal(self, other: EvalResult, what: str, a, b) -> None:
        if a != b:
            fix = f"delete the eval.json of the one that is wrong, and make it again: {self.command}"
            raise UserError(f"{what} differs: {a} in {self.name}, {b} in {other.name}; {fix}")

    def heldout(self, text: str, other: EvalResult) -> dict:
        """Loss less the other's on a held-out text, in nats a token, paired over its documents: the difference, its
        95 % interval (None of fewer than two documents) and the smallest difference that could have been detected."""
        change = self.record["heldout"][text]["loss"] - other.record["heldout"][text]["loss"]
        paired = self.document_changes(text, other)
        half, row = half_width(paired), {"difference": change, "documents": len(paired)}
        if half is None:
            return row | {"ci": None, "detectable": None}
        return row | {"ci": [change - half, change + half], "detectable": detectable_mean(half)}

    def document_changes(self, text: str, other: EvalResult) -> list[float]:
        """Each document's loss less the other's, in nats a token."""
        ours, theirs = (each.record["heldout"][text]["document_losses"] for each in (self, other))
        return [a - b for a, b in zip(ours, theirs, strict=True)]

    def answers(self, task: str, other: EvalResult) -> Answers:
        """The questions of a task, counted by who is right; lost are those that only the other has right."""
        pairs = self._right(task, other)
        return Answers(*(pairs.count(each) for each in ((True, True), (True, False), (False, True), (False, False))))

    def answer_changes(self, task: str, other: EvalResult) -> list[int]:
        """Each question of a task: 1 where only this one is right, -1 where only the other is, else 0."""
        return [ours - theirs for theirs, ours in self._right(task, other)]

    def _right(self, task: str, other: EvalResult) -> list[tuple[bool, bool]]:
        """Whether the other and this one are right, question by question."""
        ours, theirs = self._samples(task), other._samples(task)
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
            for key in ("doc_hash", "prompt_hash"):
                self._refuse_unequal(other, f"{task} question {number} {key}", a[key], b[key])
        return [(bool(b["correct"]), bool(a["correct"])) for a, b in zip(ours, theirs, strict=True)]

    def _samples(self, task: str) -> list[dict]:
        samples, record = self.run.samples(self.benchmark, self.mode, task), self.record["tasks"][task]
        right = sum(bool(sample["correct"]) for sample in samples)
        if len(samples) != record["n"] or abs(right - record["score"] * record["n"]) > 0.5:
            stale = f"{right} of {len(samples)} right, eval.json says {record['score']:.4f} of {record['n']}"
            raise UserError(f"{self.run.id} samples of {task} in {self.mode}: {stale}; redo it: {self.command}")
        return samples


class PtqScalesResult(EvalResult):
    """The held-out losses, and nothing else, of a quantized run's weights under PTQ's scales."""

    @cached_property
    def record(self) -> dict:
        return EvalResult(self.run, self.benchmark, self.mode, self.command).record["qat_weights_ptq_scales"]

    def refuse_unlike(self, other: EvalResult) -> None:
        """Raise `UserError` unless the other, a PTQ, was calibrated on as much text, and both read the same."""
        ours = self.record["sequences"]
        theirs = other.record["request"]["calibration_sequences"]
        self._refuse_unequal(other, "calibration sequences", ours, theirs)
        self._refuse_unlike_texts(other)
