"""How far a quantized run is from its matched BF16 baseline, and which of the differences are more than noise.

Both runs saw the same batches and answered the same questions, so everything here is paired: loss step by step,
held-out loss document by document, answers question by question. Unlike things are refused, not compared. The baseline
in W8A8 without QAT (`qat.quant.calibrate`) stands beside the run: what QAT recovers is what PTQ loses and the run does
not.

Points are absolute percentage points (run - baseline); a relative drop is (baseline - run) / baseline, the paper's
measure, in percent. The paper's thresholds: a relative drop below 1 % a task and a loss APE below 0.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from qat.analysis.results import EvalResult
from qat.analysis.stats import LEVEL, Answers, above_chance, bootstrap, detectable, mcnemar, tang, tango
from qat.config import Config
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, identity, pretrained_of, ptq_mode, run_id

APE_THRESHOLD = 0.5  # percent, paper section 1
DROP_THRESHOLD = 1.0  # percent, paper section 1
TASKS = {"mmlu": "MMLU", "hellaswag": "HellaSwag", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
MODES = {"w8a8": "W8A8", "ptq": "W8A8 by PTQ", "bf16": "BF16 weights"}

_UNDER_TEST = ("quant", "scaling", "bf16_warmup_steps")  # the parts of a run's identity that its baseline lacks
_STATUS = (("state", "not started"), ("step", 0), ("steps", "?"))


def loss_ape(quantized: Sequence[float], baseline: Sequence[float]) -> float:
    """Absolute percentage error of a loss curve: mean over steps of |q - b| / b * 100 (paper section 1).

    Both sequences hold one training loss a step, BF16 warmup included. Raises `UserError` when they are empty,
    differ in length, or hold a value that is not finite (the baseline: not positive).
    """
    if len(quantized) != len(baseline):
        counts = f"the run has {len(quantized)}, the baseline {len(baseline)}"
        raise UserError(f"loss APE needs equally many steps; {counts}")
    if len(quantized) == 0:
        raise UserError("loss APE needs at least one step; both runs have none")
    total = 0.0
    for step, (q, b) in enumerate(zip(quantized, baseline, strict=True), start=1):
        if not (math.isfinite(q) and math.isfinite(b) and b > 0):
            raise UserError(f"loss APE is undefined: entry {step} is {q} in the run and {b} in the baseline")
        total += abs(q - b) / b
    return 100 * total / len(quantized)


def differences(left: Mapping, right: Mapping) -> dict[str, tuple]:
    """Dotted keys whose values differ between two configs: {key: (left's value, right's value)}, in left's order."""
    a, b = _flat(left), _flat(right)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def mismatches(run: Config, baseline: Config) -> dict[str, tuple]:
    """Those differences that keep one run from being the matched baseline of the other, as in `differences`.

    Looked at is what can change a number of training (`qat.runs.identity.identity`), less quantization itself.
    """
    parts = [identity(config) for config in (run, baseline)]
    found = differences(*({k: v for k, v in part.items() if k not in _UNDER_TEST} for part in parts))
    # An identity leaves defaults out: what is missing there is what the configuration has.
    sides = (run, baseline)
    found.pop("data.order", None)  # no setting: streamed text has it, packaged text has not
    return {
        key: tuple(attrgetter(key)(side) if value is None else value for side, value in zip(sides, values, strict=True))
        for key, values in found.items()
    }


def pretrained_run(run: Run) -> Run | None:
    """The checkpoint that a run started from, in the folder beside it; None where it was not scored."""
    origin = Run(run.path.parent / run_id(pretrained_of(run.typed_config())))
    return origin if origin.evaluations() else None


def against_baseline(run: Run, benchmark: str) -> dict:
    """Compare a run with its baseline and the pretrained checkpoint in the folders beside it, as `compare`."""
    baseline, origin = run.path.parent / run_id(baseline_of(run.typed_config())), pretrained_run(run)
    return compare(run.path, baseline, benchmark, origin and origin.path)


def comparison_of(run: Run, benchmark: str) -> dict | None:
    """As `against_baseline`; None for a run that cannot be compared, as it is or yet."""
    try:
        return against_baseline(run, benchmark)
    except UserError:
        return None


