"""Compare a run with its own repetition, the same in everything but `repeat`: the noise under every difference.

What the two differ by is the machine's: sums in another order, on a GPU or on another number of cores. A smaller
difference between two recipes says nothing. On one CPU there is none.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from qat.analysis.compare import eval_command, loss_change, training_loss
from qat.analysis.results import EvalResult
from qat.runs.folder import Run
from qat.runs.identity import run_id


def reruns(run: Run) -> list[Run]:
    """Return the finished repetitions of a run in the folders beside it, numbered from 1 without a gap."""
    if run.typed_config().repeat:
        return []
    return list(itertools.takewhile(lambda repeat: repeat.finished, (_numbered(run, k) for k in itertools.count(1))))


def original(repeat: Run) -> Run:
    """Return the run that `repeat` is a repetition of, whether its folder exists or not."""
    return _numbered(repeat, 0)


def _numbered(run: Run, repeat: int) -> Run:
    return Run(run.path.parent / run_id(dataclasses.replace(run.typed_config(), repeat=repeat)))


def rerun_noise(run: Run, repeat: Run, benchmark: str) -> dict:
    """Compare a finished run with its repetition, JSON-able.

    ape: of the training losses, percent; largest: |difference| over the steps, nats a token. Where both were scored
    (quantized runs: in W8A8): heldout, a row for each text as `loss_change`; flipped, questions whose chosen answer
    changed, of n; else empty and None. identical: whether every loss is equal, bit for bit. Errors: UserError when
    they were trained on other text, or scored differently.
    """
    loss, cfg = training_loss(repeat, run), repeat.typed_config()
    mode = "w8a8" if cfg.quantized else "bf16"
    result = {"run": run.id, "repeat": cfg.repeat, "mode": mode, "steps": loss["steps"], "ape": loss["ape"]}
    result |= {"largest": loss["largest"], "identical": loss["largest"] == 0}
    first, again = (EvalResult(side, benchmark, mode, eval_command(side, benchmark)) for side in (run, repeat))
    if not (first.exists and again.exists):
        return result | {"heldout": [], "flipped": None, "n": None}
    changes = again.less(first)
    flips = np.concatenate([*(again.answers[task].flips(first.answers[task]) for task in first.answers), []])
    return result | {
        "heldout": [{"text": text} | loss_change([changes], text) for text in changes.losses],
        "flipped": int(np.count_nonzero(flips)),
        "n": len(flips),
        "identical": result["identical"] and not any(map(np.any, changes.losses.values())),
    }
