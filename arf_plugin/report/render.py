"""Turns panels into files (PNG and SVG) and into SVG that a page can hold and colour.

Text in an SVG stays text: it takes the page's font, can be selected, and is read aloud. Names come from others'
files: matplotlib escapes them, and its mathematical notation is switched off, so that a name with ``$`` is a name.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arf_plugin.errors import MissingDependencyError
from arf_plugin.files import replacing
from arf_plugin.report.plots import NORMAL, WIDTH, Group, Panel
from arf_plugin.report.style import Style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "arf",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": NORMAL,
    "axes.linewidth": 0.8,
}
PNG_DPI = 160
_IDS = re.compile(r'(\bid="|"#|url\(#)([A-Za-z_][\w.-]*)')
_FAMILY = re.compile(r"font-family: [^;\"]*;? ?")
# The style, `*{stroke-linejoin: round; ...}`, would reach all of a page; the metadata name vocabularies by address.
_LEFT_OUT = re.compile(r"<(style|metadata)\b.*?</\1>", re.DOTALL)
FAMILY = "font-family: system-ui, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', sans-serif"


def for_page(panel: Panel, style: Style, prefix: str) -> str:
    """Draws a panel as an SVG element for the page; the prefix makes its ids unlike those of other panels."""
    with _context():
        figure = _figure(WIDTH, panel.height)
        axes = figure.add_subplot()
        panel.draw(axes, style)
        svg = _svg(figure)
    svg = svg[svg.index("<svg") :]
    svg = _FAMILY.sub("", _LEFT_OUT.sub("", svg))
    svg = _IDS.sub(lambda found: f"{found[1]}{prefix}-{found[2]}", svg)
    head = f'<svg class="panel" role="img" aria-labelledby="{prefix}-about" viewBox="0 0 {WIDTH:g} {panel.height:g}">'
    svg = re.sub(r"<svg[^>]*>", head, svg, count=1, flags=re.DOTALL)
    return style.for_page(svg)


def save(name: str, group: Group, folder: Path, style: Style) -> list[str]:
    """Writes a group as NAME.svg and NAME.png; returns the files' names."""
    columns = min(3, len(group.panels))
    starts = range(0, len(group.panels), columns)
    heights = [max(panel.height for panel in group.panels[i : i + columns]) + 26 for i in starts]
    with _context():
        figure = _figure(WIDTH * columns, sum(heights) + 34)
        figure.patch.set(alpha=1, facecolor=style.paper)
        figure.suptitle(group.title, fontsize=13, color=style.ink, x=0.012, ha="left", fontweight="bold")
        grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
        for index, panel in enumerate(group.panels):
            axes = figure.add_subplot(grid[divmod(index, columns)])
            panel.draw(axes, style)
            axes.set_title(panel.title, fontsize=10.5, color=style.ink, loc="left", pad=7)
        with replacing(folder / f"{name}.svg") as temporary:
            temporary.write_text(_FAMILY.sub(f"{FAMILY}; ", _svg(figure)), encoding="utf-8")
        with replacing(folder / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return [f"{name}.svg", f"{name}.png"]


def _context() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingDependencyError("matplotlib", "A report", "evaluation") from None
    return matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS, "backend": "agg"})


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=5 / 72, h_pad=5 / 72)
    figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout=layout)
    figure.patch.set_alpha(0)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
