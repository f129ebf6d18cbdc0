"""Measure the answers to questions by the log-probabilities of their choices.

Accuracy moves only when the best choice changes, so a small benchmark cannot see a small change of a model. The
log-probabilities that the scores come from always move. Of one question, lp_c is the log-probability of choice c given
the prompt, t the right choice, q the softmax of lp over the C choices, and bytes the UTF-8 bytes of the right answer:

| measure | definition | unit |
|---|---|---|
| accuracy | 1 where the chosen answer is right | share |
| choice cross-entropy | -ln q_t; a guess has ln C | nats |
| Brier | sum over c of (q_c - [c = t])^2; a guess has 1 - 1/C | none |
| bits per byte | -lp_t / (ln 2 * bytes), of answers that are text (OLMES, arXiv 2406.08446) | bits |
| answer contrast | bits per byte of the right answer less the mean of the wrong ones; a guess has 0 | bits |
| choice mass | sum over c of exp lp_c: whether the model answers in this form at all; no score | share |
| choice KL | KL(q of the baseline || q): how much differs, not whether for the worse | nats |
| flips | share of questions whose chosen answer differs, right or wrong (arXiv 2407.09141) | share |

Skill is what the model knows beyond a guess: ln C - cross-entropy, 1 - 1/C - Brier, and the contrast with the other
sign. Of a task with choices, bits per byte are no score: W8A8 makes right and wrong answers likelier alike (by 0.012
and 0.020 bits on MMLU's answers as text, SmolLM2-135M), which is a shift of format. Their contrast is free of it. Where
there is but one continuation, as of LAMBADA, bits per byte are a loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import log_softmax

from qat.analysis.decisions import APE_THRESHOLD, DROP_THRESHOLD


@dataclass(frozen=True)
class Measure:
    """Describe a measure: how it is written, whether more of it is worse, and its margin.

    margin: percent of the baseline's value, or of the baseline's skill (`of_skill`), below which a change is too small
    to count: 1 % of what is known, as the paper allows a score to drop; 0.5 % of a loss, as it allows a loss curve.
    """

    name: str
    unit: str
    more_is_worse: bool
    margin: float
    of_skill: bool = False


MEASURES = {
    "accuracy": Measure("Accuracy", "points", False, DROP_THRESHOLD),
    "cross_entropy": Measure("Choice cross-entropy", "nats", True, DROP_THRESHOLD, of_skill=True),
    "brier": Measure("Brier", "", True, DROP_THRESHOLD, of_skill=True),
    "contrast": Measure("Answer contrast", "bits per byte", True, DROP_THRESHOLD, of_skill=True),
    "bits_per_byte": Measure("Continuations", "bits per byte", True, APE_THRESHOLD),
}


@dataclass(frozen=True)
class Answers:
    """Hold a model's answers to the questions of one task.

    logprobs: FP64 [questions, choices], -inf where a question has fewer choices; target, chosen: int64 [questions];
    correct: FP64 [questions], 0 or 1; sizes: FP64 [questions, choices], bytes, None where they are unknown.
    """

    logprobs: np.ndarray
    target: np.ndarray
    chosen: np.ndarray
    correct: np.ndarray
    sizes: np.ndarray | None

    @classmethod
    def of(cls, samples: Sequence[Mapping]) -> Answers:
        """Read the rows of a run folder's `samples/` (`qat.eval.benchmarks.Scores`)."""
        target, chosen, correct = (np.array([s[key] for s in samples]) for key in ("target", "choice", "correct"))
        logprobs = _padded([sample["logprobs"] for sample in samples], -np.inf)
        known = all("bytes" in sample for sample in samples)
        sizes = _padded([sample["bytes"] for sample in samples], 1.0) if known else None
        return cls(logprobs, target, chosen, correct.astype(float), sizes)

    @cached_property
    def measures(self) -> dict[str, np.ndarray]:
        """Return the `MEASURES` that these answers have, FP64 [questions] each."""
        measures = {"accuracy": self.correct}
        if self.logprobs.shape[1] > 1:
            measures |= {"cross_entropy": -self._at_target(self.log_shares), "brier": self._brier()}
        if self.sizes is not None:
            bits = self.bits_per_byte
            measures |= {"bits_per_byte": bits[0]} if bits[1] is None else {"contrast": bits[0] - bits[1]}
        return measures

    @cached_property
    def bits_per_byte(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return bits per byte of the right answers and, where there are choices, the mean of the wrong ones.

        FP64 [questions] each; only where the sizes are known.
        """
        bits = -self.logprobs / (math.log(2) * self.sizes)
        right, some = self._at_target(bits), np.isfinite(bits)
        if bits.shape[1] == 1:
            return right, None
        return right, (np.where(some, bits, 0.0).sum(1) - right) / (some.sum(1) - 1)

    @cached_property
    def log_shares(self) -> np.ndarray:
        """Return ln q, FP64 [questions, choices]."""
        return log_softmax(self.logprobs, axis=1)

    @property
    def choices(self) -> np.ndarray:
        """Return how many choices each question has, int64 [questions]."""
        return np.isfinite(self.logprobs).sum(1)

    def skill(self, measure: str) -> np.ndarray:
        """Return what the answers are better than guessing by, FP64 [questions]: of a measure that is of_skill."""
        guess = {"cross_entropy": np.log(self.choices), "brier": 1 - 1 / self.choices, "contrast": 0.0}[measure]
        return guess - self.measures[measure]

    @property
    def mass(self) -> np.ndarray:
        """Return the choice mass, FP64 [questions]."""
        return np.exp(self.logprobs).sum(1)

    @property
    def constant(self) -> bool:
        """Return whether one and the same choice is the answer to all questions, of which there are several."""
        return len(self.chosen) > 1 and len(set(self.chosen.tolist())) == 1 and self.logprobs.shape[1] > 1

    def can_move(self, baseline: Answers) -> bool:
        """Return whether accuracy could show a difference: not where all answers are, and were, one and the same."""
        return not self.constant or bool(self.flips(baseline).any())

    def flips(self, baseline: Answers) -> np.ndarray:
        """Return 1 where the chosen answer is not the baseline's, FP64 [questions]."""
        if self.logprobs.shape[1] == 1:  # right or wrong is all there is to choose
            return (self.correct != baseline.correct).astype(float)
        return (self.chosen != baseline.chosen).astype(float)

    def kl(self, baseline: Answers) -> np.ndarray:
        """Return the choice KL from the baseline, FP64 [questions]."""
        shares = np.exp(baseline.log_shares)
        with np.errstate(invalid="ignore"):
            terms = shares * (baseline.log_shares - self.log_shares)
        return np.where(shares > 0, terms, 0.0).sum(1)

    def _at_target(self, values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, self.target[:, None], axis=1)[:, 0]

    def _brier(self) -> np.ndarray:
        shares = np.exp(self.log_shares)
        shares[np.arange(len(shares)), self.target] -= 1
        return (shares**2).sum(1)


def _padded(rows: Sequence[Sequence[float]], rest: float) -> np.ndarray:
    """Return rows of unlike lengths as FP64 [rows, longest]."""
    padded = np.full((len(rows), max(map(len, rows))), rest)
    for line, row in zip(padded, rows, strict=True):
        line[: len(row)] = row
    return padded
