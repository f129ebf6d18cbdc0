"""How far a quantized run is from its matched BF16 baseline, and which of the differences are more than noise.

Both runs saw the same batches and answered the same questions, so everything here is paired: loss step by step,
held-out loss sequence by sequence, answers question by question. Unlike things are refused, not compared.

Points are absolute percentage points (run - baseline); a relative drop is (baseline - run) / baseline, the paper's
measure, in percent. The paper's marks: a relative drop below 1 % a task and a loss APE below 0.5 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path

from qat.config import Config, UserError
from qat.paired import half_width, holm, mcnemar, tango
from qat.runs import Run, identity

APE_MARK = 0.5  # percent, paper section 1
DROP_MARK = 1.0  # percent, paper section 1
TASKS = {"mmlu": "MMLU", "hellaswag": "HellaSwag", "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge"}
MODES = {"w8a8": "W8A8", "bf16": "BF16 weights"}

_UNDER_TEST = ("quant", "scaling", "bf16_warmup_steps")  # the parts of a run's identity that its baseline lacks
_STATUS = (("state", "not started"), ("step", 0), ("steps", "?"))
_TASK_IDENTITY = ("task_hash", "version", "metric", "shots", "n", "chance")


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

    Looked at is what can change a number of training (`qat.runs.identity`), less quantization itself.
    """
    parts = [identity(config) for config in (run, baseline)]
    found = differences(*({k: v for k, v in part.items() if k not in _UNDER_TEST} for part in parts))
    # An identity leaves defaults out: what is missing there is what the configuration has.
    sides = (run, baseline)
    return {
        key: tuple(attrgetter(key)(side) if value is None else value for side, value in zip(sides, values, strict=True))
        for key, values in found.items()
    }


def compare(run: Path, baseline: Path, benchmark: str, untouched: Path | None = None) -> dict:
    """Compare a finished, evaluated quantized run with its BF16 baseline; the result is JSON-able.

    `untouched` is a run folder that holds the evaluation of the checkpoint both started from. Scores, points and
    intervals are in percent, losses and KL in nats a token. Raises `UserError` of one line for unfinished runs,
    missing evaluations, and whatever differs between the two besides quantization.
    """
    run, baseline = Run(run), Run(baseline)
    untouched = Run(untouched) if untouched is not None else None
    _refuse_unmatched(run, baseline)
    loss = _loss(run, baseline)
    reference = evaluation(baseline, benchmark, "bf16")
    own = {mode: evaluation(run, benchmark, mode) for mode in MODES}
    for record in own.values():
        _refuse_unlike(run, record, baseline, reference)
    origin = evaluation(untouched, benchmark, "bf16") if untouched else None
    if origin:
        _refuse_unlike(untouched, origin, baseline, reference)
    result = {"run": run.id, "baseline": baseline.id, "untouched": untouched.id if untouched else None}
    result |= {"benchmark": benchmark, "loss": loss, "heldout": [], "tasks": []}
    for text in reference["heldout"]:
        result["heldout"] += [_heldout(text, mode, own[mode], reference) for mode in own]
    for task, record in reference["tasks"].items():
        start = 100 * origin["tasks"][task]["score"] if origin else None
        for mode in own:
            lost, gained = _flips(run, baseline, benchmark, mode, task)
            row = _task(own[mode]["tasks"][task], record, lost, gained)
            result["tasks"].append({"task": task, "mode": mode, "untouched": start} | row)
    return result


def train_command(run: Run) -> str:
    """The command that starts or resumes `run`: the one in its `environment.json`, else its experiment's."""
    recorded = run.environment().get("command")
    return f"python {recorded or 'scripts/train.py experiment=' + str(run.config()['experiment'])}"


def eval_command(run: Run, benchmark: str) -> str:
    """The command that evaluates `run`."""
    return f"python scripts/eval.py run={run.path} benchmark={benchmark}"


def evaluation(run: Run, benchmark: str, mode: str) -> dict:
    """The record of `run` for a benchmark and mode; raises `UserError` naming the command that makes a missing one."""
    try:
        return run.evaluations()[benchmark][mode]
    except KeyError:
        missing = f"{run.id} has no {benchmark} evaluation in mode {mode}"
        raise UserError(f"{missing}; make it: {eval_command(run, benchmark)}") from None


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


def _refuse_unlike(run: Run, own: dict, baseline: Run, reference: dict) -> None:
    facts = [("lm-eval version", own["lm_eval"], reference["lm_eval"])]
    facts.append(("tasks", sorted(own["tasks"]), sorted(reference["tasks"])))
    facts.append(("held-out texts", sorted(own["heldout"]), sorted(reference["heldout"])))
    for what, ours, theirs in facts:
        _refuse_unequal(run, baseline, what, ours, theirs)
    for task, record in own["tasks"].items():
        for key in _TASK_IDENTITY:
            _refuse_unequal(run, baseline, f"{task} {key}", record[key], reference["tasks"][task][key])
    for text, record in own["heldout"].items():
        other = reference["heldout"][text]
        _refuse_unequal(run, baseline, f"held-out {text} text_hash", record["text_hash"], other["text_hash"])
        counts = len(record["sequence_losses"]), len(other["sequence_losses"])
        _refuse_unequal(run, baseline, f"held-out {text} sequences", *counts)


