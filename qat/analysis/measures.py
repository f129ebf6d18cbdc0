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
| choice mass | sum over c of exp lp_c: whether the model answers in this form at all; no score | share |
| choice KL | KL(q of the baseline || q): how much differs, not whether for the worse | nats |
| flips | share of questions whose chosen answer differs, right or wrong (arXiv 2407.09141) | share |

Skill is what the model knows beyond a guess: ln C - cross-entropy, and 1 - 1/C - Brier.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import log_softmax


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
    "accuracy": Measure("Accuracy", "points", False, 1.0),
    "cross_entropy": Measure("Choice cross-entropy", "nats", True, 1.0, of_skill=True),
    "brier": Measure("Brier", "", True, 1.0, of_skill=True),
    "bits_per_byte": Measure("Bits per byte", "bits", True, 0.5),
}


@dataclass(frozen=True)
class Answers:
    """Hold a model's answers to the questions of one task.

    logprobs: FP64 [questions, choices], -inf where a question has fewer choices; target, chosen: int64 [questions];
    correct: FP64 [questions], 0 or 1; sizes: FP64 [questions], bytes of the right answer, None where they are unknown.
    """

    logprobs: np.ndarray
    target: np.ndarray
    chosen: np.ndarray
    correct: np.ndarray
    sizes: np.ndarray | None

    @classmethod
    def of(cls, samples: Sequence[Mapping]) -> Answers:
        """Read the rows of a run folder's `samples/` (`qat.eval.benchmarks.Scores`)."""
        logprobs = np.full((len(samples), max(len(sample["logprobs"]) for sample in samples)), -np.inf)
        for row, sample in zip(logprobs, samples, strict=True):
            row[: len(sample["logprobs"])] = sample["logprobs"]
        target, chosen, correct = (np.array([s[key] for s in samples]) for key in ("target", "choice", "correct"))
        known = all("bytes" in sample for sample in samples)
        sizes = np.array([sample["bytes"][sample["target"]] for sample in samples], float) if known else None
        return cls(logprobs, target, chosen, correct.astype(float), sizes)

    @cached_property
    def measures(self) -> dict[str, np.ndarray]:
        """Return the `MEASURES` that these answers have, FP64 [questions] each."""
        measures = {"accuracy": self.correct}
        if self.logprobs.shape[1] > 1:
            measures |= {"cross_entropy": -self._at_target(self.log_shares), "brier": self._brier()}
        if self.sizes is not None:
            measures["bits_per_byte"] = -self._at_target(self.logprobs) / (math.log(2) * self.sizes)
        return measures

    @cached_property
    def log_shares(self) -> np.ndarray:
        """Return ln q, FP64 [questions, choices]."""
        return log_softmax(self.logprobs, axis=1)

    @property
    def choices(self) -> np.ndarray:
        """Return how many choices each question has, int64 [questions]."""
        return np.isfinite(self.logprobs).sum(1)

    def skill(self, measure: str) -> np.ndarray:
        """Return what the answers are better than guessing by, FP64 [questions]: of cross_entropy or brier."""
        guess = {"cross_entropy": np.log(self.choices), "brier": 1 - 1 / self.choices}[measure]
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