def compare(run: Path, baseline: Path, benchmark: str, pretrained: Path | None = None) -> dict:
    """Compare a finished, evaluated quantized run with its BF16 baseline; the result is JSON-able.

    `pretrained` is a run folder that holds the evaluation of the checkpoint both started from. Where the baseline was
    not scored under PTQ its rows are left out. Scores, points and intervals are in percent, losses and KL in nats a
    token; `scored_on` is what computed the held-out losses, more than one entry where not all were scored on the same,
    without what is not known. Raises `UserError` of one line for unfinished runs, missing or stale evaluations, and
    whatever differs between the two besides quantization.
    """
    run, baseline = Run(run), Run(baseline)
    _refuse_unmatched(run, baseline)
    loss = training_loss(run, baseline)
    own, reference, origin = sides(run, baseline, benchmark, pretrained)
    for scored in (*own.values(), *([origin] if origin else [])):
        scored.refuse_unlike(reference)
    fingerprint = baseline.fingerprint
    for scored in own.values():
        scored.refuse_other_baseline(baseline.id, fingerprint)
    ptq = own.get("ptq")
    texts, tasks = reference.record["heldout"], reference.record["tasks"]
    answers = {(task, mode): scored.answers(task, reference) for task in tasks for mode, scored in own.items()}
    return {
        "run": run.id,
        "baseline": baseline.id,
        "pretrained": origin.run.id if origin else None,
        "ptq": ptq.mode if ptq else None,
        "benchmark": benchmark,
        "scored_on": sorted({each.record["scored_on"] for each in (reference, *own.values())} - {None}),
        "loss": loss,
        "heldout": [_heldout(text, mode, own[mode], reference, origin) for text in texts for mode in own],
        "qat": [_qat_gain(text, own, reference) for text in texts] if ptq else [],
        "tasks": [
            _task(task, mode, own[mode], reference, origin, counted) for (task, mode), counted in answers.items()
        ],
        "pooled": [
            {"mode": mode, "pretrained": _percent_right(origin)} | _pooled([answers[task, mode] for task in tasks])
            for mode in (own if len(tasks) > 1 else ())
        ],
    }


def sides(
    run: Run, baseline: Run, benchmark: str, pretrained: Path | None
) -> tuple[dict[str, EvalResult], EvalResult, EvalResult | None]:
    """What is compared: the run by mode (and the baseline by PTQ, where that was scored), the baseline in BF16, and the
    pretrained checkpoint, where it is named."""
    command = eval_command(run, benchmark)
    own = {mode: EvalResult(run, benchmark, mode, command) for mode in MODES if mode != "ptq"}
    ptq = EvalResult(baseline, benchmark, ptq_mode(run.typed_config().quant), command)
    if ptq.exists:
        own = {mode: ptq if mode == "ptq" else own[mode] for mode in MODES}
    origin = EvalResult(Run(pretrained), benchmark, "bf16", command) if pretrained is not None else None
    return own, EvalResult(baseline, benchmark, "bf16", command), origin


