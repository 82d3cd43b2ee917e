"""A picture of an image's classes over the image, beside a legend."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from PIL import Image

from selectra.errors import ConfigError
from selectra.report.titles import shortened

# Of the classes' colours over the image.
OPACITY = 0.55
# Classes in the legend; those of the fewest pixels are left out.
MOST_SHOWN = 24
# Inches of the legend, and of the longer side of the image.
LEGEND, LONGER = 2.6, 6.0
# Letters of a title in an inch.
LETTERS = 6
Pixels = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Overlay:
    """An image and the class of every pixel.

    Args:
        model: Its name.
        file: The image's name.
        image: (h, w, 3) of bytes, or (h, w, 1).
        labels: The number of each pixel's class (h, w).
        classes: Names.
        colours: Theirs.
        probability: Mean over pixels of their class's probability.
    """

    model: str
    file: str
    image: Pixels
    labels: Pixels
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    probability: float

    def shares(self) -> list[float]:
        """Of the pixels, those of every class."""
        counts = np.bincount(self.labels.ravel(), minlength=len(self.classes))
        return (counts / max(1, self.labels.size)).tolist()


def overlay_figure(found: Overlay) -> Figure:
    """The image, the image under its classes' colours, and the legend with the classes' shares."""
    height, width = found.labels.shape
    scale = LONGER / max(height, width)
    tall, wide = max(2.4, height * scale), max(2.4, width * scale)
    figure = Figure(figsize=(2 * wide + LEGEND + 0.4, tall + 0.7), layout="constrained")
    axes: Any = figure.subplots(1, 3, gridspec_kw={"width_ratios": (wide, wide, LEGEND)})
    image = np.repeat(found.image, 3, axis=2) if found.image.shape[2] == 1 else found.image[..., :3]
    axes[0].imshow(image)
    titles(axes, wide, Path(found.file).name, found.model, f"mean probability {found.probability:.0%}")
    axes[1].imshow(blended(image, found))
    for ax in axes[:2]:
        ax.set_xticks([])
        ax.set_yticks([])
    axes[2].axis("off")
    shares = found.shares()
    shown = [i for i in sorted(range(len(shares)), key=lambda i: -shares[i]) if shares[i] > 0]
    handles = [
        Patch(
            facecolor=_shares_of(found.colours[i]),
            edgecolor="#444444",
            label=f"{found.classes[i]}  {shares[i]:.1%}",
        )
        for i in shown[:MOST_SHOWN]
    ]
    left_out = len(shown) - MOST_SHOWN
    note = f"share of the pixels{f'; {left_out} smaller classes not shown' if left_out > 0 else ''}"
    axes[2].legend(handles=handles, loc="upper left", frameon=False, fontsize=10, title=note, alignment="left",
                   borderaxespad=0.0)  # fmt: skip
    return figure


def titles(axes: Any, wide: float, file: str, model: str, words: str) -> None:
    """Titles over an image and over what a model says of it, in several lines where one has no room.

    Args:
        axes: The two, and the legend's.
        wide: Inches of each.
        file: The image's name.
        model: Its name.
        words: What it says.
    """
    room = int(wide * LETTERS)
    axes[0].set_title(shortened(file, room), fontsize=11)
    line = f"{model}: {words}"
    lines = [line] if len(line) <= room else [f"{shortened(model, room)}:", *wrap(words, room)]
    axes[1].set_title("\n".join(lines), fontsize=11)


def _shares_of(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


def blended(image: Pixels, found: Overlay) -> Pixels:
    """The image under its classes' colours, with a line where classes meet."""
    colours = np.array(found.colours, np.float64)[found.labels]
    mixed = (1 - OPACITY) * image + OPACITY * colours
    labels = found.labels
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    mixed[edge] = 0.35 * colours[edge]
    return mixed.round().clip(0, 255).astype(np.uint8)


def save_overlay(found: Overlay, folder: Path) -> Path:
    """Write NAME_overlay.png, the picture, and NAME_mask.png, the numbers of the classes with their colours.

    Returns:
        The picture's path.

    Raises:
        ConfigError: They cannot be written.
    """
    stem, drawn = Path(found.file).stem, BytesIO()
    overlay_figure(found).savefig(drawn, format="png", dpi=110)
    mask = Image.fromarray(found.labels.astype(np.uint8))
    mask.putpalette([value for colour in found.colours for value in colour])
    coded = BytesIO()
    mask.save(coded, "PNG")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}_mask.png").write_bytes(coded.getvalue())
        (folder / f"{stem}_overlay.png").write_bytes(drawn.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write in '{folder}': {error.strerror}; choose another folder with --out.") from error
    return folder / f"{stem}_overlay.png"
