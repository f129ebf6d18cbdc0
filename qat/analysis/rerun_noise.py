"""The floor under every difference: a run beside its own repetition, the same in everything but `repeat`.

What the two differ by is the machine's: sums in another order, on a GPU or on another number of cores. A smaller
difference between two recipes says nothing. On one CPU there is none.
"""

from __future__ import annotations

import dataclasses
import itertools

from qat.analysis.compare import eval_command, training_loss
from qat.analysis.results import EvalResult
from qat.runs.folder import Run
from qat.runs.identity import run_id


def reruns(run: Run) -> list[Run]:
    """The finished repetitions of a run in the folders beside it, numbered from 1 without a gap."""
    if run.typed_config().repeat:
        return []
    return list(itertools.takewhile(lambda repeat: repeat.finished, (_numbered(run, k) for k in itertools.count(1))))


def original(repeat: Run) -> Run:
    """The run that `repeat` is a repetition of, whether its folder exists or not."""
    return _numbered(repeat, 0)


def _numbered(run: Run, repeat: int) -> Run:
    return Run(run.path.parent / run_id(dataclasses.replace(run.typed_config(), repeat=repeat)))


def rerun_noise(run: Run, repeat: Run, benchmark: str) -> dict:
    """What a finished run and its repetition differ by, JSON-able.

    ape: of the training losses, percent; largest: |difference| over the steps, nats a token. Where both were scored
    (quantized runs: in W8A8): heldout, a row for each text as `EvalResult.heldout` gives it; flipped and n, answers
    that changed and questions; else empty and None. identical: whether every loss is equal, bit for bit. Errors:
    UserError when they were trained on other text, or scored differently.
    """
    loss, cfg = training_loss(repeat, run), repeat.typed_config()
    mode = "w8a8" if cfg.quantized else "bf16"
    first, again = (EvalResult(each, benchmark, mode, eval_command(each, benchmark)) for each in (run, repeat))
    scored = first.exists and again.exists
    result = {"run": run.id, "repeat": cfg.repeat, "mode": mode, "steps": loss["steps"]}
    result |= {"ape": loss["ape"], "largest": loss["largest"], "heldout": [], "flipped": None, "n": None}
    identical = loss["largest"] == 0
    if scored:
        again.refuse_unlike(first)
        texts = first.record["heldout"]
        answers = [again.answers(task, first) for task in first.record["tasks"]]
        result["heldout"] = [{"text": text} | again.heldout(text, first) for text in texts]
        result |= {"flipped": sum(each.lost + each.gained for each in answers), "n": sum(map(sum, answers))}
        identical &= all(
            record["document_losses"] == again.record["heldout"][text]["document_losses"]
            for text, record in texts.items()
        )
    return result | {"identical": identical}
