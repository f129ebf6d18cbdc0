"""Put comparisons into cells and sentences, for the report and the terminal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from qat.analysis.compare import MODES, task_name
from qat.analysis.decisions import APE_THRESHOLD, DROP_THRESHOLD
from qat.analysis.stats import LEVEL, holm
from qat.report.verdicts import comparison_rows

_TASK_HEADER = ["Task", "Mode", "Pretrained %", "BF16 %", "Score %", "Points [95 % CI]", "Rel. drop % [95 % CI]"]
_TASK_HEADER += ["Lost/gained of n", "p", "Detectable, points", "Remark"]
_HELDOUT_HEADER = ["Held-out text", "Mode", "Pretrained, nats", "BF16, nats", "Loss, nats", "Difference [95 % CI]"]
_HELDOUT_HEADER += ["KL, nats", "Documents"]
_DECISION_HEADER = ["Scored as", "Measure", "Minus BF16 [95 % CI]", "Margin", "Detectable", "Decision"]
RERUN_HEADER = ["Run", "Repeat", "Steps", "Loss APE %", "Largest loss difference, nats", "Held-out difference, nats"]
RERUN_HEADER += ["Answers flipped", "In words"]


def task_table(comparison: Mapping) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of every task in every mode, and of all questions together."""
    return _TASK_HEADER, [_task_cells(row) for row in (*comparison["tasks"], *comparison["pooled"])]


def _task_cells(row: dict) -> list[str]:
    points, drop = change(row["points"], row["ci"], 2), "-"
    if row["relative_drop"] is not None:
        drop = signed(row["relative_drop"], plus="")
    if row.get("relative_drop_ci"):
        drop += f" {interval(row['relative_drop_ci'])}"
    if not can_move(row):
        points = drop = "powerless"
    flips = f"-{row['lost']}/+{row['gained']} of {row['n']}"
    name = task_name(row["task"]) if "task" in row else "All questions"
    scores = (number(row.get("pretrained")), number(row["baseline"]), number(row["score"]))
    cells = [name, MODES[row["mode"]], *scores, points, drop, flips, p_text(row["p_value"])]
    return [*cells, f"{row['detectable']:.1f}", remark(row)]


def heldout_table(comparison: Mapping) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the loss on every text never trained on, in every mode."""
    return _HELDOUT_HEADER, [
        [
            row["text"],
            MODES[row["mode"]],
            *(number(row.get(key), 4) for key in ("pretrained", "baseline", "loss")),
            change(row["difference"], row["ci"]),
            number(row["kl"], 4),
            str(row["documents"]),
        ]
        for row in comparison["heldout"]
    ]


def _decision_rows(comparison: Mapping) -> list[list[str]]:
    """Return what is decided by every measure in every mode."""
    rows = []
    for row in comparison_rows(comparison):
        for answer in row["answers"].values():
            digits = 1 if answer["unit"] == "points" else 4
            limits = (number(answer[key], digits) for key in ("margin", "detectable"))
            shown = change(answer["difference"], answer["ci"], digits)
            rows.append([MODES[row["mode"]], f"{answer['name']}, {answer['unit']}", shown, *limits, answer["answer"]])
    return rows


def rerun_cells(row: Mapping) -> list[str]:
    """Return what a run and its repetition differ by (`qat.analysis.rerun_noise.rerun_noise`), a cell for each entry of
    `RERUN_HEADER`."""
    heldout = "; ".join(f"{text['text']} {change(text['difference'], text['ci'], 6)}" for text in row["heldout"])
    flipped = "-" if row["n"] is None else f"{row['flipped']} of {row['n']}"
    words = "bit-identical: every loss equal" if row["identical"] else "not bit-identical"
    cells = [row["run"], str(row["repeat"]), str(row["steps"]), f"{row['ape']:.5f}", f"{row['largest']:.6f}"]
    return [*cells, heldout or "-", flipped, words if row["heldout"] else f"{words}; not scored"]


def can_move(row: Mapping) -> bool:
    """Return whether a task's score could have shown a difference; of questions pooled it always could."""
    return row.get("can_move", True)


def resolved(row: dict) -> bool:
    """Return whether the interval of the relative drop lies on one side of the 1 % threshold, all of it.

    Of several seeds there is none, and that of `points` stands for it.
    """
    if row.get("relative_drop_ci"):
        low, high = row["relative_drop_ci"]
        return not low <= DROP_THRESHOLD <= high
    low, high = row["ci"]
    return not low <= -row["baseline"] * DROP_THRESHOLD / 100 <= high


def remark(row: dict) -> str:
    """Pass mark and caveats of a task row: "unresolved" where the interval spans the threshold."""
    if not can_move(row):
        return f"one answer only{', near chance' if row.get('near_chance') else ''}"
    words = [] if row["passes"] is None else ["pass" if row["passes"] else f"over {DROP_THRESHOLD:g} %"]
    words += [] if resolved(row) else ["unresolved"]
    return ", ".join(words + (["near chance"] if row.get("near_chance") else []))


