"""The picture of `selectra bench lengths`, made from its record alone."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from selectra.bench.length_table import ATTENTION, OURS, WAYS, crossover

# Okabe and Ito's colours, which colour-blind readers tell apart.
STYLES = {
    OURS: ("Selectra, two scans", "#D55E00", "-", 2.0),
    "mamba_ssm": ("mamba_ssm, two scans", "#0072B2", "-", 1.3),
    ATTENTION: ("FlashAttention, one layer", "#111111", "--", 1.6),
    "attention, cuDNN": ("cuDNN attention, one layer", "#8a8a8a", ":", 1.3),
}


def length_figure(record: dict[str, Any]) -> Figure:
    """Time against length on logarithmic axes, forward and training step, with each crossover marked."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, (way, title) in zip(axes, WAYS.items(), strict=True):
        _panel(ax, record, way)
        ax.set_title(title, loc="left", fontsize=11)
    study = record["study"]
    gpus = record["environment"]["hardware"]["gpus"]
    where = gpus[0] if gpus and record["device"].startswith("cuda") else record["device"]
    figure.suptitle(f"d_model {study['d_model']}, batch {study['batch']}, {study['dtype']}, {where}", fontsize=10)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _panel(ax: Axes, record: dict[str, Any], way: str) -> None:
    for name, (label, color, line, width) in STYLES.items():
        points = sorted((row["L"], row[f"{way}_ms"][name]) for row in record["rows"] if name in row[f"{way}_ms"])
        if points:
            lengths, times = zip(*points, strict=True)
            ax.plot(lengths, times, line, color=color, label=label, linewidth=width, marker=".", markersize=4)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, _ = ax.get_ylim()
    for name in (OURS, "mamba_ssm"):
        length = crossover(record, way, name)
        if length is not None:
            color = STYLES[name][1]
            ax.axvline(length, color=color, linewidth=0.8, linestyle=":")
            ax.annotate(f" {length:,.0f}", (length, low), color=color, fontsize=9, va="bottom")
    ax.set_xlabel("tokens", fontsize=9)
    ax.set_ylabel("ms", fontsize=9)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.tick_params(labelsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="#dddddd", linewidth=0.5)
