"""Write the replay of runs (`qat.studies.replay`) as Markdown, JSON and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from qat.quant.rules import named
from qat.report.plots import ACCENT, BASE, INK, MUTED, WARM, Panel, png
from qat.report.text import markdown
from qat.runs.identity import baseline_of, run_id
from qat.studies import replay
from qat.studies.contrasts import Estimate
from qat.studies.page import VERDICTS, claims_sections, origin, write
from qat.studies.replay import LAST, LONGEST, RESPONSES, Replayed

_READING = (
    "Intervals are of 95 %. Those of n rules less the first one are of 100 - 5 / n % each, of 95 % together. "
    f"{VERDICTS}."
)
_PREDICTIONS = (
    "What each rule would have predicted from the amaxes of these runs, which their own rule has shaped. Beyond: share "
    "of tensors and steps. Headroom: the median of predicted / actual amax. /10: scales are held for 10 steps. "
    "Steps in which a window is not full yet count, too. A longer window never predicts less, so that fewer tensors "
    "exceed it is arithmetic and no finding: what it is worth is asked as damage."
)
_SIDE_BY_SIDE = (
    "Forward and backward pass of the same batch on the same weights under the scales of each rule, against those "
    "without quantization. SQNR and what is beyond the target: means over tensors."
)


def write_replay(replayed: Sequence[Replayed], tensor: str, out: Path) -> Path:
    """Write `replay.md`, `.json` and `.png` into `out`; returns the path of the first. tensor: whose amaxes to draw."""
    out.mkdir(parents=True, exist_ok=True)
    claims, shadow, registered = replay.claims(replayed), replay.differences(replayed), replay.registered()
    rules = {
        rule: {
            "beyond": vars(replay.estimate([one.beyond(rule) for one in replayed])),
            "roles": replay.by_role(replayed, rule),
            "blocks": replay.by_block(replayed, rule),
        }
        for rule in replayed[0].overshoot
    }
    advice = replay.recommendation(shadow, replay.margin(replayed))
    png(_panels(replayed[0], rules, shadow, tensor), 2, out / "replay.png")
    sections = [f"**{advice}**", *claims_sections(claims), "![Predictions and damage by rule](replay.png)"]
    roles = replayed[0].roles
    sections += ["## Predictions", _PREDICTIONS, _predictions(rules, roles)]
    sections += ["## Side by side", _SIDE_BY_SIDE, _side_by_side(shadow, roles)] if shadow else []
    content = {"claims": claims, "recommendation": advice, "rules": rules, "shadow": shadow}
    content["runs"] = [{"run": one.run.id, "baseline": run_id(baseline_of(one.cfg))} for one in replayed]
    return write("replay", _facts(replayed, registered), registered, sections, content, out, _READING)


def _facts(replayed: Sequence[Replayed], registered) -> dict[str, str]:
    cfg = replayed[0].cfg
    return {
        "Model": cfg.model.name,
        "Data": cfg.data.name,
        "Budget": f"{cfg.budget.name}, {cfg.size}, lr {cfg.optim.lr:g}",
        "Runs": f"{len(replayed)}, seeds {', '.join(str(one.cfg.seed) for one in replayed)}, under {cfg.scaling.algo}",
        "Trace": f"{sum(len(one.steps) for one in replayed)} quantized steps of {len(replayed[0].names)} tensors",
        "Registered": f"seeds {', '.join(map(str, registered.seeds))}; {registered.texts}",
    } | origin(one.run for one in replayed)


def _predictions(rules: Mapping[str, Mapping], roles: Sequence[str]) -> str:
    rows = []
    for rule, row in rules.items():
        of = row["roles"]
        shares, headroom = (" / ".join(f"{of[role][key]:.1f}" for role in roles) for key in ("beyond", "headroom"))
        largest = f"{max(of[role]['largest'] for role in roles):.2f}"
        rows.append([rule, RESPONSES["overshoot"].text(Estimate(**row["beyond"])), shares, largest, headroom])
    header = ["Rule", "Beyond, %", f"Of {' / '.join(roles)}", "Largest overshoot", "Headroom of these, octaves"]
    return markdown(header, rows)


def _side_by_side(rows: Sequence[Mapping], roles: Sequence[str]) -> str:
    text, cells = RESPONSES["batch_loss"].text, []
    for row in rows:
        change = text(Estimate(**row["change"])) if row["change"] else "–"
        by_role = [
            " / ".join(f"{factor * row[f'{key}/{role}']:.1f}" for role in roles)
            for key, factor in (("sqnr_db", 1), ("clipped", 1e6))
        ]
        gradient = [f"{row['cosine']:.5f}", f"{100 * row['norm_error']:+.2f}"]
        damage = text(Estimate(**row["damage"]))
        cells.append([row["rule"], damage, change, row["decision"] or "–", *gradient, *by_role])
    header = ["Rule", "Less no quantization, nats", f"Less {rows[0]['first']}, nats", "Difference"]
    sqnr = f"SQNR of {' / '.join(roles)}, dB"
    header += ["Gradient's cosine", "its norm, %", sqnr, "Beyond the target, in a million"]
    return markdown(header, cells)


# ------------------------------------------------------------------------------------------------- pictures


def _panels(one: Replayed, rules: Mapping, shadow: Sequence[Mapping], tensor: str) -> list[Panel]:
    beyond = {rule: row["beyond"] for rule, row in rules.items()}
    damage = {row["rule"]: row["damage"] for row in shadow}
    panels = [_by_window("Tensors beyond their prediction", "%", beyond, one)]
    panels += [_by_window("Loss less that without quantization", "nats", damage, one)] if shadow else []
    return [*panels, _amaxes(one, tensor), _blocks(rules)]


def _by_window(title: str, unit: str, estimates: Mapping[str, Mapping], one: Replayed) -> Panel:
    """Draw a rule's estimates with their intervals over its window, most_recent at 1; other rules as level lines."""
    lines: dict[str, list[tuple[int, Mapping]]] = {}
    for rule, value in estimates.items():
        scaling = named(rule, one.cfg.scaling, "rule")
        held = f"/{scaling.update_every}" if scaling.update_every > 1 else ""
        guard = f"+{scaling.guard:g}" if scaling.guard else ""
        window = {LAST: 1, "max": scaling.window}.get(scaling.algo)
        lines.setdefault(f"max{held}{guard}" if window else rule, []).append((window or 0, value))

    def draw(axes: Axes) -> None:
        colours = iter((ACCENT, WARM, INK, MUTED, BASE) * len(lines))
        for label, points in lines.items():
            colour, points = next(colours), sorted(points, key=lambda point: point[0])
            windows, values = zip(*points, strict=True)
            if not windows[0]:
                axes.axhline(values[0]["value"], color=colour, linewidth=1.1, linestyle=":", label=label)
                continue
            axes.plot(windows, [value["value"] for value in values], "o-", color=colour, markersize=5, label=label)
            for window, value in points:
                if value["low"] is not None:
                    axes.vlines(window, value["low"], value["high"], color=colour, linewidth=1.1)
        axes.set_xscale("log", base=2)
        windows = sorted({window for points in lines.values() for window, _ in points if window})
        axes.set_xticks(windows, map(str, windows))
        axes.set_xlabel("Window (1: most_recent)")
        axes.set_ylabel(unit, color=MUTED)
        axes.grid(axis="y")
        axes.legend()

    return Panel(title, draw)