def escape(text: str) -> str:
    """Return text for Markdown in which nothing is an HTML tag or emphasis."""
    return re.sub(r"(<(?=[a-zA-Z/!?])|\*)", r"\\\1", text)


def number(value: float | None, digits: int = 2) -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def setting_text(value) -> str:
    """Return a setting's value as the command line takes it."""
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def heading(name: str, unit: str) -> str:
    """Return the heading of a column: what it is, and its unit where it has one."""
    return f"{name}, {unit}" if unit else name


def signed(value: float, digits: int = 2, plus: str = "+") -> str:
    """Return a number with its sign, and without a negative zero."""
    return f"{round(value, digits) + 0.0:{plus}.{digits}f}"


def interval(ci: Sequence[float] | None, digits: int = 2, plus: str = "+") -> str:
    """Return an interval as "[low, high]"."""
    return "[-]" if ci is None else f"[{signed(ci[0], digits, plus)}, {signed(ci[1], digits, plus)}]"


def change(value: float, ci: Sequence[float] | None, digits: int = 4, plus: str = "+") -> str:
    """Return a number with its interval."""
    return f"{signed(value, digits, plus)} {interval(ci, digits, plus)}"


def decided(row: Mapping, digits: int = 4) -> str:
    """Return a row's difference with its interval, and below it the decision and what it rests on, for a table."""
    limits = f"finds {number(row['detectable'], digits)}, margin {number(row['margin'], digits)}"
    return f"{change(row['difference'], row['ci'], digits)}<br>**{row['decision']}** ({limits})"


def p_text(p: float) -> str:
    """Return a p-value in three digits at most."""
    return "< 0.001" if p < 0.001 else f"{p:.2f}" if p >= 0.1 else f"{p:.3f}"


def loss_text(comparison: dict) -> str:
    """Return one sentence on the training loss."""
    loss = comparison["loss"]
    side = f"{'below' if loss['passes'] else 'over'} the {APE_THRESHOLD} % threshold"
    ends = f"final loss {loss['final']:.4f}, BF16 {loss['final_baseline']:.4f}"
    skipped = f" {loss['skipped']} steps were skipped for want of a finite gradient." if loss.get("skipped") else ""
    return (
        f"Loss APE {loss['ape']:.3f} % ({side}), {loss['ape_last_tenth']:.3f} % over the last tenth; {ends}.{skipped}"
    )


def heldout_verdict(comparisons: Iterable[Mapping]) -> str:
    """Return a sentence a text on the held-out losses of several comparisons in W8A8; empty where there are none."""
    rows = (row for comparison in comparisons for row in comparison["heldout"] if row["mode"] == "w8a8")
    return _text_by_text(rows, _cost)


def _cost(rows: list[Mapping], text: str) -> str:
    span = _span([row["difference"] for row in rows])
    return (
        f"Held-out loss in {MODES['w8a8']} differs from BF16 by {span} nats a token{text}; "
        f"{sum(map(excludes_zero, rows))} of {len(rows)} intervals (95 %, uncorrected) exclude zero."
    )


def qat_verdict(comparisons: Iterable[Mapping]) -> str:
    """Return whether QAT was needed, a sentence a text: held-out loss in W8A8 with it and without (PTQ of the
    baseline). Empty where no PTQ was scored."""
    return _text_by_text((row for comparison in comparisons for row in comparison["qat"]), _recovered)


def _recovered(rows: list[Mapping], text: str) -> str:
    if len(rows) == 1:
        return _recovered_once(rows[0], text) + _parts(rows)
    better = sum(excludes_zero(row) and row["recovered"] > 0 for row in rows)
    worse = sum(excludes_zero(row) and row["recovered"] < 0 for row in rows)
    costs, changes = (_span([row["ptq"] for row in rows]), _span([-row["recovered"] for row in rows]))
    return (
        f"Without QAT (PTQ of the BF16 baseline, max calibration) W8A8 costs {costs} nats a token{text}. "
        f"QAT, with its own scales, minus PTQ: {changes}; of {len(rows)} intervals (95 %, uncorrected) {better} lie "
        f"below zero, {worse} above.{_parts(rows)}"
    )


def _parts(rows: Sequence[Mapping]) -> str:
    """Return what QAT minus PTQ is made of, where all runs were scored under PTQ's scales, too; begins with a space."""
    if not all("weights" in row for row in rows):
        return ""
    weights, scales = (_part([row[part] for row in rows]) for part in ("weights", "scales"))
    return f" Of QAT minus PTQ, its weights (under PTQ's scales) make {weights}, its scales {scales}."


