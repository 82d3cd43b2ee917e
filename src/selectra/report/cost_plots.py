"""Pictures of cost curves: time, energy and memory against length or resolution, crossovers marked."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from selectra.report.svg import COLORS, MARKERS, Picture

WIDTH, HEIGHT = 5.4, 3.4
Row = dict[str, Any]
MODES = {"forward": "Forward pass", "step": "Training step", "decode": "Generating"}
UNITS = {"unit_us": ("time", "us"), "unit_mj": ("energy", "mJ"), "memory_mb": ("memory", "MiB")}


def looks(kind: Row) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model."""
    names = list(dict.fromkeys(row["model"] for row in kind["rows"]))
    return {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def pictures(name: str, kind: Row) -> list[tuple[str, str]]:
    """Heading and SVG for every mode and quantity that there are numbers for."""
    found = []
    for mode, title in MODES.items():
        for quantity, (what, unit) in UNITS.items():
            rows = _measured(kind, mode, quantity)
            if rows:
                picture = Picture(f"{name}{mode}{quantity.replace('_', '')}", WIDTH, HEIGHT)
                _draw(picture.ax, kind, rows, mode, quantity, picture)
                picture.legend()
                label = f"{title}, {what}{_each(kind, quantity)}"
                picture.ax.set_ylabel(f"{unit}{_each(kind, quantity)}")
                found.append((label, picture.svg(label)))
    return found


def _each(kind: Row, quantity: str) -> str:
    return "" if quantity == "memory_mb" else f" a {kind['unit']}"


def _measured(kind: Row, mode: str, quantity: str) -> list[Row]:
    return [row for row in kind["rows"] if row["mode"] == mode and row.get(quantity) is not None]


def _draw(ax: Axes, kind: Row, rows: list[Row], mode: str, quantity: str, picture: Picture | None = None) -> None:
    """Curves, quartiles of times, and where the first subject crosses the others."""
    styles, unit = looks(kind), UNITS[quantity][1]
    for model, (color, marker) in styles.items():
        mine = sorted((row for row in rows if row["model"] == model), key=lambda row: row["point"])
        if not mine:
            continue
        thick = 2.2 if model in kind["subjects"] else 1.3
        ax.plot([row["point"] for row in mine], [row[quantity] for row in mine], color=color, linewidth=thick)
        for row in mine:
            if quantity == "unit_us":
                scale = row["unit_us"] / row["ms"]
                ax.plot([row["point"]] * 2, [scale * row["lower"], scale * row["upper"]], color=color, linewidth=3,
                        alpha=0.4)  # fmt: skip
            words = f"{model} at {row['point']:,}: {row[quantity]:.4g} {unit}{_each(kind, quantity)}"
            ax.plot([row["point"]], [row[quantity]], marker, color=color, markersize=5,
                    gid=picture.title(words) if picture else None, label=model if row is mine[0] else None)  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    _mark_crossings(ax, kind, mode, quantity, styles)
    points = sorted({row["point"] for row in rows})
    ax.set_xticks(points, [f"{point:,}" for point in points], rotation=45 if len(points) > 5 else 0, fontsize=7)
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(kind["axis"])


def _mark_crossings(ax: Axes, kind: Row, mode: str, quantity: str, styles: dict[str, tuple[str, str]]) -> None:
    least = min(row["point"] for row in kind["rows"])
    low = ax.get_ylim()[0]
    for each in kind["crossings"]:
        same = (each["mode"], each["quantity"], each["subject"]) == (mode, quantity, kind["subjects"][0])
        if same and each["point"] and each["point"] > least:
            color = styles[each["rival"]][0]
            ax.axvline(each["point"], color=color, linewidth=1, linestyle=":")
            ax.annotate(f" {each['point']:,.0f}", (each["point"], low), color=color, fontsize=8, va="bottom")


def figure(content: Row) -> Figure:
    """One picture: for each kind a row of training time, training energy, memory, and generating."""
    kinds = [kind for kind in content["kinds"].values() if any("reason" not in row for row in kind["rows"])]
    columns = [("step", "unit_us"), ("step", "unit_mj"), ("step", "memory_mb"), ("decode", "unit_us")]
    columns = [each for each in columns if any(_measured(kind, *each) for kind in kinds)]
    shape = (max(1, len(kinds)), max(1, len(columns)))
    made = Figure(figsize=(4.6 * shape[1], 3.9 * shape[0]), layout="constrained")
    axes = made.subplots(*shape, squeeze=False)
    for row, kind in zip(axes, kinds, strict=False):
        for ax, (mode, quantity) in zip(row, columns, strict=True):
            rows = _measured(kind, mode, quantity)
            ax.set_visible(bool(rows))
            if rows:
                _draw(ax, kind, rows, mode, quantity)
                what, unit = UNITS[quantity]
                ax.set_title(f"{MODES[mode]}: {what}, {unit}{_each(kind, quantity)}", loc="left", fontsize=10)
                ax.spines[["top", "right"]].set_visible(False)
                ax.grid(color="#dddddd", linewidth=0.5)
                ax.tick_params(labelsize=7)
        row[0].legend(fontsize=7, frameon=False)
    made.suptitle(f"Models of equal size, {content['device']}", fontsize=11)
    return made
