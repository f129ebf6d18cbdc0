"""Draw losses, overshoot, amax, mantissa bits, lost updates, and differences from BF16 with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.ticker import FuncFormatter, MaxNLocator

from qat.analysis.compare import MODES
from qat.analysis.decisions import APE_THRESHOLD, DROP_THRESHOLD
from qat.report import plots
from qat.report.experiment import Curve, Telemetry
from qat.report.plots import ACCENT, BASE, INK, MUTED, PAPER, RULE, WARM, Mark, Panel
from qat.train.monitor import FORGOTTEN, noise

_POINTS = 500  # a curve of more steps is drawn as means of blocks of steps
_COLUMNS = 200  # a heat map of more steps shows the largest value of each block of steps
_REACH = 1.0  # overshoot colours end at a factor of 2 either way
_FACTORS = {-1: "½×", 0: "1×", 1: "2×"}
_SHARES = {  # colour, name
    "tier3": ("#1f5fa9", "3 bits"),
    "tier2": ("#5e92cb", "2 bits"),
    "tier1": ("#9fc0e3", "1 bit"),
    "tier0": ("#d3e1f0", "subnormal"),
    "underflow": ("#c98a5f", "rounded to 0"),
}
_MODE_MARKS = {"w8a8": ("●", "o", ACCENT), "ptq": ("◇", "d", PAPER), "bf16": ("○", "o", PAPER)}
_PAPER = {"marker": "x", "color": WARM, "markersize": 6, "markeredgewidth": 1.8}
_THRESHOLD = {"marker": "|", "color": MUTED, "markersize": 7}
_UPDATES = {"stored": ("as stored", BASE), "bf16": ("seen in BF16", ACCENT), "format": ("seen in the format", WARM)}


def losses(curves: Mapping[str, Curve], title: str) -> Panel:
    """Draw the training losses of several runs, the last in the accent colour, on top."""

    def draw(axes: Axes) -> None:
        for (label, curve), (colour, width) in zip(curves.items(), _line_styles(len(curves)), strict=True):
            axes.plot(*_thin(curve.steps, curve.loss), color=colour, linewidth=width, label=label)
            _mark_start(axes, curve)
        _step_axis(axes, "Training loss (nats a token)")
        axes.legend()

    return Panel(title, draw)


def loss_difference(run: Curve, baseline: Curve, ape: float | None, title: str) -> Panel:
    """Draw the loss of a run relative to its baseline's, in percent, and the threshold of the APE."""

    def draw(axes: Axes) -> None:
        steps, percent = run.relative_to(baseline)
        for threshold in (-APE_THRESHOLD, APE_THRESHOLD):
            axes.axhline(threshold, color=MUTED, linewidth=0.9, dashes=(2, 3))
        axes.axhline(0, color=BASE, linewidth=2.2)
        axes.plot(*_thin(steps, percent), color=ACCENT)
        _mark_start(axes, run)
        reach = max(1.4 * APE_THRESHOLD, 1.15 * float(np.max(np.abs(percent[np.isfinite(percent)]), initial=0)))
        axes.set_ylim(-reach, reach)
        _step_axis(axes, "Difference (% of BF16 loss)")
        if ape is not None:
            axes.text(0.99, 1.01, f"APE {ape:.3f} %", transform=axes.transAxes, ha="right", color=ACCENT)
        axes.text(0.99, 0.02, f"dotted: ±{APE_THRESHOLD} %", transform=axes.transAxes, ha="right", color=MUTED, size=9)

    return Panel(title, draw)