def _part(rows: Sequence[Mapping]) -> str:
    if len(rows) == 1:
        return change(rows[0]["difference"], rows[0]["ci"])
    beyond = f"{sum(map(excludes_zero, rows))} of {len(rows)} intervals exclude zero"
    return f"{_span([row['difference'] for row in rows])} ({beyond})"


def _span(values: Sequence[float]) -> str:
    low, high = (signed(end(values), 4) for end in (min, max))
    return f"{low} to {high}" if len(values) > 1 else low


def _text_by_text(rows: Iterable[Mapping], say: Callable[[list[Mapping], str], str]) -> str:
    """Return what `say` says of the rows of each held-out text, the data's own first; of several, by name."""
    texts: dict[str, list[Mapping]] = {}
    for row in rows:
        texts.setdefault(row["text"], []).append(row)
    return " ".join(say(rows, f" on {text}" if len(texts) > 1 else "") for text, rows in texts.items())


def excludes_zero(row: Mapping) -> bool:
    """Return whether the interval of a row is all above zero or all below."""
    return row["ci"] is not None and row["ci"][0] * row["ci"][1] > 0


def _recovered_once(row: Mapping, text: str) -> str:
    ptq, qat = (signed(row[key], 4) for key in ("ptq", "w8a8"))
    costs = (
        f"Without QAT (PTQ of the BF16 baseline, max calibration) W8A8 costs {ptq} nats a token of held-out text{text},"
        f" with QAT and its scales {qat}"
    )
    ends = row["ci"] and [-end for end in reversed(row["ci"])]
    costs += f"; QAT minus PTQ, {change(-row['recovered'], ends)}, is "
    if not excludes_zero(row):
        return f"{costs}not beyond noise, so this does not show that QAT was needed."
    return f"{costs}{'better' if row['recovered'] > 0 else 'worse'} beyond noise."


def verdict(comparisons: Mapping[str, dict]) -> str:
    """Return what the benchmarks of {label: comparison} show, after Holm's correction over all their tests; a
    comparison of several seeds has Student's. Runs of one baseline share its PTQ, which is tested once."""
    tests = {}
    for label, comparison in comparisons.items():
        for row in (row for row in comparison["tasks"] if row["mode"] != "control"):
            shared = row["mode"] == "ptq"
            of = (comparison["baseline"], comparison["ptq"]) if shared else (comparison["run"], row["mode"])
            name = f"{label + ': ' if label else ''}{task_name(row['task'])} in {MODES[row['mode']]}"
            tests.setdefault((*of, row["task"]), (name, row))
    if not tests:
        return "No benchmark task was compared."
    rows = sorted(tests.values(), key=lambda pair: pair[1]["p_value"])
    real = sum(p <= LEVEL for p in holm([row["p_value"] for _, row in rows]))
    name, worst = min(rows[real:] or rows, key=lambda pair: pair[1]["ci"][0])
    reach = f"a drop of up to {max(0.0, -worst['ci'][0]):.1f} points ({name}) cannot be excluded"
    seeds = {comparison["seeds"] > 1 for comparison in comparisons.values()}
    kind = "" if False not in seeds else ", of one seed exact McNemar"
    tests = f"of {len(rows)} exact McNemar tests (5 %, Holm's correction over all)"
    if True in seeds:
        tests = f"of {len(rows)} tests (Student's over seeds and questions{kind}; 5 %, Holm's correction over all)"
    if not real:
        flips = math.ceil(math.log2(2 * len(rows) / LEVEL))
        smallest = f"the smallest p is {p_text(rows[0][1]['p_value'])} ({rows[0][0]})"
        least = "" if True in seeds else f"to be found, at least {flips} answers must change, all one way, and "
        return (
            f"Accuracy decides nothing: none {tests} finds a difference from BF16; {smallest}. That is no evidence of "
            f"equality: {least}with these questions {reach}."
        )
    beyond = [(name, signed(row["points"]), p_text(row["p_value"])) for name, row in rows[:real]]
    differ = [f"{name} ({points} points, p {'= ' * (p[0] != '<')}{p})" for name, points, p in beyond]
    rest = f"; elsewhere {reach}" if real < len(rows) else ""
    return f"{real} {tests} find a difference from BF16: {', '.join(differ)}{rest}."


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def table(comparison: dict) -> str:
    """Return a comparison as Markdown for the terminal: the tasks, the losses, what is decided, and why."""
    parts = [f"{comparison['run']} against {comparison['baseline']} on benchmark {comparison['benchmark']}", ""]
    parts += [markdown(*task_table(comparison)), ""] if comparison["tasks"] else []
    parts += [markdown(*heldout_table(comparison)), ""] if comparison["heldout"] else []
    parts += [markdown(_DECISION_HEADER, _decision_rows(comparison)), ""]
    sentences = [loss_text(comparison), qat_verdict([comparison]), verdict({"": comparison})]
    return "\n".join([*parts, *filter(None, sentences)]) + "\n"
