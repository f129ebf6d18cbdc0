"""Compare quantized runs with their matched BF16 baselines: one run, or several seeds.

Both runs saw the same batches and answered the same questions, so everything here is paired: loss step by step,
held-out loss document by document, answers question by question. Unlike things are refused, not compared. The baseline
in W8A8 without QAT (`qat.quant.calibrate`) stands beside the run: what QAT recovers is what PTQ loses and the run does
not. Of several seeds a difference has two sources of noise, the seed and the choice of questions or documents, and
intervals cover both (`qat.analysis.stats.paired_mean`).

Points are absolute percentage points (run - baseline); a relative drop is (baseline - run) / baseline, the paper's
measure, in percent. The paper's thresholds: a relative drop below 1 % a task and a loss APE below 0.5 %.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from qat.analysis.answers import measure_rows, pooled_answers, task_row
from qat.analysis.decisions import APE_THRESHOLD, decided
from qat.analysis.results import EvalResult, Match, Outcomes, mean_of
from qat.analysis.stats import noise, paired_mean, student
from qat.config import Config
from qat.errors import UserError
from qat.runs.folder import Run
from qat.runs.identity import baseline_of, identity, pretrained_mode, pretrained_of, ptq_mode, run_id

TASKS = {
    "mmlu": "MMLU",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-Easy",
    "arc_challenge": "ARC-Challenge",
    "mmlu_continuation": "MMLU (text)",
    "lambada": "LAMBADA",
}
MODES = {"w8a8": "W8A8", "ptq": "W8A8 by PTQ", "bf16": "BF16 weights", "control": "4-bit weights (control)"}
_OF_BASELINE = ("ptq", "control")  # other ways to run the baseline's own weights; scored or not

_UNDER_TEST = ("quant", "scaling", "bf16_warmup_steps")  # the parts of a run's identity that its baseline lacks


def task_name(task: str) -> str:
    """Return how a page names a task."""
    return TASKS.get(task, task)


def loss_ape(quantized: Sequence[float], baseline: Sequence[float]) -> float:
    """Return the absolute percentage error of a loss curve: mean over steps of |q - b| / b * 100 (paper section 1).

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
    """Return the dotted keys whose values differ: {key: (left's value, right's value)}, in left's order."""
    a, b = flat(left), flat(right)
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def flat(tree: Mapping, prefix: str = "") -> dict:
    """Return the values of a tree by dotted keys."""
    values = {}
    for key, value in tree.items():
        values |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return values


def mismatches(run: Config, baseline: Config) -> dict[str, tuple]:
    """Return those differences that keep one run from being the matched baseline of the other, as `differences`.

    Looked at is what can change a number of training (`qat.runs.identity.identity`), less quantization itself.
    """
    sides = run, baseline
    ours, theirs = ({k: v for k, v in identity(side).items() if k not in _UNDER_TEST} for side in sides)
    unequal = differences(ours, theirs)
    unequal.pop("data.order", None)  # no setting: streamed text has it, packaged text has not
    # An identity leaves defaults out: what is missing there is what the configuration has.
    return {
        key: tuple(setting(side, key) if value is None else value for side, value in zip(sides, values, strict=True))
        for key, values in unequal.items()
    }


def setting(cfg: Config, key: str):
    """Return what a configuration has under a dotted key; None where it has none."""
    return flat(dataclasses.asdict(cfg)).get(key)


def pretrained_run(run: Run) -> Run | None:
    """Return the checkpoint that a run started from, in the folder beside it; None where it was not scored."""
    origin = Run(run.path.parent / run_id(pretrained_of(run.typed_config())))
    return origin if origin.evaluations() else None


def pretrained_record(run: Run, benchmark: str) -> dict:
    """Return the scores, on a BF16 run's own texts, of the checkpoint that it started from; empty without any."""
    scored, origin = run.evaluations().get(benchmark, {}).get("bf16", {}), pretrained_run(run)
    mode = origin and _mode_of_pretrained(origin, benchmark, scored)
    return origin.evaluations().get(benchmark, {}).get(mode, {}) if origin else {}


def _mode_of_pretrained(pretrained: Run, benchmark: str, beside: Mapping) -> str:
    """Return the mode of its scores on the texts that `beside` is a record of; in records bf16, whatever the texts."""
    mode = pretrained_mode(beside.get("request", {}))
    return mode if mode in pretrained.evaluations().get(benchmark, {}) else "bf16"


