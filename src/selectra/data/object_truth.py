"""What is on an image: boxes, classes and masks of objects, and what may be wrong with them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Literal

import numpy as np

from selectra.data.vision import vision
from selectra.errors import DataError

Policy = Literal["refuse", "skip"]
Kind = Literal["degenerate", "unknown", "faulty"]
# A run-length encoding as COCO's tools have it, compressed: {"size": [height, width], "counts": bytes}.
Rle = dict[str, Any]
WHAT: dict[Kind, str] = {
    "degenerate": "such boxes",
    "unknown": "such annotations",
    "faulty": "such images and annotations",
}


@dataclass(frozen=True)
class Mark:
    """One annotated object.

    Args:
        box: Left, top, width and height in pixels.
        label: Number of its class.
        area: Pixels that it covers, by which metrics know small from large.
        crowd: A region of many, or an object that does not count: nothing learns from it, and finding it is no error.
        shape: Its mask as COCO has it (polygons, or a run-length encoding), or pixels (h, w); None without one.
    """

    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool = False
    shape: Any = None


@dataclass(frozen=True)
class Entry:
    """An image and what is annotated on it.

    Args:
        file: Its path inside.
        said: How messages name it: the file, and the image id where there is one.
        size: Height and width by the annotations; None where they do not say it.
        part: "train", "val" or "test".
        marks: Its objects.
    """

    file: str
    said: str
    size: tuple[int, int] | None
    part: str | None
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Truth:
    """What evaluation compares with, in the image's own pixels.

    Args:
        image: Number of the image in its set.
        size: Height and width.
        boxes: Left, top, width and height (n, 4), in float64.
        labels: Numbers of the classes (n,).
        areas: Pixels (n,).
        crowd: Whether nothing counts there (n,).
        masks: One for each; None where none are asked for.
    """

    image: int
    size: tuple[int, int]
    boxes: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    areas: np.ndarray[Any, Any]
    crowd: np.ndarray[Any, Any]
    masks: tuple[Rle, ...] | None = None


@dataclass
class Problems:
    """What to do with annotations that cannot be used: name the first and stop, or leave them out and count them.

    Args:
        policies: By the kind of problem.
        counts: How many of each were left out.
    """

    policies: dict[Kind, Policy]
    counts: Counter[str] = field(default_factory=Counter)

    def meet(self, kind: Kind, message: str) -> None:
        """One was met.

        Raises:
            DataError: Such ones are not to be skipped.
        """
        if self.policies[kind] == "refuse":
            raise DataError(f"{message} Correct it, or leave {WHAT[kind]} out with data.{kind}=skip.")
        self.counts[kind] += 1


def wrong_box(box: Sequence[float], size: tuple[int, int] | None) -> str | None:
    """Why a box (left, top, width, height) cannot be learned, in words; None for a good one."""
    if len(box) != 4 or not all(isinstance(value, (int, float)) and isfinite(value) for value in box):
        return f"is {list(box)}, not four numbers (left, top, width, height)"
    left, top, width, height = box
    shown = f"(left {left:g}, top {top:g}, width {width:g}, height {height:g})"
    if width <= 0 or height <= 0:
        return f"has no area {shown}"
    if size is not None and not (left < size[1] and top < size[0] and left + width > 0 and top + height > 0):
        return f"lies outside of the image {shown}, which is {size[1]} x {size[0]} pixels"
    return None


def encoded(shape: Any, size: tuple[int, int], said: str) -> Rle:
    """A mask as a compressed run-length encoding.

    Args:
        shape: Polygons as COCO has them, a run-length encoding whose counts are numbers (uncompressed) or text
            (compressed), or pixels.
        size: Height and width of the image.
        said: Of which annotation, for messages.

    Raises:
        DataError: It is none of these, or of another size.
    """
    coding = vision("faster_coco_eval.core.mask")
    if isinstance(shape, np.ndarray):
        return coding.encode(np.asfortranarray(shape.astype(np.uint8)))
    if isinstance(shape, dict) and "counts" in shape:
        if list(shape.get("size", ())) != list(size):
            raise DataError(f"{said}: the mask is of size {shape.get('size')}, and the image {list(size)}. Correct it.")
        counts = shape["counts"]
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1] or min(counts, default=0) < 0:
                raise DataError(
                    f"{said}: the mask's run lengths add up to {sum(counts)}, and the image has {size[0] * size[1]} "
                    "pixels; the annotation is damaged. Correct it."
                )
            return coding.frPyObjects(shape, *size)
        return {"size": list(size), "counts": counts.encode() if isinstance(counts, str) else counts}
    if isinstance(shape, list) and shape and all(isinstance(part, list) and len(part) >= 6 for part in shape):
        return coding.merge(coding.frPyObjects(shape, *size))
    raise DataError(
        f"{said}: the mask is no list of polygons with three corners or more, and no run-length encoding: "
        f"{str(shape)[:60]}. Correct it, or leave masks out with data.masks=false."
    )


def truth_of(entry: Entry, number: int, size: tuple[int, int], masks: bool) -> Truth:
    """An entry in arrays.

    Raises:
        DataError: A mask is asked for that is not there or damaged.
    """
    marks = entry.marks
    shapes: list[Rle] = []
    for mark in marks if masks else ():
        if mark.shape is None:
            raise DataError(
                f"{entry.said} has an object without a mask, and data.masks=true asks for masks: add it, or train a "
                "detector of boxes with data.masks=false."
            )
        shapes.append(encoded(mark.shape, size, entry.said))
    return Truth(
        number,
        size,
        np.array([mark.box for mark in marks], np.float64).reshape(-1, 4),
        np.array([mark.label for mark in marks], np.int64),
        np.array([mark.area for mark in marks], np.float64),
        np.array([mark.crowd for mark in marks], bool),
        tuple(shapes) if masks else None,
    )
