"""matplotlib's pictures as SVG inside a page: its colours follow the page's, its points have titles."""

from __future__ import annotations

import re
from html import escape
from io import StringIO
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

# Stand for the page's own colours, which differ between light and dark.
TEXT, LINE = "#010203", "#040506"
# Okabe and Ito's colours, which colour-blind readers tell apart; yellow is left out, it is lost on white.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7FBF")
MARKERS = "osD^vP*X"
STYLE: Any = {
    "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif", "text.color": TEXT, "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": LINE, "grid.linewidth": 0.5, "axes.axisbelow": True,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
}  # fmt: skip


class Picture:
    """A figure under the page's style; `title` puts words on a point.

    Args:
        name: Stands before every id, so that pictures on one page do not mix.
        width: Inches.
        height: Inches.
    """

    def __init__(self, name: str, width: float, height: float) -> None:
        self.name, self.titles = name, list[str]()
        with mpl.rc_context(STYLE):
            self.figure = Figure(figsize=(width, height), layout="constrained")
            self.ax = self.figure.subplots()

    def title(self, text: str) -> str:
        """The id of an artist that is to have this title."""
        self.titles.append(text)
        return f"point-{len(self.titles) - 1}"

    def legend(self) -> None:
        """Above the picture; outside the style's block matplotlib would give it a frame of its own colours."""
        handles, labels = self.ax.get_legend_handles_labels()
        self.figure.legend(
            handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=8, frameon=False,
            labelcolor=TEXT,
        )  # fmt: skip

    def svg(self, label: str) -> str:
        """The picture as an element of HTML, described by `label` to those who do not see it."""
        buffer = StringIO()
        with mpl.rc_context({**STYLE, "svg.hashsalt": self.name}):
            self.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        for number, title in enumerate(self.titles):
            mark = f'<g id="point-{number}">'
            text = text.replace(mark, f"{mark}<title>{escape(title)}</title>", 1)
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'\bid="', f'id="{self.name}-', text)
        text = re.sub(r'(url\(|href=")#', rf"\1#{self.name}-", text)
        text = text.replace(TEXT, "currentColor").replace(LINE, "var(--line)")
        # Fonts are the page's.
        text = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", text)
        text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>',
                      rf'<svg xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="\1" role="img" '
                      rf'aria-label="{escape(label)}">', text, count=1)  # fmt: skip
        return text.strip()