def against_baseline(run: Run, benchmark: str) -> dict:
    """Compare a finished, evaluated quantized run with its BF16 baseline and the pretrained checkpoint in the folders
    beside it: `match`, then `aggregate`."""
    baseline = Run(run.path.parent / run_id(baseline_of(run.typed_config())))
    return aggregate([match(run, baseline, benchmark, pretrained_run(run))])


def comparison_of(run: Run, benchmark: str) -> dict | None:
    """Compare as `against_baseline`; None for a run that cannot be compared, as it is or yet."""
    try:
        return against_baseline(run, benchmark)
    except UserError:
        return None


def match(run: Run, baseline: Run, benchmark: str, pretrained: Run | None) -> Match:
    """Read a run and what it is compared with; `pretrained` has the scores of the checkpoint that both started from.

    Errors: UserError of one line for unfinished runs, missing or stale evaluations, and whatever differs between the
    two besides quantization.
    """
    _refuse_unmatched(run, baseline)
    loss, command = training_loss(run, baseline), eval_command(run, benchmark)
    own = {mode: EvalResult(run, benchmark, mode, command) for mode in MODES if mode not in _OF_BASELINE}
    names = {"ptq": ptq_mode(run.typed_config().quant), "control": "control"}
    beside = {mode: EvalResult(baseline, benchmark, names[mode], command) for mode in _OF_BASELINE}
    own |= {mode: result for mode, result in beside.items() if result.exists}
    reference = EvalResult(baseline, benchmark, "bf16", command)
    changes = {mode: result.less(reference) for mode, result in own.items()}
    origin = None
    if pretrained:
        mode = _mode_of_pretrained(pretrained, benchmark, reference.record)
        origin = EvalResult(pretrained, benchmark, mode, command)
        origin.refuse_unlike(reference)
        origin.refuse_other_arithmetic(reference)
    fingerprint = baseline.fingerprint
    for result in own.values():
        result.refuse_other_arithmetic(reference)
        result.refuse_other_baseline(baseline.id, fingerprint)
    return Match(loss, own, reference, origin, changes, _qat_changes(own))


def _qat_changes(own: Mapping[str, EvalResult]) -> dict[str, Outcomes]:
    if "ptq" not in own:
        return {}
    ptq, qat, mixed = own["ptq"], own["w8a8"], own["w8a8"].qat_weights_ptq_scales
    recovered = {"recovered": ptq.outcomes - qat.outcomes}
    return recovered | ({"weights": mixed.less(ptq), "scales": qat.outcomes - mixed.outcomes} if mixed else {})


def aggregate(matches: Sequence[Match]) -> dict:
    """Compare one run, or several that differ in nothing but their seed, with their baselines; JSON-able.

    Scores, points and intervals are in percent, losses and KL in nats a token, of several seeds means; `lost` and
    `gained` are sums over seeds. Of one run `ci` is a 95 % interval over questions (Tango's) or documents, p_value
    McNemar's; of several they are Student's, over seeds and questions (or documents). What not all of them have is left
    out. can_move: whether a task's answers name more than one choice; if not, its score cannot show a difference.
    scored_on: what computed the held-out losses, more than one entry where not all were scored on the same,
    without what is not known. Errors: UserError where one was scored in another way.
    """
    first, *others = matches
    for other in others:
        other.reference.refuse_unlike(first.reference)
    texts, tasks = list(first.reference.record["heldout"]), list(first.reference.record["tasks"])
    modes = [mode for mode in MODES if all(mode in m.own for m in matches)]
    sources = [result.record["scored_on"] for m in matches for result in (m.reference, *m.own.values())]
    return {
        "run": ", ".join(m.own["w8a8"].run.id for m in matches),
        "baseline": ", ".join(m.reference.run.id for m in matches),
        "ptq": ", ".join(m.own["ptq"].mode for m in matches) if "ptq" in modes else None,
        "benchmark": first.reference.benchmark,
        "seeds": len(matches),
        "scored_on": sorted(set(sources) - {None}),
        "loss": _loss(matches) if others else first.loss,
        "heldout": [heldout_row(matches, text, mode) for text in texts for mode in modes],
        "qat": [_qat_gain(matches, text) for text in texts] if "ptq" in modes else [],
        "tasks": [task_row(matches, task, mode) for task in tasks for mode in modes],
        "pooled": [{"mode": mode} | pooled_answers(matches, tasks, mode) for mode in modes if len(tasks) > 1],
        "measures": [row for mode in modes for row in measure_rows(matches, tasks, mode)],
    }


