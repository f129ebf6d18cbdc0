"""Figures as small panels. A page stacks them as inline SVG; a README gets the same panels side by side in a PNG.

Colours are drawn from the light column of `PALETTE` and become CSS variables in SVG, so a page follows the reader's
light or dark setting. Sizes are CSS pixels.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

PALETTE = {  # light, dark
    "paper": ("#ffffff", "#14181d"),
    "ink": ("#1c2127", "#e4e7eb"),
    "muted": ("#5f6b78", "#9aa5b1"),
    "rule": ("#dde1e6", "#363d46"),
    "base": ("#a9b2bc", "#6f7a86"),
    "accent": ("#1f5fa8", "#6fb0f2"),
    "warm": ("#b8541a", "#f0945a"),
    "tier3": ("#1f5fa9", "#5b9fe4"),
    "tier2": ("#5e92cb", "#4277ae"),
    "tier1": ("#9fc0e3", "#325577"),
    "tier0": ("#d3e1f0", "#263c52"),
    "underflow": ("#c98a5f", "#c47d4c"),
}
PAPER, INK, MUTED, RULE, BASE, ACCENT, WARM = (light for light, _ in list(PALETTE.values())[:7])

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qat",
    "font.size": 10.5,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.borderaxespad": 0.2,
    "lines.linewidth": 1.6,
}


@dataclass
class Panel:
    """One pair of axes: its title, its size and margins (left, right, top, bottom) in pixels, and what draws it."""

    title: str
    draw: Callable[[Axes], None]
    width: float = 430
    height: float = 250
    margins: tuple[float, float, float, float] = (56, 12, 32, 40)

    def place(self, figure: Figure, x: float, y: float, total: tuple[float, float]) -> None:
        """Draw into `figure` of `total` pixels, the panel's upper left corner at (x, y)."""
        left, right, top, bottom = self.margins
        width, height = self.width - left - right, self.height - top - bottom
        box = ((x + left) / total[0], 1 - (y + top + height) / total[1], width / total[0], height / total[1])
        axes = figure.add_axes(box)
        self.draw(axes)
        figure.text(box[0], 1 - (y + 13) / total[1], self.title, fontsize=11, fontweight="bold", va="center")


def svg(panel: Panel, number: int) -> str:
    """Return the panel as an `<svg>` element for a page; `number` makes its ids unique there."""
    with mpl.rc_context(_STYLE):
        figure = Figure((panel.width / 72, panel.height / 72))
        FigureCanvasSVG(figure)
        panel.place(figure, 0, 0, (panel.width, panel.height))
        text, nothing = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return _inline(text.getvalue(), panel, number)


def png(panels: Sequence[Panel], columns: int, path: Path, note: str = "") -> None:
    """Panels of one size in a grid on white, at twice the pixel density, with a note centred below them."""
    rows = -(-len(panels) // columns)
    total = (panels[0].width * min(columns, len(panels)), panels[0].height * rows + (26 if note else 0))
    with mpl.rc_context(_STYLE):
        figure = Figure((total[0] / 72, total[1] / 72), facecolor="white")
        FigureCanvasAgg(figure)
        for i, panel in enumerate(panels):
            panel.place(figure, i % columns * panel.width, i // columns * panel.height, total)
        figure.text(0.5, 12 / total[1], note, color=MUTED, ha="center", va="center")
        figure.savefig(path, dpi=144)


def _inline(text: str, panel: Panel, number: int) -> str:
    """Return a stand-alone SVG file cut down to an element whose colours and font are the page's."""
    body = text[text.index("<g id=") : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    used = set(re.findall(r"url\(#(\w+)\)", body)) | set(re.findall(r'href="#(\w+)"', body))
    body = re.sub(r' id="([\w.]+)"', lambda m: f' id="f{number}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>f{number}-", body)
    body = re.sub(r" ?font-family: [^;\"]*;?", "", body)
    body = re.sub(r' transform="rotate\(-0 [^)]*\)"', "", body)
    for name, (light, _) in PALETTE.items():
        body = body.replace(light, f"var(--{name})")
    body = re.sub(r"\s*\n\s*", " ", body)
    size = f'viewBox="0 0 {panel.width:g} {panel.height:g}" style="max-width: {panel.width * 1.35:g}px"'
    return f'<svg {size} role="img" aria-label="{html.escape(panel.title)}">{body}</svg>'
