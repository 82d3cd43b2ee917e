"""A picture of the objects that were found on an image: boxes, masks, names and scores, beside a legend."""

from __future__ import annotations

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke

from selectra.errors import ConfigError
from selectra.report.overlay import LEGEND, LONGER, MOST_SHOWN, titles

Pixels = np.ndarray[Any, Any]
# Of a mask's colour over the image.
OPACITY = 0.45
# Objects whose names are written beside them; where there are more, colours and the legend say it.
MOST_NAMED = 40
# Sum of red, green and blue in shares from which on a colour is light.
LIGHT = 1.5


@dataclass(frozen=True)
class Detected:
    """An image and the objects found on it, surest first.

    Args:
        model: Its name.
        file: The image's name.
        image: (h, w, 3) of bytes, or (h, w, 1).
        boxes: Left, top, right, bottom in pixels (n, 4).
        labels: Numbers of their classes (n,).
        scores: From 0 to 1 (n,).
        masks: Of bool (n, h, w); None of a model without.
        classes: Names.
        colours: Theirs.
        threshold: Least score of what is shown.
    """

    model: str
    file: str
    image: Pixels
    boxes: Pixels
    labels: Pixels
    scores: Pixels
    masks: Pixels | None
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    threshold: float

    def counts(self) -> list[int]:
        """Of the objects, those of every class."""
        return np.bincount(self.labels, minlength=len(self.classes)).tolist()

    def to_json(self) -> list[dict[str, Any]]:
        """Every object as a dictionary."""
        return [
            {
                "class": self.classes[label],
                "score": round(float(score), 6),
                "box": [round(float(value), 3) for value in box],
            }
            for box, label, score in zip(self.boxes, self.labels, self.scores, strict=True)
        ]


def detected_figure(found: Detected) -> Figure:
    """The image, the image with its objects, and the legend with their numbers."""
    height, width = found.image.shape[:2]
    scale = LONGER / max(height, width)
    tall, wide = max(2.4, height * scale), max(2.4, width * scale)
    figure = Figure(figsize=(2 * wide + LEGEND + 0.4, tall + 0.7), layout="constrained")
    axes: Any = figure.subplots(1, 3, gridspec_kw={"width_ratios": (wide, wide, LEGEND)})
    image = np.repeat(found.image, 3, axis=2) if found.image.shape[2] == 1 else found.image[..., :3]
    axes[0].imshow(image)
    axes[1].imshow(masked(image, found))
    count = len(found.labels)
    words = f"{count} object{'' if count == 1 else 's'} from {found.threshold:.0%}"
    titles(axes, wide, Path(found.file).name, found.model, words)
    _draw(axes[1], found)
    for ax in axes[:2]:
        ax.set_xticks([])
        ax.set_yticks([])
        ax.set_xlim(-0.5, width - 0.5)
        ax.set_ylim(height - 0.5, -0.5)
    axes[2].axis("off")
    _legend(axes[2], found)
    return figure


def _draw(ax: Any, found: Detected) -> None:
    """Boxes, surest on top, with class and score at their upper left corner."""
    named = len(found.labels) <= MOST_NAMED
    for i in reversed(range(len(found.labels))):
        left, top, right, bottom = (float(value) for value in found.boxes[i])
        colour = shares(found.colours[found.labels[i]])
        # A light line around a dark one, and the other way round, so that it shows on any image.
        around = withStroke(linewidth=3.2, foreground="black" if sum(colour) > LIGHT else "white")
        ax.add_patch(
            Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor=colour, linewidth=1.6,
                      path_effects=[around])
        )  # fmt: skip
        if named:
            ax.text(
                left, max(top, 0), f"{found.classes[found.labels[i]]} {found.scores[i]:.2f}", fontsize=8, va="top",
                color="black" if sum(colour) > LIGHT else "white", clip_on=True,
                bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
            )  # fmt: skip


def _legend(ax: Any, found: Detected) -> None:
    counts = found.counts()
    shown = [i for i in sorted(range(len(counts)), key=lambda i: -counts[i]) if counts[i]]
    handles = []
    for i in shown[:MOST_SHOWN]:
        scores = found.scores[found.labels == i]
        among = f"{scores.max():.2f}" if counts[i] == 1 else f"{scores.min():.2f} to {scores.max():.2f}"
        label = f"{found.classes[i]}  {counts[i]}  ({among})"
        handles.append(Patch(facecolor=shares(found.colours[i]), edgecolor="#444444", label=label))
    left_out = len(shown) - MOST_SHOWN
    note = f"objects and their scores{f'; {left_out} rarer classes not shown' if left_out > 0 else ''}"
    if not handles:
        note = "nothing found"
    ax.legend(handles=handles, loc="upper left", frameon=False, fontsize=10, title=note, alignment="left",
              borderaxespad=0.0)  # fmt: skip


def shares(colour: tuple[int, int, int]) -> tuple[float, float, float]:
    """A colour in shares of 255."""
    return colour[0] / 255, colour[1] / 255, colour[2] / 255


def masked(image: Pixels, found: Detected) -> Pixels:
    """The image under its objects' masks, surest on top."""
    mixed = image.astype(np.float64)
    for i in reversed(range(len(found.labels) if found.masks is not None else 0)):
        assert found.masks is not None
        inside = found.masks[i]
        mixed[inside] = (1 - OPACITY) * image[inside] + OPACITY * np.array(found.colours[found.labels[i]], np.float64)
    return mixed.round().clip(0, 255).astype(np.uint8)


def save_detected(found: Detected, folder: Path) -> Path:
    """Write NAME_overlay.png, the picture, and NAME_objects.json, the objects.

    Returns:
        The picture's path.

    Raises:
        ConfigError: They cannot be written.
    """
    stem, drawn = Path(found.file).stem, BytesIO()
    detected_figure(found).savefig(drawn, format="png", dpi=110)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{stem}_objects.json").write_text(json.dumps(found.to_json(), indent=1) + "\n")
        (folder / f"{stem}_overlay.png").write_bytes(drawn.getvalue())
    except OSError as error:
        raise ConfigError(f"cannot write in '{folder}': {error.strerror}; choose another folder with --out.") from error
    return folder / f"{stem}_overlay.png"
