"""The picture of `docs/answer.md`: by how much Mamba is better or worse than each rival, with intervals."""

from __future__ import annotations

import io
import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from selectra.report.read import whole
from selectra.report.svg import COLORS, STYLE

Row = dict[str, Any]
INK, PALE = "#1b1b1b", "#c8c8c8"
LOOKS = {"wins": (COLORS[1], "o", "Mamba is better"), "loses": (COLORS[0], "s", "Mamba is worse"),
         "level": ("#7a7a7a", "D", "no difference is shown")}  # fmt: skip
COLUMNS, WIDTH, LINE_INCHES = 2, 11.0, 0.25
# More of them would not fit over a panel.
TITLE_LETTERS = 52
# Per cent from where on, in a panel that reaches beyond, every tenfold has the same room.
FAR = 100.0


def figure(points: list[Row]) -> Figure:
    """Every comparison in per cent of the rival's score; panels by data, in two columns of like height.

    Args:
        points: What `compare.answer.collect` found, each with `panel`, `mamba`, `rival`, `value`, `low`, `high` and
            `outcome`.
    """
    panels: dict[str, list[Row]] = {}
    for each in points:
        panels.setdefault(each["panel"], []).append(each)
    columns: list[list[str]] = [[] for _ in range(COLUMNS)]
    heights = [0] * COLUMNS
    for panel in sorted(panels, key=lambda name: -len(panels[name])):
        shortest = heights.index(min(heights))
        columns[shortest].append(panel)
        heights[shortest] += len(panels[panel]) + 3
    colors: Any = {"text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK,
              "ytick.color": INK, "grid.color": PALE, "figure.facecolor": "white", "axes.facecolor": "white",
              "savefig.facecolor": "white"}  # fmt: skip
    with mpl.rc_context({**STYLE, **colors}):
        drawn = Figure(figsize=(WIDTH, 0.7 + LINE_INCHES * max(heights)), layout="constrained")
        halves: Any = drawn.subfigures(1, COLUMNS)
        for place, (sub, names) in enumerate(zip(halves, columns, strict=True)):
            ratios = [len(panels[name]) + 1 for name in names]
            axes = sub.subplots(len(names), 1, squeeze=False, height_ratios=ratios)[:, 0] if names else []
            for ax, name in zip(axes, names, strict=True):
                _panel(ax, name, panels[name])
            if len(names):
                axes[-1].set_xlabel("Mamba better by, % of the rival's score (below zero: worse)")
            if place == 0 and names:
                handles = [Line2D([], [], color=color, marker=marker, label=words)
                           for color, marker, words in LOOKS.values()]  # fmt: skip
                drawn.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9)
    return drawn


def _panel(ax: Axes, name: str, points: list[Row]) -> None:
    for place, each in enumerate(points):
        color, marker, _ = LOOKS[each["outcome"]]
        ax.plot([each["low"], each["high"]], [place, place], color=color, linewidth=2)
        ax.plot([each["value"]], [place], marker, color=color, markersize=6)
    if max(abs(each[end]) for each in points for end in ("low", "high")) > FAR:
        # A rival that scores next to nothing would press all others onto zero.
        ax.set_xscale("symlog", linthresh=FAR)
        ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.axvline(0, color=INK, linewidth=1)
    ax.set_yticks(range(len(points)), [f"{each['mamba']} against {each['rival']}" for each in points], fontsize=8)
    ax.set_ylim(len(points) - 0.5, -0.5)
    ax.set_title(textwrap.fill(name, TITLE_LETTERS), fontsize=9, loc="left")


def write_picture(points: list[Row], out: Path) -> None:
    """Write the picture as PNG, whole or not at all."""
    buffer = io.BytesIO()
    figure(points).savefig(buffer, format="png", dpi=120)
    with whole(out) as partial:
        partial.write_bytes(buffer.getvalue())
