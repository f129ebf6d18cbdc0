"""Write the replay of runs (`qat.studies.replay`) as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from qat.report.plots import ACCENT, INK, WARM, Panel, forest
from qat.report.text import markdown
from qat.runs.identity import baseline_of, run_id
from qat.studies import replay
from qat.studies.contrasts import Estimate
from qat.studies.design import of_seeds
from qat.studies.page import VERDICTS, Picture, claims_sections, facts_of, marks, write
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
    """Write the replay into `out`; returns the path of its Markdown. tensor: whose amaxes to draw."""
    one, cfg, registered = replayed[0], replayed[0].cfg, replay.registered()
    claims, shadow = replay.claims(replayed), replay.differences(replayed)
    rules = {
        rule: {
            "beyond": vars(replay.estimate([one.beyond(rule) for one in replayed])),
            "roles": replay.by_role(replayed, rule),
            "blocks": replay.by_block(replayed, rule),
        }
        for rule in one.overshoot
    }
    advice = replay.recommendation(shadow, replay.margin(replayed))
    picture = Picture("Predictions and damage by rule", _panels(one, rules, shadow, tensor))
    sections = [f"**{advice}**", *claims_sections(claims), picture]
    sections += ["## Predictions", _PREDICTIONS, _predictions(rules, one.roles)]
    sections += ["## Side by side", _SIDE_BY_SIDE, _side_by_side(shadow, one.roles)] if shadow else []
    own = {
        "Budget": f"{cfg.budget.name}, {cfg.size}, lr {cfg.optim.lr:g}",
        "Runs": f"{len(replayed)}, {of_seeds([one.cfg.seed for one in replayed])}, under {cfg.scaling.algo}",
        "Trace": f"{sum(len(one.steps) for one in replayed)} quantized steps of {len(one.names)} tensors",
    }
    content = {"claims": claims, "recommendation": advice, "rules": rules, "shadow": shadow}
    content["runs"] = [{"run": one.run.id, "baseline": run_id(baseline_of(one.cfg))} for one in replayed]
    about = facts_of(cfg, own, registered, [one.run for one in replayed])
    return write("replay", about, registered, sections, content, out, _READING)


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
    cells = []
    for row in rows:
        of = [row[key] and Estimate(**row[key]) for key in ("damage", "change")]
        losses = [*map(RESPONSES["batch_loss"].text, of), row["decision"] or "–"]
        turned = RESPONSES["cosine"].text(row["turned"] and Estimate(**row["turned"]))
        gradient = [f"{row['cosine']:.4f}", turned, f"{100 * row['norm_error']:+.2f}"]
        sqnr = " / ".join(f"{row[f'sqnr_db/{role}']:.1f}" for role in roles)
        clipped = " / ".join(f"{1e6 * row[f'clipped/{role}']:.1f}" for role in roles)
        cells.append([row["rule"], *losses, *gradient, sqnr, clipped])
    less = f"less {rows[0]['first']}"
    header = ["Rule", "Less no quantization, nats", f"{less.capitalize()}, nats", "Difference"]
    header += [
        "Gradient's cosine",
        less,
        "its norm, %",
        f"SQNR of {' / '.join(roles)}, dB",
        "Beyond the target, in a million",
    ]
    return markdown(header, cells)


# ------------------------------------------------------------------------------------------------- pictures


def _panels(one: Replayed, rules: Mapping, shadow: Sequence[Mapping], tensor: str) -> list[Panel]:
    beyond = [(rule, marks(row["beyond"])) for rule, row in rules.items()]
    damage = [(row["rule"], marks(row["damage"])) for row in shadow]
    panels = [forest("Tensors beyond their prediction", beyond, "%")]
    panels += [forest("Loss less that without quantization", damage, "nats")] if shadow else []
    return [*panels, _amaxes(one, tensor), _blocks(rules)]


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
        axes.set(xlabel="Step", yscale="log")
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
        axes.set(xlabel="Block", ylabel="%")
        axes.grid(axis="y")
        axes.legend()

    return Panel("Tensors beyond their prediction, by block", draw)
