"""Pictures of a forecast and of its errors."""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib.dates as mdates
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from selectra.report.read import Result, read_result, split_unit, whole

PICTURE = "forecast.png"
MAX_PANELS = 12
MIN_HISTORY = 24
MAX_SERIES_ROWS = 40
# The main model's, which no other model gets. It and the first of the others are Okabe and Ito's colours, which
# colour-blind readers tell apart; black is the truth.
MAIN = "#D55E00"
COLORS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#5F4690", "#A3B000", "#882255")
MARKERS = "sD^vP*X<>hp"
# A mean error this many times the median model's would press the others' lines together.
FAR = 2.5
HISTORY, TRUTH, HELD_OUT, FUTURE = "#8a8a8a", "#111111", "#f1efe8", "#e3edf6"
# Entries of the legend in one line, for one, two or three panels beside each other.
LEGEND_COLUMNS = {1: 5, 2: 6, 3: 8}
STYLES = ("-", "--", "-.", ":")


def colors_of(models: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and line style of each model, the main one first; styles change once the colours are used up."""
    n, (main, *others) = len(COLORS), models
    return {main: (MAIN, STYLES[0])} | {
        name: (COLORS[i % n], STYLES[(i // n) % len(STYLES)]) for i, name in enumerate(others)
    }


def chosen_series(series: list[str]) -> list[str]:
    """All series, or `MAX_PANELS` of them evenly spaced in the order of the file."""
    if len(series) <= MAX_PANELS:
        return series
    positions = np.linspace(0, len(series) - 1, MAX_PANELS).round().astype(int)
    return [series[i] for i in positions]


def forecast_figure(result: Result) -> Figure:
    """One panel a series: history, the last rows with what was forecast for them, and the forecast beyond."""
    names = chosen_series(result.series)
    columns = 1 if len(names) == 1 else 2 if len(names) <= 4 else 3
    rows = -(-len(names) // columns)
    width = {1: 10.0, 2: 13.0, 3: 15.0}[columns]
    figure = Figure(figsize=(width, 1.5 + (3.6 if rows == 1 else 2.5) * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    styles = colors_of(result.models)
    color = styles[result.models[0]][0]
    for ax, name in zip(axes, names, strict=False):
        _panel(ax, name, result, styles)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=HISTORY, label="history"),
        Line2D([], [], color=TRUTH, label="truth (hidden from the models)"),
        *(Line2D([], [], color=c, linestyle=s, label=name) for name, (c, s) in styles.items()),
        *(
            Patch(facecolor=color, alpha=_alpha(result, level), label=f"{level:g} % of {result.models[0]}")
            for level in result.levels
        ),
        Patch(color=HELD_OUT, label="last rows of the data"),
        Patch(color=FUTURE, label="beyond the data"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=LEGEND_COLUMNS[columns], frameon=False, fontsize=9)
    if len(names) < len(result.series):
        note = f"{len(names)} of {len(result.series)} series, evenly spaced in the file; forecast.csv holds all"
        figure.supxlabel(note, fontsize=9, color="#555555")
    return figure


def _panel(ax: Axes, name: str, result: Result, styles: dict[str, tuple[str, str]]) -> None:
    recent = result.recent[result.recent["unique_id"] == name]
    future = result.future[result.future["unique_id"] == name]
    truth = recent[recent["part"] == "truth"]
    history = recent[recent["part"] == "history"].tail(max(2 * len(truth), MIN_HISTORY))
    half = (truth["ds"].diff().median() if len(truth) > 1 else pd.Timedelta(0)) / 2
    for part, color in ((truth, HELD_OUT), (future, FUTURE)):
        ax.axvspan(part["ds"].min() - half, part["ds"].max() + half, color=color, zorder=0)
    ax.plot(history["ds"], history["y"], color=HISTORY, linewidth=1.1)
    _bands(ax, (truth, future), result, styles[result.models[0]][0])
    marker = "." if len(truth) == 1 else None
    # The main model comes last, and so lies on top.
    for order, (model, (color, style)) in enumerate(reversed(styles.items())):
        thick = 1.8 if order == len(styles) - 1 else 1.0
        for part in (truth, future):
            ax.plot(part["ds"], part[model], color=color, linestyle=style, linewidth=thick, marker=marker)
    ax.plot(truth["ds"], truth["y"], color=TRUTH, linewidth=1.3, marker=marker)
    title, unit = split_unit(name)
    ax.set_title(title, fontsize=10, loc="left")
    ax.set_ylabel(unit, fontsize=9)
    _dates(ax)
    ax.margins(x=0)


def _bands(ax: Axes, parts: tuple[pd.DataFrame, ...], result: Result, color: str) -> None:
    """The main model's intervals, the widest below; those of more models would hide each other."""
    for level in reversed(result.levels):
        for part in parts:
            low, high = part[result.bound("lo", level)], part[result.bound("hi", level)]
            # A single step has no width of its own.
            if len(part) == 1:
                ax.vlines(part["ds"], low, high, color=color, alpha=_alpha(result, level), linewidth=6, zorder=1)
            else:
                ax.fill_between(part["ds"], low, high, color=color, alpha=_alpha(result, level), linewidth=0, zorder=1)


def _alpha(result: Result, level: float) -> float:
    """Darker for narrower intervals, which lie upon wider ones."""
    place = result.levels.index(level)
    return 0.14 + 0.16 * (len(result.levels) - 1 - place) / max(1, len(result.levels) - 1)


def _dates(ax: Axes) -> None:
    locator = mdates.AutoDateLocator(minticks=3, maxticks=6)
    ax.xaxis.set_major_locator(locator)
    ax.xaxis.set_major_formatter(mdates.ConciseDateFormatter(locator))
    ax.xaxis.get_offset_text().set_fontsize(8)
    _plain(ax)


def _plain(ax: Axes) -> None:
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.5)
    ax.set_axisbelow(True)