def training_loss(run: Run, baseline: Run) -> dict:
    """How far the training losses of two finished runs are apart: loss APE in percent, of all steps and of the last
    tenth; the largest |difference| and the final losses, in nats a token. Errors: UserError when they have different
    steps or were trained on other text."""
    ours, theirs = run.metrics(), baseline.metrics()
    steps = [[row["step"] for row in rows] for rows in (ours, theirs)]
    if steps[0] != steps[1]:
        raise UserError(f"{run.id} and {baseline.id} record different steps in metrics.jsonl; train one of them again")
    for q, b in zip(ours, theirs, strict=True):
        if q["batch"] != b["batch"]:
            raise UserError(
                f"{run.id} and {baseline.id} were trained on other text from step {q['step']} on (the data set changed "
                f"in between); delete the older folder and train it again"
            )
    # A step whose loss was not finite, in either, has none to compare.
    pairs = [(q["loss"], b["loss"]) for q, b in zip(ours, theirs, strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    q, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ape = loss_ape(q, b)
    tail = max(1, round(len(q) / 10))
    largest = max(abs(mine - other) for mine, other in pairs)
    last = {"ape_last_tenth": loss_ape(q[-tail:], b[-tail:]), "final": q[-1], "final_baseline": b[-1]}
    skipped = sum(q["skipped"] or b["skipped"] for q, b in zip(ours, theirs, strict=True))
    return {"steps": len(q), "skipped": skipped, "ape": ape, "largest": largest, **last, "passes": ape < APE_THRESHOLD}


def train_command(run: Run) -> str:
    """The command that starts or resumes `run`: the last that worked on it but for evaluation, which may have trained
    it again, else its experiment's."""
    commands = [each.get("command", "") for each in run.environments()]
    training = [command for command in commands if command and "eval.py" not in command.partition(" ")[0]]
    return f"python {training[-1] if training else 'scripts/train.py experiment=' + str(run.config()['experiment'])}"


def eval_command(run: Run, benchmark: str) -> str:
    """The command that evaluates `run`."""
    return f"python scripts/eval.py run={run.path} benchmark={benchmark}"


def _flat(tree: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _refuse_unmatched(run: Run, baseline: Run) -> None:
    configs = run.typed_config(), baseline.typed_config()
    for candidate, config, quantized in zip((run, baseline), configs, (True, False), strict=True):
        if config.quantized != quantized:
            role = "a quantized run" if quantized else "a BF16 baseline"
            raise UserError(f"{candidate.id} is not {role}: quant.format={config.quant.format}")
    for key, (ours, theirs) in mismatches(*configs).items():
        raise UserError(f"{baseline.id} is no matched baseline of {run.id}: {key}={theirs} there, {key}={ours} here")
    for candidate in (run, baseline):
        status = candidate.status()
        if status.get("state") != "finished":
            state, step, steps = (status.get(key, unknown) for key, unknown in _STATUS)
            reason = f" ({status['reason']})" if status.get("reason") else ""
            progress = f"{candidate.id} is {state} at step {step} of {steps}{reason}"
            raise UserError(f"{progress}; finish it: {train_command(candidate)}")


def _heldout(text: str, mode: str, scored: EvalResult, reference: EvalResult, origin: EvalResult | None) -> dict:
    ours, theirs = scored.record["heldout"][text], reference.record["heldout"][text]
    start = origin.record["heldout"][text]["loss"] if origin else None
    row = {"text": text, "mode": mode, "pretrained": start, "loss": ours["loss"], "baseline": theirs["loss"]}
    return row | {"kl": ours["kl"]} | scored.heldout(text, reference)


def qat_parts(own: Mapping[str, EvalResult]) -> dict[str, tuple[EvalResult, EvalResult]]:
    """What QAT less PTQ is made of: its weights, both under PTQ's scales, and its scales, both on its weights. Nothing
    where the run was not scored under PTQ's scales."""
    ptq, qat, mixed = own["ptq"], own["w8a8"], own["w8a8"].qat_weights_ptq_scales
    if mixed is None:
        return {}
    mixed.refuse_unlike(ptq)
    return {"weights": (mixed, ptq), "scales": (qat, mixed)}


def _qat_gain(text: str, own: Mapping[str, EvalResult], reference: EvalResult) -> dict:
    """What W8A8 costs with QAT and without, over the BF16 baseline, how much of it QAT recovers, and by what."""
    costs = {mode: own[mode].heldout(text, reference)["difference"] for mode in ("ptq", "w8a8")}
    paired = own["ptq"].heldout(text, own["w8a8"])
    parts = {part: ours.heldout(text, other) for part, (ours, other) in qat_parts(own).items()}
    return {"text": text, **costs, "recovered": paired["difference"], "ci": paired["ci"]} | {
        part: {key: row[key] for key in ("difference", "ci")} for part, row in parts.items()
    }


def _task(
    task: str, mode: str, scored: EvalResult, reference: EvalResult, origin: EvalResult | None, answers: Answers
) -> dict:
    ours, theirs = scored.record["tasks"][task], reference.record["tasks"][task]
    start, chance = 100 * origin.record["tasks"][task]["score"] if origin else None, theirs["chance"]
    row = {"task": task, "mode": mode, "pretrained": start, "metric": ours["metric"]}
    row |= _scores([answers], 100 * theirs["score"], 100 * ours["score"])
    return row | {"chance": 100 * chance, "near_chance": near_chance(row["baseline"], row["n"], 100 * chance)}


def near_chance(score: float, n: int, chance: float) -> bool:
    """Whether a score of n questions, in percent as chance, is not told from guessing. Below chance a drop says as
    little as at chance, so the test is one-sided."""
    return above_chance(round(score * n / 100), n, chance / 100) > LEVEL


def _percent_right(scored: EvalResult | None) -> float | None:
    """Percent right of the questions of all tasks."""
    tasks = scored.record["tasks"].values() if scored else ()
    return 100 * sum(t["score"] * t["n"] for t in tasks) / sum(t["n"] for t in tasks) if tasks else None


def _pooled(tasks: Sequence[Answers]) -> dict:
    """All questions of all tasks as one test; resampled within each task."""
    kept, lost, gained, _ = (sum(counts) for counts in zip(*tasks, strict=True))
    n = sum(map(sum, tasks))
    return _scores(tasks, 100 * (kept + lost) / n, 100 * (kept + gained) / n)


def _scores(tasks: Sequence[Answers], baseline: float, score: float) -> dict:
    """What is said of paired answers: percent and points, with intervals, p-value and what could have been detected."""
    kept, lost, gained, wrong = (sum(counts) for counts in zip(*tasks, strict=True))
    n = kept + lost + gained + wrong
    drop = 100 * (baseline - score) / baseline if baseline else None
    ratio = tang(kept, lost, gained)
    return {
        "baseline": baseline,
        "score": score,
        "points": score - baseline,
        "ci": [100 * limit for limit in tango(lost, gained, n)],
        "ci_bootstrap": [100 * limit for limit in bootstrap(tasks)],
        "relative_drop": drop,
        "relative_drop_ci": ratio and [100 * (1 - limit) for limit in reversed(ratio)],
        "lost": lost,
        "gained": gained,
        "n": n,
        "p_value": mcnemar(lost, gained),
        "detectable": 100 * detectable(lost + gained, n),
        "passes": None if drop is None else drop < DROP_THRESHOLD,
    }
