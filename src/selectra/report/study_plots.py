"""Pictures of a study: every training, differences with their intervals, error against cost, cost against length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from selectra.report.study_claims import interval
from selectra.report.svg import COLORS, LINE, MARKERS, TEXT, Picture

WIDTH = 5.4
# Greatest over least value of an axis from which on ticks are 1, 2 and 5 times powers of ten.
NARROW = 5
Row = dict[str, Any]
QUANTITIES = {
    "forward_ms": ("forward pass, ms", "Time of a forward pass"),
    "step_ms": ("forward and backward, ms", "Time of a training step"),
    "activations_mb": ("MiB", "Memory kept for the backward"),
}


def looks(content: Row) -> dict[str, tuple[str, str]]:
    """Colour and marker of each variant; the subject has the first."""
    names = sorted(content["kinds"], key=lambda name: name != content["subject"])
    return {name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(names)}


def pictures(content: Row) -> list[tuple[str, str, str]]:
    """Section, heading and SVG of every picture that there are numbers for."""
    found = []
    bases = list(dict.fromkeys(row["base"] for row in content["rows"]))
    for number, base in enumerate(bases):
        rows = [row for row in content["rows"] if row["base"] == base and row["mean"] is not None]
        if rows:
            found.append(("trainings", f"{base}: every training", trainings(content, rows, f"trainings{number}")))
            found.append(("costs", f"{base}: {content['metric']} against time", against_cost(content, rows, number)))
    if content["overall"]:
        found.insert(0, ("differences", f"{content['subject']} against each other model", differences(content)))
    for quantity, (unit, title) in QUANTITIES.items():
        rows = [row for row in content["curves"]["rows"] if row[quantity] > 0]
        if rows:
            found.append(("curves", title, curve(content, rows, quantity, unit)))
    return found


def trainings(content: Row, rows: Sequence[Row], name: str) -> str:
    """A point for every seed, a bar for the mean's interval; the best on top."""
    ordered = sorted(rows, key=lambda row: row["mean"], reverse=content["higher_is_better"])
    picture, styles = Picture(name, WIDTH, 0.9 + 0.34 * len(ordered)), looks(content)
    for place, row in enumerate(ordered):
        color, marker = styles[row["variant"]]
        if between := interval(content, row):
            picture.ax.plot(between, [place, place], color=color, linewidth=4, alpha=0.35,
                            solid_capstyle="butt")  # fmt: skip
        for seed, value in row["values"].items():
            words = f"{row['variant']}, {'no seed matters' if row['sure'] else 'seed ' + seed}: {value:.4f}"
            picture.ax.plot([value], [place], marker, color=color, markersize=6, gid=picture.title(words))
    picture.ax.set_yticks(range(len(ordered)), [row["variant"] for row in ordered])
    picture.ax.set_ylim(len(ordered) - 0.5, -0.5)
    picture.ax.xaxis.set_major_locator(MaxNLocator(6))
    better = "higher" if content["higher_is_better"] else "lower"
    picture.ax.set_xlabel(f"{content['metric']} on the test part ({better} is better)")
    return picture.svg(f"{content['metric']} of every training on {rows[0]['base']}")


def differences(content: Row) -> str:
    """How far the subject lies from each rival, with intervals."""
    rows, (color, _) = content["overall"], looks(content)[content["subject"]]
    picture = Picture("differences", WIDTH, 1.1 + 0.34 * len(rows))
    for place, row in enumerate(rows):
        picture.ax.plot([row["low"], row["high"]], [place, place], color=color, linewidth=2)
        words = (f"{content['subject']} against {row['rival']}: {row['difference']:+.2f}{row['unit']}, "
                 f"{row['low']:+.2f} to {row['high']:+.2f}")  # fmt: skip
        filled = color if row["outcome"] != "level" else "none"
        picture.ax.plot([row["difference"]], [place], "o", color=color, markerfacecolor=filled, markersize=7,
                        gid=picture.title(words))  # fmt: skip
    picture.ax.axvline(0, color=TEXT, linewidth=1)
    picture.ax.set_yticks(range(len(rows)), [f"against {row['rival']}" for row in rows])
    picture.ax.set_ylim(len(rows) - 0.5, -0.5)
    better = "right" if content["higher_is_better"] else "left"
    unit = f" in {rows[0]['unit']}" if rows[0]["unit"] else ""
    words = f"difference in {content['metric']}{unit}; {better} of zero {content['subject']} is better"
    picture.ax.set_xlabel(f"{words}\nfilled: beyond chance", fontsize=8)
    return picture.svg("Differences with their intervals")


def against_cost(content: Row, rows: Sequence[Row], number: int) -> str:
    """Error against the time of a forward pass: down and to the left is better."""
    picture, styles = Picture(f"cost{number}", WIDTH, 3.2), looks(content)
    for row in rows:
        color, marker = styles[row["variant"]]
        cost = row["cost"]
        words = (f"{row['variant']}: {content['metric']} {row['mean']:.4f}, {cost['forward_ms']:.2f} ms, "
                 f"{cost['parameters']:,} parameters")  # fmt: skip
        picture.ax.plot([cost["forward_ms"]], [row["mean"]], marker, color=color, markersize=8,
                        label=row["variant"], gid=picture.title(words))  # fmt: skip
    picture.ax.set_xscale("log")
    _plain_ticks(picture.ax.xaxis)
    picture.ax.set_xlabel(f"forward pass of {rows[0]['cost']['batch']} samples, ms ({rows[0]['cost']['device']})")
    picture.ax.set_ylabel(content["metric"])
    picture.legend()
    return picture.svg(f"{content['metric']} against the time of a forward pass")


def curve(content: Row, rows: Sequence[Row], quantity: str, unit: str) -> str:
    """A cost against the length, and where the subject becomes cheaper."""
    picture, styles = Picture(quantity.replace("_", ""), WIDTH, 3.4), looks(content)
    for variant, (color, marker) in styles.items():
        mine = sorted((row["length"], row[quantity]) for row in rows if row["variant"] == variant)
        if not mine:
            continue
        picture.ax.plot(*zip(*mine, strict=True), color=color, linewidth=1.5)
        for length, value in mine:
            words = f"{variant} at length {length}: {value:.3g} {'MiB' if unit == 'MiB' else 'ms'}"
            picture.ax.plot([length], [value], marker, color=color, markersize=6, gid=picture.title(words),
                            label=variant if length == mine[0][0] else None)  # fmt: skip
    for crossing in content["curves"]["crossings"]:
        if (
            crossing["quantity"] == quantity
            and crossing["length"]
            and crossing["length"] > min(r["length"] for r in rows)
        ):
            picture.ax.axvline(crossing["length"], color=styles[crossing["rival"]][0], linewidth=1, linestyle=":")
    picture.ax.set_xscale("log")
    picture.ax.set_yscale("log")
    lengths = sorted({row["length"] for row in rows})
    picture.ax.set_xticks(lengths, [str(length) for length in lengths])
    picture.ax.xaxis.set_minor_formatter(NullFormatter())
    _plain_ticks(picture.ax.yaxis)
    picture.ax.grid(which="minor", color=LINE, linewidth=0.2)
    picture.ax.set_xlabel("look-back")
    picture.ax.set_ylabel(unit)
    picture.legend()
    return picture.svg(f"{unit} against the look-back")


def _plain_ticks(axis: Any) -> None:
    """2000 in place of 2 times ten to the third; no words on minor ticks."""
    low, high = axis.get_view_interval()
    # Of 1, 2 and 5 times powers of ten a narrow range holds one, or none.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > NARROW * low else MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
