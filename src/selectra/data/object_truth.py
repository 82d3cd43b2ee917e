"""What is on an image: boxes, classes and masks of objects, and what may be wrong with them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from selectra.data.vision import vision
from selectra.errors import DataError

Policy = Literal["refuse", "skip"]
Kind = Literal["degenerate", "unknown", "faulty"]
# Pixels beyond which no corner of a mask lies: drawing takes memory by the length of its sides.
FARTHEST = 1e5
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
        crowd: A region of many: nothing learns from it, and whatever is found inside of it is no error.
        shape: Its mask as COCO has it (polygons, or a run-length encoding), or pixels (h, w); None without one.
        said: How messages name it.
        ignored: An object that does not count: nothing learns from it, and finding it once is no error.
    """

    box: tuple[float, float, float, float]
    label: int
    area: float
    crowd: bool = False
    shape: Any = None
    said: str = "an object"
    ignored: bool = False


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
        crowd: Whether nothing counts there: a crowd, or an object that is ignored (n,).
        masks: One for each; None where none are asked for.
        ignored: Which of these are no crowds, but single objects (n,); None where all are crowds.
    """

    image: int
    size: tuple[int, int]
    boxes: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    areas: np.ndarray[Any, Any]
    crowd: np.ndarray[Any, Any]
    masks: tuple[Rle, ...] | None = None
    ignored: np.ndarray[Any, Any] | None = None


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


def is_finite(value: Any) -> bool:
    """Whether a value is a number that fits into a float; JSON's whole numbers may be of any length."""
    # Not true of NaN.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def wrong_box(box: Sequence[float], size: tuple[int, int] | None) -> str | None:
    """Why a box (left, top, width, height) cannot be learned, in words; None for a good one."""
    if len(box) != 4 or not all(is_finite(value) for value in box):
        return f"is {list(box)}, not four numbers (left, top, width, height)"
    left, top, width, height = box
    shown = f"(left {left:g}, top {top:g}, width {width:g}, height {height:g})"
    if width <= 0 or height <= 0:
        return f"has no area {shown}"
    if size is not None and not (left < size[1] and top < size[0] and left + width > 0 and top + height > 0):
        return f"lies outside of the image {shown}, which is {size[1]} x {size[0]} pixels"
    return None


def wrong_mask(shape: Any, size: tuple[int, int]) -> str | None:
    """Why a mask, in a form that `encoded` takes, is none of an image of this height and width; None for a good one."""
    if isinstance(shape, np.ndarray):
        return None if shape.shape == size else f"has pixels of the form {shape.shape}, and the image {size}"
    if isinstance(shape, dict) and "counts" in shape:
        if shape.get("size") != list(size):
            return f"is of size {shape.get('size')}, and the image of {list(size)}"
        return _wrong_counts(shape["counts"], size)
    return _wrong_polygons(shape)


def _wrong_polygons(shape: Any) -> str | None:
    polygons = shape if isinstance(shape, list) else []
    if not polygons or not all(isinstance(part, list) and len(part) >= 6 for part in polygons):
        return f"is no list of polygons with three corners or more, and no run-length encoding: {str(shape)[:60]}"
    odd = next((part for part in polygons if len(part) % 2), None)
    if odd is not None:
        return f"has a polygon of {len(odd)} numbers; corners are pairs, so that they are even"
    for value in (value for part in polygons for value in part):
        # Not true of NaN either.
        if not (isinstance(value, (int, float)) and abs(value) <= FARTHEST):
            return f"has a corner at {str(value)[:20]}; corners are finite numbers of at most {FARTHEST:,.0f} pixels"
    return None


def _wrong_counts(counts: Any, size: tuple[int, int]) -> str | None:
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            return "has run lengths that are no whole numbers from 0 on"
        whole = size[0] * size[1]
        short = f"has run lengths that add up to {sum(counts)}, and the image has {whole} pixels"
        return None if sum(counts) == whole else short
    if not isinstance(counts, (str, bytes)):
        return f"has run lengths that are neither numbers nor text: {str(counts)[:40]}"
    try:
        vision("faster_coco_eval.core.mask").decode({"size": list(size), "counts": _coded(counts)})
    except (ValueError, RuntimeError, TypeError) as error:
        return f"has run lengths that cannot be decoded: {error}"
    return None


def _coded(counts: str | bytes) -> bytes:
    return counts.encode() if isinstance(counts, str) else counts


def encoded(shape: Any, size: tuple[int, int]) -> Rle:
    """A mask that `wrong_mask` finds good as a compressed run-length encoding.

    Args:
        shape: Polygons as COCO has them, a run-length encoding whose counts are numbers (uncompressed) or text
            (compressed), or pixels.
        size: Height and width of the image.
    """
    coding = vision("faster_coco_eval.core.mask")
    if isinstance(shape, np.ndarray):
        return coding.encode(np.asfortranarray(shape.astype(np.uint8)))
    if isinstance(shape, dict) and not isinstance(shape["counts"], list):
        return {"size": list(size), "counts": _coded(shape["counts"])}
    found = coding.frPyObjects(shape, *size)
    return coding.merge(found) if isinstance(shape, list) else found


def check_masks(entry: Entry, size: tuple[int, int]) -> None:
    """Every object of an entry has a mask of an image of this height and width.

    Raises:
        DataError: One has none, or a damaged one.
    """
    for mark in entry.marks:
        if mark.shape is None:
            raise DataError(
                f"{entry.said}: {mark.said} has no mask, and data.masks=true asks for masks: add it, or train a "
                "detector of boxes with data.masks=false."
            )
        wrong = wrong_mask(mark.shape, size)
        if wrong is not None:
            raise DataError(
                f"{entry.said}: the mask of {mark.said} {wrong}. Correct it, or leave masks out with data.masks=false."
            )


def truth_of(entry: Entry, number: int, size: tuple[int, int], masks: bool) -> Truth:
    """An entry in arrays; with masks, of one whose masks `check_masks` has seen."""
    marks = entry.marks
    return Truth(
        number,
        size,
        np.array([mark.box for mark in marks], np.float64).reshape(-1, 4),
        np.array([mark.label for mark in marks], np.int64),
        np.array([mark.area for mark in marks], np.float64),
        np.array([mark.crowd or mark.ignored for mark in marks], bool),
        tuple(encoded(mark.shape, size) for mark in marks) if masks else None,
        np.array([mark.ignored for mark in marks], bool),
    )