def _plain_numbers(axis: Axis) -> None:
    """0.1, 0.2, 0.5, 1 along a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())


def step_figure(result: Result) -> Figure:
    """Mean squared error at each step of the horizon."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    ax = figure.subplots()
    means = []
    for model, (color, style) in colors_of(result.models).items():
        values = np.array(result.errors["models"][model]["mse_by_step"], dtype=float)
        means.append(np.nanmean(values))
        marker = "o" if len(values) <= 12 else None
        thick = 2.0 if model == result.models[0] else 1.3
        steps = np.arange(1, len(values) + 1)
        ax.plot(steps, values, color=color, linestyle=style, linewidth=thick, label=model, marker=marker, markersize=4)
    ax.set_xlabel(f"step of the horizon ({result.run['data']['freq']})", fontsize=9)
    ax.set_ylabel("MSE, standardised", fontsize=9)
    ax.margins(x=0.01)
    _plain(ax)
    if max(means) > FAR * np.median(means) and min(means) > 0:
        ax.set_yscale("log")
        _plain_numbers(ax.yaxis)
    else:
        ax.set_ylim(bottom=0)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def series_figure(result: Result) -> Figure:
    """Mean squared error of each series; of many, those where the main model's is highest."""
    names, main = result.series, result.models[0]
    own = np.array(result.errors["models"][main]["mse_by_series"], dtype=float)
    shown = (
        np.argsort(-np.nan_to_num(own, nan=-1.0))[:MAX_SERIES_ROWS]
        if len(names) > MAX_SERIES_ROWS
        else np.arange(len(names))
    )
    figure = Figure(figsize=(9, 1.3 + 0.3 * len(shown)), layout="constrained")
    ax = figure.subplots()
    everything = []
    for i, (model, (color, _)) in enumerate(colors_of(result.models).items()):
        values = np.array(result.errors["models"][model]["mse_by_series"], dtype=float)[shown]
        everything.append(values)
        ax.plot(
            values,
            np.arange(len(shown)),
            "o" if i == 0 else MARKERS[(i - 1) % len(MARKERS)],
            color=color,
            label=model,
            markersize=7 if i == 0 else 5,
            zorder=3 if i == 0 else 2,
            alpha=0.9,
        )
    ax.set_yticks(np.arange(len(shown)), [names[i] for i in shown])
    ax.set_ylim(len(shown) - 0.5, -0.5)
    positive = np.concatenate(everything)
    positive = positive[np.isfinite(positive) & (positive > 0)]
    if len(positive) and positive.max() > 20 * positive.min():
        ax.set_xscale("log")
        _plain_numbers(ax.xaxis)
    else:
        ax.set_xlim(left=0)
    ax.set_xlabel("MSE, standardised", fontsize=9)
    _plain(ax)
    ax.grid(axis="x", color="#dddddd", linewidth=0.5)
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as a PNG file's bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def write_forecast_picture(out: Path) -> None:
    """Write `forecast.png` from the other files of the folder."""
    with whole(out / PICTURE) as partial:
        partial.write_bytes(png(forecast_figure(read_result(out)), dpi=120))