def _refuse_unequal(run: Run, baseline: Run, what: str, ours, theirs) -> None:
    if ours != theirs:
        raise UserError(f"{what} differs: {ours} in {run.id}, {theirs} in {baseline.id}; evaluate both in the same way")


def _loss(run: Run, baseline: Run) -> dict:
    ours, theirs = run.metrics(), baseline.metrics()
    steps = [[row["step"] for row in rows] for rows in (ours, theirs)]
    if steps[0] != steps[1]:
        raise UserError(f"{run.id} and {baseline.id} record different steps in metrics.jsonl; train one of them again")
    # A step whose loss was not finite, in either, has none to compare.
    pairs = [(q["loss"], b["loss"]) for q, b in zip(ours, theirs, strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    q, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    ape = loss_ape(q, b)
    tail = max(1, round(len(q) / 10))
    last = {"ape_last_tenth": loss_ape(q[-tail:], b[-tail:]), "final": q[-1], "final_baseline": b[-1]}
    skipped = sum(bool(q.get("skipped") or b.get("skipped")) for q, b in zip(ours, theirs, strict=True))
    return {"steps": len(q), "skipped": skipped, "ape": ape, **last, "passes": ape < APE_MARK}


def _heldout(text: str, mode: str, own: dict, reference: dict) -> dict:
    ours, theirs = own["heldout"][text], reference["heldout"][text]
    change = ours["loss"] - theirs["loss"]
    paired = [a - b for a, b in zip(ours["sequence_losses"], theirs["sequence_losses"], strict=True)]
    half = half_width(paired)
    row = {"text": text, "mode": mode, "loss": ours["loss"], "baseline": theirs["loss"], "difference": change}
    row |= {"kl": ours["kl"], "sequences": len(paired)}
    return row | {"ci": None if half is None else [change - half, change + half]}


def _flips(run: Run, baseline: Run, benchmark: str, mode: str, task: str) -> tuple[int, int]:
    """Questions that only the baseline, and only the run, answered right."""
    ours, theirs = run.samples(benchmark, mode, task), baseline.samples(benchmark, "bf16", task)
    for owner, samples, where in ((run, ours, mode), (baseline, theirs, "bf16")):
        record = evaluation(owner, benchmark, where)["tasks"][task]
        right = sum(bool(s["correct"]) for s in samples)
        if len(samples) != record["n"] or abs(right - record["score"] * record["n"]) > 0.5:
            stale = f"{right} of {len(samples)} right, eval.json says {record['score']:.4f} of {record['n']}"
            raise UserError(
                f"{owner.id} samples of {task} in {where}: {stale}; redo it: {eval_command(owner, benchmark)}"
            )
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True), start=1):
        for key in ("doc_hash", "prompt_hash"):
            _refuse_unequal(run, baseline, f"{task} question {number} {key}", a[key], b[key])
    lost = sum(bool(b["correct"]) and not a["correct"] for a, b in zip(ours, theirs, strict=True))
    gained = sum(bool(a["correct"]) and not b["correct"] for a, b in zip(ours, theirs, strict=True))
    return lost, gained


def _task(record: dict, reference: dict, lost: int, gained: int) -> dict:
    n, chance = record["n"], reference["chance"]
    score, base = 100 * record["score"], 100 * reference["score"]
    drop = 100 * (base - score) / base if base else None
    row = {"metric": record["metric"], "baseline": base, "score": score, "points": score - base}
    row |= {"relative_drop": drop, "lost": lost, "gained": gained, "n": n, "p_value": mcnemar(lost, gained)}
    # Below chance a drop says as little as at chance, so this is one-sided.
    near = reference["score"] - chance <= 2 * reference["stderr"]
    row |= {"ci": [100 * limit for limit in tango(lost, gained, n)], "chance": 100 * chance, "near_chance": near}
    return row | {"passes": None if drop is None else drop < DROP_MARK}


# ---------------------------------------------------------------------------------------------------- words

TASK_HEADER = ["Task", "Mode", "BF16 %", "Run %", "Points [95 % CI]", "Rel. drop %", "Lost/gained of n", "p", "Remark"]


def task_cells(row: dict) -> list[str]:
    """One row of a comparison's `tasks` as text, a cell for each entry of `TASK_HEADER`."""
    drop = "-" if row["relative_drop"] is None else signed(row["relative_drop"], plus="")
    flips = f"-{row['lost']}/+{row['gained']} of {row['n']}"
    cells = [TASKS.get(row["task"], row["task"]), MODES[row["mode"]], f"{row['baseline']:.2f}", f"{row['score']:.2f}"]
    return [*cells, f"{signed(row['points'])} {interval(row['ci'])}", drop, flips, p_text(row["p_value"]), remark(row)]