def training_loss(run: Run, baseline: Run) -> dict:
    """Compare the training losses of two finished runs.

    Loss APE is in percent, of all steps and of the last tenth; the largest |difference| and the final losses are in
    nats a token. Errors: UserError when they have different steps or were trained on other text.
    """
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
    """Return the command that starts or resumes `run`.

    It is the last that worked on it but for evaluation, which may have trained it again, else its experiment's.
    """
    commands = [environment.get("command", "") for environment in run.environments()]
    training = [command for command in commands if command and "eval.py" not in command.partition(" ")[0]]
    return f"python {training[-1] if training else 'scripts/train.py experiment=' + str(run.config()['experiment'])}"


def eval_command(run: Run, benchmark: str) -> str:
    """Return the command that evaluates `run`."""
    return f"python scripts/eval.py run={run.path} benchmark={benchmark}"


def _refuse_unmatched(run: Run, baseline: Run) -> None:
    configs = run.typed_config(), baseline.typed_config()
    for candidate, config, quantized in zip((run, baseline), configs, (True, False), strict=True):
        if config.quantized != quantized:
            role = "a quantized run" if quantized else "a BF16 baseline"
            raise UserError(f"{candidate.id} is not {role}: quant.format={config.quant.format}")
    for key, (ours, theirs) in mismatches(*configs).items():
        raise UserError(f"{baseline.id} is no matched baseline of {run.id}: {key}={theirs} there, {key}={ours} here")
    for candidate in (run, baseline):
        if not candidate.finished:
            status = {"state": "not started", "step": 0, "steps": "?"} | candidate.status()
            reason = f" ({status['reason']})" if status.get("reason") else ""
            progress = "{state} at step {step} of {steps}".format_map(status) + reason
            raise UserError(f"{candidate.id} is {progress}; finish it: {train_command(candidate)}")


def loss_change(changes: Sequence[Outcomes], text: str) -> dict:
    """Return the mean difference of the losses on a text, one entry a seed, with its noise, in nats a token.

    ci: the 95 % interval; p_value: Student's; detectable: the smallest difference that is found in four of five cases.
    All are None of a single document, which has no noise to be had.
    """
    rows = np.array([change.losses[text] for change in changes])
    return {"difference": float(rows.mean())} | noise(paired_mean(rows))


def _loss(matches: Sequence[Match]) -> dict:
    mean = student(np.array([m.loss["ape"] for m in matches]))
    low, high = mean.interval()
    return {"ape": mean.value, "ci": [max(0.0, low), high], "passes": mean.value < APE_THRESHOLD}


def heldout_row(matches: Sequence[Match], text: str, mode: str) -> dict:
    """Return the losses on a text in a mode and how they differ from the references', in nats a token."""
    own = [m.own[mode].record["heldout"][text] for m in matches]
    reference = [m.reference.record["heldout"][text]["loss"] for m in matches]
    origin = [m.origin and m.origin.record["heldout"][text]["loss"] for m in matches]
    row = {"text": text, "mode": mode, "pretrained": mean_of(origin), "baseline": mean_of(reference)}
    row |= {"loss": mean_of([record["loss"] for record in own]), "kl": mean_of([record["kl"] for record in own])}
    row |= {"documents": len(own[0]["document_losses"])} | loss_change([m.changes[mode] for m in matches], text)
    return row | decided(row, row["baseline"] * APE_THRESHOLD / 100)


def _qat_gain(matches: Sequence[Match], text: str) -> dict:
    """Return what W8A8 costs with QAT and without, over the BF16 baseline, how much of it QAT recovers, and by what."""
    costs = {mode: loss_change([m.changes[mode] for m in matches], text) for mode in ("ptq", "w8a8")}
    parts = [part for part in ("recovered", "weights", "scales") if all(part in m.qat for m in matches)]
    rows = {part: loss_change([m.qat[part] for m in matches], text) for part in parts}
    recovered = rows.pop("recovered")
    row = {"text": text} | {mode: cost["difference"] for mode, cost in costs.items()}
    return row | {"recovered": recovered["difference"], "ci": recovered["ci"]} | rows