def forgetting(run: Telemetry, baseline: Telemetry | None, title: str) -> Panel:
    """Draw how held-out losses change from before training, of a run over its baseline; dotted: the rise warned of."""

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=MUTED, linewidth=0.9)
        for text, colour in zip(run.texts, (ACCENT, WARM, *[MUTED] * len(run.texts)), strict=False):
            if baseline and text in baseline.texts:
                axes.plot(*baseline.drift(text), color=BASE, linewidth=3.2)
            axes.plot(*run.drift(text), color=colour, label=text, marker="o", markersize=3.5)
        *_, other = run.texts.values()
        limit = FORGOTTEN + noise(other[0]["tokens"])
        axes.axhline(limit, color=WARM, linewidth=0.9, dashes=(2, 3))
        place = {"xycoords": ("axes fraction", "data"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate("warned of", (0.01, limit), color=WARM, fontsize=9, **place)
        _step_axis(axes, "Change of held-out loss (nats)")
        axes.plot([], [], color=BASE, linewidth=3.2, label="BF16")
        _legend_above(axes, handlelength=1.2)

    return Panel(title, draw, margins=(56, 12, 54, 40))


def overshoot(telemetry: Telemetry, role: str, title: str, last_step: int, bar: bool) -> Panel:
    """Draw the largest amax / predicted amax of each block as a heat map, white where the prediction was exact.

    bar: adds the colour bar, which panels side by side share.
    """
    steps, blocks, grid = telemetry.overshoot(role)

    def draw(axes: Axes) -> None:
        starts = np.arange(0, len(steps), -(-len(steps) // _COLUMNS))
        with np.errstate(divide="ignore"):  # an amax of 0 is -inf here, and takes the colour of the lower end
            shade = np.log2(np.fmax.reduceat(grid, starts, axis=1))
        # Steps are logged at no even pace: a column reaches half way to its neighbours.
        edges = np.concatenate([[steps[0] - 0.5], (steps[1:] + steps[:-1]) / 2, [steps[-1] + 0.5]])
        look = {"cmap": diverging(), "vmin": -_REACH, "vmax": _REACH, "rasterized": True}
        image = axes.pcolormesh(edges[[*starts, -1]], np.arange(len(blocks) + 1) - 0.5, shade, **look)
        axes.set_xlim(0.5, last_step + 0.5)
        shown = range(0, len(blocks), -(-len(blocks) // 6))
        axes.set_yticks(shown, [blocks[i] for i in shown])
        _step_axis(axes, "Block", grid=False)
        if bar:
            place = axes.inset_axes((1.03, 0, 0.035, 1))
            scale = axes.figure.colorbar(image, cax=place, ticks=[-1, 0, 1], format=_FACTORS.get, extend="both")
            scale.outline.set_edgecolor(RULE)

    return Panel(title, draw, width=340, height=230, margins=(44, 52, 32, 40))


def amax(telemetry: Telemetry, role: str, layer: str, last_step: int) -> Panel:
    """Draw the amax of a layer's tensor over the predicted amax, with dots where it was larger."""
    steps, amaxes, predicted = telemetry.amax_history(role, layer)

    def draw(axes: Axes) -> None:
        beyond = amaxes > predicted
        axes.plot(steps, predicted, color=BASE, linewidth=3.2, label="predicted")
        axes.plot(steps, amaxes, color=ACCENT, marker="o" if len(steps) <= 40 else None, markersize=3.5, label="amax")
        axes.plot(steps[beyond], amaxes[beyond], "o", color=WARM, markersize=4, label="larger than predicted")
        axes.set_xlim(0.5, last_step + 0.5)
        axes.set_ylim(0, 1.08 * float(np.nanmax([amaxes, predicted], initial=0)) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.ticklabel_format(axis="y", scilimits=(-3, 4))
        axes.yaxis.get_offset_text().set_visible(False)
        _step_axis(axes, "amax")

    return Panel(role.capitalize(), draw, width=340, height=230, margins=(52, 44, 32, 40))


def mantissa_bits(telemetry: Telemetry) -> Panel:
    """Draw the share of nonzero elements by the mantissa bits left to them, a stacked bar a role."""
    roles = list(telemetry.tensors)
    means = [telemetry.means(role) for role in roles]

    def draw(axes: Axes) -> None:
        left, rows = np.zeros(len(roles)), np.arange(len(roles))[::-1]
        for key, (colour, name) in _SHARES.items():
            width = np.array([100 * mean[key] for mean in means])
            axes.barh(rows, width, left=left, height=0.52, color=colour, label=name)
            for y, x, w in zip(rows, left, width, strict=True):
                if w >= 9:
                    ink = PAPER if key in ("tier3", "tier2") else INK
                    axes.text(x + w / 2, y, f"{w:.0f} %", ha="center", va="center", color=ink, fontsize=9.5)
            left += width
        axes.set_yticks(rows, [f"{r.capitalize()}\n{m['sqnr_db']:.1f} dB" for r, m in zip(roles, means, strict=True)])
        axes.tick_params(length=0)
        axes.set(xlim=(0, 100), ylim=(-0.55, len(roles) - 0.1), xlabel="Share of nonzero elements (%), SQNR in dB")
        axes.spines["left"].set_visible(False)
        _legend_above(axes, handlelength=0.8)

    return Panel("Mantissa bits left", draw, margins=(78, 16, 54, 40))


def mantissa_bits_by_block(telemetry: Telemetry, role: str) -> Panel:
    """Draw the shares of `mantissa_bits` of one role, by block."""
    blocks, means = telemetry.shares(role)

    def draw(axes: Axes) -> None:
        bottom, edges = np.zeros(len(blocks)), np.arange(len(blocks) + 1) - 0.5
        for key, share in means.items():
            top = bottom + 100 * share
            axes.stairs(top, edges, baseline=bottom, fill=True, color=_SHARES[key][0])
            bottom = top
        shown = range(0, len(blocks), -(-len(blocks) // 6))
        axes.set_xticks(shown, [blocks[i] for i in shown])
        axes.set(xlim=edges[[0, -1]], ylim=(0, 100), xlabel="Block", ylabel="Nonzero elements (%)")

    return Panel(role.capitalize(), draw, width=340, height=210, margins=(44, 52, 32, 40))


def updates(telemetry: Telemetry) -> Panel:
    """Draw the share of the weights that a step changed, before and after rounding to BF16 and to the format."""

    def draw(axes: Axes) -> None:
        steps = [step for step, _ in telemetry.updates]
        for key, (label, colour) in _UPDATES.items():
            percent = [100 * share[key] for _, share in telemetry.updates]
            axes.plot(steps, percent, color=colour, label=label, marker="o" if len(steps) < 3 else None)
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.set_ylim(0, 200)
        axes.set_yticks([0, 1e-3, 1e-2, 0.1, 1, 10, 100])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.minorticks_off()
        _step_axis(axes, "Weights changed (%)")
        _legend_above(axes, handlelength=1.2)

    return Panel("Weights that an update changes", draw, margins=(56, 16, 54, 40))


class Estimate(NamedTuple):
    """A difference from BF16 with its 95 % interval, and the value at which a threshold is just missed."""

    value: float
    ci: Sequence[float] | None
    threshold: float | None = None


def forest(
    title: str, rows: Sequence[tuple[str, Mapping[str, Estimate], float | None]], unit: str, reach: float | None = None
) -> Panel:
    """Draw differences from BF16; a row is (label, estimate by mode, the paper's difference or None).

    reach: the end of the axis, in `unit`, so that panels can share it; None: what the modes drawn need.
    """
    shown = [modes[mode] for _, modes, _ in rows for mode in _MODE_MARKS if mode in modes]
    reach = reach or 1.04 * max((abs(end) for row in shown for end in (row.value, *(row.ci or ()))), default=0) or 1.0
    drawn = []
    for label, modes, paper in rows:
        marks = []
        for shift, (mode, (_, shape, fill)) in zip((0.24, 0.0, -0.24), _MODE_MARKS.items(), strict=True):
            if mode in modes:
                value, ci, threshold = modes[mode]
                marks += [] if threshold is None else [Mark(threshold, None, shift, _THRESHOLD)]
                marks += [Mark(value, ci, shift, {"marker": shape, "markerfacecolor": fill, "markersize": 5.5})]
        drawn.append((label, marks + ([] if paper is None else [Mark(paper, style=_PAPER)])))
    return plots.forest(title, drawn, f"Run − BF16 ({unit})", (-reach, reach), row_height=30)


def score_legend() -> dict[str, str]:
    """Return what the marks of `forest` mean."""
    return {
        **{mark: f"{MODES[mode]}, 95 % interval" for mode, (mark, _, _) in _MODE_MARKS.items()},
        "✕": "paper",
        "|": f"{DROP_THRESHOLD:g} % threshold: the drop that just fails; no mark: powerless",
    }


def _line_styles(count: int) -> list[tuple[str, float]]:
    """Return colour and width of `count` lines, the emphasized one last."""
    others = [(BASE, 3.2), (WARM, 1.6)] + [(MUTED, 1.0)] * count
    return [*others[: count - 1], (ACCENT, 1.6)]


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    block = -(-len(steps) // _POINTS)
    if block <= 1:
        return steps, values
    whole = len(steps) // block * block
    return steps[:whole].reshape(-1, block).mean(1), values[:whole].reshape(-1, block).mean(1)


def _mark_start(axes: Axes, curve: Curve) -> None:
    if curve.start is None or curve.start == curve.steps[0]:
        return
    axes.axvline(curve.start - 0.5, color=WARM, linewidth=1.1, dashes=(4, 3))
    place = {"xycoords": ("data", "axes fraction"), "xytext": (5, 2), "textcoords": "offset points"}
    axes.annotate("quantized from here", (curve.start - 0.5, 0.02), color=WARM, fontsize=9, **place)


def _legend_above(axes: Axes, handlelength: float) -> None:
    """Draw the legend in one line between the title and the axes."""
    spacing = {"handlelength": handlelength, "handletextpad": 0.5, "columnspacing": 1.1}
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 0.99), ncols=5, **spacing)


def _step_axis(axes: Axes, label: str, grid: bool = True) -> None:
    axes.set(xlabel="Optimizer step", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if grid:
        axes.grid(axis="y")


def diverging() -> ListedColormap:
    """Return a colour map: blue below, orange above, transparent between."""
    strength = np.linspace(-1, 1, 129)
    colour = [(*to_rgb(WARM if s > 0 else ACCENT), min(1.0, abs(s) ** 0.8)) for s in strength]
    return ListedColormap(colour).with_extremes(bad=(0, 0, 0, 0))