def _amaxes(one: Replayed, tensor: str) -> Panel:
    """Draw a tensor's amaxes and what two rules predicted."""
    index = one.names.index(tensor)
    amax = np.where(one.amax[:, index] > 0, one.amax[:, index], np.nan)

    def draw(axes: Axes) -> None:
        for rule, colour in ((LAST, WARM), (LONGEST, ACCENT)):
            if rule in one.overshoot:
                with np.errstate(divide="ignore", invalid="ignore"):
                    axes.step(one.steps, amax / one.overshoot[rule][:, index], color=colour, linewidth=1.1, label=rule)
        axes.plot(one.steps, amax, ".", color=INK, markersize=4, label="amax")
        axes.set_yscale("log")
        axes.set_xlabel("Step")
        axes.grid(axis="y")
        axes.legend()

    return Panel(tensor.removeprefix("model."), draw)


def _blocks(rules: Mapping[str, Mapping]) -> Panel:
    """Draw the share of tensors beyond their prediction by block."""

    def draw(axes: Axes) -> None:
        for rule, colour in ((LAST, WARM), (LONGEST, ACCENT)):
            if rule in rules:
                blocks, shares = zip(*rules[rule]["blocks"].items(), strict=True)
                axes.plot(blocks, shares, "o-", color=colour, markersize=4, label=rule)
        axes.set_xlabel("Block")
        axes.set_ylabel("%", color=MUTED)
        axes.grid(axis="y")
        axes.legend()

    return Panel("Tensors beyond their prediction, by block", draw)