def resolved(row: dict) -> bool:
    """Whether the whole interval of `points` lies on one side of the 1 % mark."""
    low, high = row["ci"]
    return not low <= -row["baseline"] * DROP_MARK / 100 <= high


def remark(row: dict) -> str:
    """Pass mark and caveats of a task row: "unresolved" where the interval spans the mark."""
    words = [] if row["passes"] is None else ["pass" if row["passes"] else f"over {DROP_MARK:g} %"]
    words += [] if resolved(row) else ["unresolved"]
    return ", ".join(words + (["near chance"] if row["near_chance"] else []))


def signed(value: float, digits: int = 2, plus: str = "+") -> str:
    """A number with its sign, and without a negative zero."""
    return f"{round(value, digits) + 0.0:{plus}.{digits}f}"


def interval(ci: Sequence[float] | None, digits: int = 2) -> str:
    """An interval as "[low, high]"."""
    return "[-]" if ci is None else f"[{signed(ci[0], digits)}, {signed(ci[1], digits)}]"


def p_text(p: float) -> str:
    """A p-value in three digits at most."""
    return "< 0.001" if p < 0.001 else f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def loss_text(comparison: dict) -> str:
    """One sentence on the training loss."""
    loss = comparison["loss"]
    mark = f"{'below' if loss['passes'] else 'over'} the {APE_MARK} % mark"
    ends = f"final loss {loss['final']:.4f}, BF16 {loss['final_baseline']:.4f}"
    skipped = f" {loss['skipped']} steps were skipped for want of a finite gradient." if loss.get("skipped") else ""
    return (
        f"Loss APE {loss['ape']:.3f} % ({mark}), {loss['ape_last_tenth']:.3f} % over the last tenth; {ends}.{skipped}"
    )


def heldout_text(row: dict) -> str:
    """One sentence on one held-out text."""
    kl = "" if row["kl"] is None else f", KL {row['kl']:.4f} nats"
    change = f"{signed(row['difference'], 4)} {interval(row['ci'], 4)}"
    return f"Held-out {row['text']}, {MODES[row['mode']]}: {row['loss']:.4f} nats a token, {change} from BF16{kl}."


def heldout_verdict(comparisons: Iterable[Mapping]) -> str:
    """One sentence on the held-out losses of several comparisons in W8A8; empty where there are none."""
    rows = [row for comparison in comparisons for row in comparison["heldout"] if row["mode"] == "w8a8"]
    if not rows:
        return ""
    low, high = (signed(end(row["difference"] for row in rows), 4) for end in (min, max))
    clear = sum(row["ci"] is not None and row["ci"][0] * row["ci"][1] > 0 for row in rows)
    span = f"{low} to {high}" if len(rows) > 1 else low
    return (
        f"Held-out loss in {MODES['w8a8']} differs from BF16 by {span} nats a token; "
        f"{clear} of {len(rows)} intervals (95 %) exclude zero."
    )


def verdict(comparisons: Mapping[str, dict]) -> str:
    """What the benchmarks of {label: comparison} show, after Holm's correction over all their tests."""
    rows = [
        (f"{label + ': ' if label else ''}{TASKS.get(r['task'], r['task'])} in {MODES[r['mode']]}", r)
        for label, comparison in comparisons.items()
        for r in comparison["tasks"]
    ]
    if not rows:
        return "No benchmark task was compared."
    rows.sort(key=lambda pair: pair[1]["p_value"])
    real = holm([row["p_value"] for _, row in rows])
    name, worst = min(rows[real:] or rows, key=lambda pair: pair[1]["ci"][0])
    reach = f"a drop of up to {max(0.0, -worst['ci'][0]):.1f} points ({name})"
    reach = f"with this many questions {reach} cannot be excluded"
    if not real:
        smallest = f"smallest p {_relation(rows[0][1]['p_value'])}, {rows[0][0]}"
        return f"None of {len(rows)} paired tests differs from BF16 beyond noise ({smallest}), but {reach}."
    found = [f"{name} ({signed(r['points'])} points, p {_relation(r['p_value'])})" for name, r in rows[:real]]
    rest = f"; elsewhere {reach}" if real < len(rows) else ""
    return f"{real} of {len(rows)} paired tests differ from BF16 beyond noise: {', '.join(found)}{rest}."


def _relation(p: float) -> str:
    return p_text(p) if p < 0.001 else f"= {p_text(p)}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def table(comparison: dict) -> str:
    """A comparison as Markdown for the terminal: the tasks, the losses, and one sentence of verdict."""
    parts = [f"{comparison['run']} against {comparison['baseline']} on benchmark {comparison['benchmark']}", ""]
    parts += [markdown(TASK_HEADER, [task_cells(row) for row in comparison["tasks"]]), ""]
    parts += [loss_text(comparison), *(heldout_text(row) for row in comparison["heldout"])]
    return "\n".join([*parts, verdict({"": comparison})]) + "\n"
