"""A picture of what an image model looks at, for people who do not know the model."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure

from selectra.errors import ConfigError
from selectra.report.titles import shortened

COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7")
CORRECT, OTHERS = "#0072B2", "#b9b9b9"
DECADES = 3
# Letters in a line under a picture; of a class beside its bar, and in the title of one picture; of the file's name.
NOTE_WIDTH, MOST_LETTERS, FEWER_LETTERS, FILE_LETTERS = 52, 28, 20, 56
# Layers' bars above this are too thin to be told apart by number.
MOST_TICKS = 12
Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Field:
    """How far each pixel moves the feature in the middle of the last grid.

    Args:
        strength: Of every pixel (h, w).
        middle: Row and column of the feature, in pixels.
        grid: Rows and columns of the last grid.
        areas: Share of the image that holds a share of all strength, by that share.
        levels: Strength at which these areas end.
    """

    strength: Pixels
    middle: tuple[float, float]
    grid: tuple[int, int]
    areas: dict[float, float]
    levels: dict[float, float]


@dataclass(frozen=True)
class Routes:
    """What each scan direction contributes.

    Args:
        names: Of the directions.
        full: Probability of the class with all of them.
        left: The same without one.
        layers: Names of the mixers, first to last.
        shares: Of every direction in each mixer's output (layers, directions).
        maps: Where each contributes (directions, h, w).
    """

    names: tuple[str, ...]
    full: float
    left: tuple[float, ...]
    layers: tuple[str, ...]
    shares: Pixels
    maps: Pixels | None


@dataclass(frozen=True)
class Explanation:
    """Everything that the picture shows.

    Args:
        model: Its name.
        file: The image's name.
        image: As the model gets it, (h, w, 3) from 0 to 1; of other than 3 channels the mean of all.
        classes: The likeliest, likeliest first.
        probabilities: Theirs.
        target: The class that is explained.
        probability: Its own.
        class_map: How far each pixel moves its score (h, w).
        field: Of the feature in the middle.
        routes: None for a model that scans in one direction or not at all.
        channels: How many of the image the model gets.
    """

    model: str
    file: str
    image: Pixels
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    target: str
    probability: float
    class_map: Pixels
    field: Field
    routes: Routes | None
    channels: int = 3


def save_explanation(found: Explanation, out: Path) -> None:
    """Draw it into a PNG file.

    Raises:
        ConfigError: The file cannot be written, or is to be of another kind.
    """
    if out.suffix.lower() != ".png":
        raise ConfigError(f"'{out}': the picture is a PNG file; give a name that ends in .png.")
    drawn = BytesIO()
    explanation_figure(found).savefig(drawn, format="png", dpi=120)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(drawn.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write '{out}': {error.strerror}; choose another place with --out.") from error


def explanation_figure(found: Explanation) -> Figure:
    """The image and its classes, what matters for the class, the field of one feature, and the scan directions."""
    routes = found.routes
    figure = Figure(figsize=(15, 9.4 if routes else 5.2), layout="constrained")
    model, file = shortened(found.model, MOST_LETTERS), shortened(found.file, FILE_LETTERS)
    figure.suptitle(f"What {model} looks at in {file}", fontsize=16, fontweight="bold")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.05)) if routes else (figure, None)
    upper, lower = halves
    axes: Any = upper.subplots(1, 4, gridspec_kw={"width_ratios": (1, 1, 1, 0.85)})
    mean = "" if found.channels in (1, 3) else f"here the mean of its {found.channels} channels, in grey"
    _picture(axes[0], found.image, "The image, as the model gets it", mean)
    _class_map(axes[1], found)
    _field(axes[2], found, upper)
    _classes(axes[3], found)
    if routes is not None:
        _routes(lower, found, routes)
    return figure


def _picture(ax: Axes, image: Pixels, title: str, note: str = "") -> None:
    ax.imshow(image, interpolation="nearest")
    ax.set_title(title, fontsize=11)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.set_xlabel("\n".join(wrap(note, NOTE_WIDTH)), fontsize=9, color="#444444")


def _grey(image: Pixels) -> Pixels:
    """The image pale and without colour, for what is drawn over it."""
    grey = image.mean(2, keepdims=True).repeat(3, 2)
    return 0.35 + 0.65 * grey


def _class_map(ax: Axes, found: Explanation) -> None:
    note = "how far a change of each pixel moves the class's score (gradient, mean over noisy copies, smoothed)"
    _picture(ax, _grey(found.image), f"What matters for “{shortened(found.target, FEWER_LETTERS, tail=False)}”", note)
    shown = _smoothed(found.class_map)
    shown = shown / max(float(np.quantile(shown, 0.995)), 1e-30)
    ax.imshow(shown, cmap="inferno", alpha=np.clip(shown, 0, 1) * 0.85, vmin=0, vmax=1)


def _field(ax: Axes, found: Explanation, figure: Any) -> None:
    field = found.field
    lines = zip(field.areas.items(), ("solid line", "dotted line"), strict=False)
    words = ", ".join(f"{share:.0%} of it in {area:.0%} of the image ({line})" for (share, area), line in lines)
    note = f"how far each pixel moves one feature of the {field.grid[0]} x {field.grid[1]} grid: {words}"
    _picture(ax, _grey(found.image), "What the feature in the middle (+) sees", note)
    top = max(float(field.strength.max()), 1e-30)
    norm = LogNorm(top * 10**-DECADES, top)
    drawn = ax.imshow(np.maximum(field.strength, top * 10**-DECADES), cmap="viridis", norm=norm, alpha=0.8)
    for (_share, level), style in zip(field.levels.items(), ("solid", "dotted"), strict=False):
        if field.strength.min() < level < field.strength.max():
            ax.contour(_smoothed(field.strength), levels=[level], colors="white", linestyles=style, linewidths=1.1)
    ax.plot(field.middle[1] - 0.5, field.middle[0] - 0.5, "+", color="red", markersize=13, markeredgewidth=2.5)
    bar = figure.colorbar(drawn, ax=ax, shrink=0.75, pad=0.02)
    bar.set_ticks(
        [top * 10**-i for i in range(DECADES + 1)], labels=["1", *(f"1/{10**i}" for i in range(1, DECADES + 1))]
    )
    bar.ax.minorticks_off()
    bar.ax.tick_params(labelsize=8)


def _classes(ax: Axes, found: Explanation) -> None:
    places = np.arange(len(found.classes))
    colors = [CORRECT if name == found.target else OTHERS for name in found.classes]
    ax.barh(places, found.probabilities, color=colors)
    for place, name, value in zip(places, found.classes, found.probabilities, strict=True):
        ax.text(
            0.01,
            float(place) - 0.42,
            f"{shortened(name, MOST_LETTERS, tail=False)}  {value:.1%}",
            va="bottom",
            ha="left",
            fontsize=9,
        )
    ax.set_ylim(len(places) - 0.5, -0.75)
    ax.set_xlim(0, 1)
    ax.set_yticks([])
    ax.set_xticks([0, 0.5, 1], labels=["0", "50 %", "100 %"], fontsize=8)
    ax.set_title("The likeliest classes", fontsize=11)
    ax.spines[["top", "right", "left"]].set_visible(False)
    if found.target not in found.classes:
        ax.set_xlabel(
            f"explained: “{shortened(found.target, MOST_LETTERS, tail=False)}”, {found.probability:.1%}", fontsize=9
        )


def _routes(figure: SubFigure, found: Explanation, routes: Routes) -> None:
    figure.suptitle("Directions in which the model's layers scan the image", fontsize=12, fontweight="bold")
    if routes.maps is None:
        axes: Any = figure.subplots(1, 2)
    else:
        halves: Any = figure.subfigures(1, 2, width_ratios=(1, 1.55))
        left, right = halves
        _maps(left, found, routes, routes.maps)
        axes = right.subplots(1, 2, gridspec_kw={"width_ratios": (1, 1.15)})
    _without(axes[0], found, routes)
    _by_layer(axes[1], routes)


def _maps(figure: SubFigure, found: Explanation, routes: Routes, maps: Pixels) -> None:
    rows = 1 if len(maps) < 3 else 2
    axes: Any = figure.subplots(rows, -(-len(maps) // rows), squeeze=False)
    most = max(float(maps.max()), 1e-30)
    for ax in axes.ravel()[len(maps) :]:
        ax.set_visible(False)
    for ax, name, part, color in zip(axes.ravel(), routes.names, maps, COLORS, strict=False):
        _picture(ax, _grey(found.image), name)
        ax.title.set_color(color)
        ax.imshow(part / most, cmap="magma", alpha=0.7, vmin=0, vmax=1)
    figure.supxlabel(
        "brighter: the direction contributes more there (all layers, one scale)", fontsize=9, color="#444444"
    )


def _without(ax: Axes, found: Explanation, routes: Routes) -> None:
    places = np.arange(len(routes.names) + 1)
    ax.barh(places, [routes.full, *routes.left], color=["#666666", *COLORS[: len(routes.names)]])
    ax.set_yticks(places, labels=["all directions", *(f"without {name}" for name in routes.names)], fontsize=9)
    for place, value in zip(places, (routes.full, *routes.left), strict=True):
        ax.text(value + 0.02, float(place), f"{value:.1%}", va="center", fontsize=9)
    # Room for a figure beside a full bar.
    ax.set_xlim(0, 1.25)
    ax.set_xticks([0, 0.5, 1], labels=["0", "50 %", "100 %"], fontsize=8)
    ax.invert_yaxis()
    target = shortened(found.target, MOST_LETTERS, tail=False)
    ax.set_title(f"Probability of “{target}”\nif one direction is left out everywhere", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)


def _by_layer(ax: Axes, routes: Routes) -> None:
    layers, below = np.arange(1, len(routes.layers) + 1), np.zeros(len(routes.layers))
    for i, (name, color) in enumerate(zip(routes.names, COLORS, strict=False)):
        ax.bar(layers, routes.shares[:, i], bottom=below, color=color, label=name, width=0.85)
        below += routes.shares[:, i]
    step = -(-len(layers) // MOST_TICKS)
    ax.set_xticks(layers[::step], labels=[str(i) for i in layers[::step]], fontsize=8)
    ax.set_xlabel("layer, first to last", fontsize=9)
    ax.set_ylim(0, 1)
    ax.set_yticks([0, 0.5, 1], labels=["0", "50 %", "100 %"], fontsize=8)
    ax.set_title("Each direction's share of\nwhat a layer gives", fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)


def _smoothed(values: Pixels) -> Pixels:
    """A blur of a fiftieth of the sides, which leaves single pixels' noise out."""
    for axis, side in enumerate(values.shape):
        sigma = max(0.5, side / 50)
        reach = max(1, round(3 * sigma))
        weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
        padding = [(reach, reach) if i == axis else (0, 0) for i in range(2)]
        padded = np.pad(values, padding, mode="edge")
        values = np.apply_along_axis(np.convolve, axis, padded, weights / weights.sum(), "valid")
    return values
