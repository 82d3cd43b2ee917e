"""The best and the worst images of each class of a detector as one page that can be sent on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw

from selectra.errors import ConfigError
from selectra.report.cases import LONGER, embedded
from selectra.report.read import whole

Pixels = np.ndarray[Any, Any]
Colour = tuple[int, int, int]
# Of a box that was found and one that is there, over their union, from which on they are the same.
SAME = 0.5
RIGHT, WRONG, MISSED = (60, 200, 120), (255, 40, 40), (255, 225, 0)
# Of a mask's colour over the image.
OPACITY = 0.45
# Lines of the class that a case is of, and of others.
THICK, THIN = 3, 1


@dataclass(frozen=True)
class Boxes:
    """Objects on an image.

    Args:
        boxes: Left, top, right, bottom in pixels (n, 4).
        labels: Numbers of their classes (n,).
        scores: Of what was found, surest first (n,); ones for what is there.
        counts: Whether finding it counts (n,).
        masks: Of bool (n, h, w), by which right and wrong are told then; None of a model of boxes.
    """

    boxes: Pixels
    labels: Pixels
    scores: Pixels
    counts: Pixels
    masks: Pixels | None = None


@dataclass(frozen=True)
class ObjectCase:
    """An image, what is there and what was found, and the average precision at half overlap of a class in it."""

    name: str
    image: Pixels
    true: Boxes
    found: Boxes
    value: float


@dataclass(frozen=True)
class ObjectCases:
    """What a page shows.

    Args:
        run: Name of the training.
        model: Name of the model.
        data: Name of the set.
        part: Of the set.
        images: In the part.
        map50: Mean over the classes that occur of the average precision at half overlap, of masks where there are such.
        classes: Names.
        colours: Theirs.
        values: Of each class over all images together; NaN where it does not occur.
        cases: The best and the worst cases of each class.
        threshold: Least score of what is drawn; the average precision counts all.
        masks: Whether overlaps are those of masks.
    """

    run: str
    model: str
    data: str
    part: str
    images: int
    map50: float
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    values: tuple[float, ...]
    cases: tuple[tuple[tuple[ObjectCase, ...], tuple[ObjectCase, ...]], ...]
    threshold: float
    masks: bool = False


def overlaps(first: Pixels, second: Pixels) -> Pixels:
    """Intersection over union of boxes (n, 4) and (m, 4), as (n, m)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inside = (high - low).clip(0).prod(2)
    areas = [(each[:, 2:] - each[:, :2]).prod(1) for each in (first, second)]
    return inside / np.maximum(areas[0][:, None] + areas[1][None] - inside, 1e-9)


def _shared(first: Pixels, second: Pixels) -> Pixels:
    """Pixels that masks (n, h, w) and (m, h, w) share, as (n, m)."""
    return np.tensordot(first.astype(np.float32), second.astype(np.float32), ((1, 2), (1, 2)))


def _alike(found: Boxes, true: Boxes) -> Pixels:
    """Intersection over union, of masks where both have them."""
    if found.masks is None or true.masks is None:
        return overlaps(found.boxes.astype(float), true.boxes.astype(float))
    inside = _shared(found.masks, true.masks)
    areas = [each.sum((1, 2)) for each in (found.masks, true.masks)]
    return inside / np.maximum(areas[0][:, None] + areas[1][None] - inside, 1e-9)


def matched(true: Boxes, found: Boxes, number: int) -> tuple[Pixels, Pixels]:
    """Which of the found boxes of a class are right, and which true ones are found: surest first, each once."""
    rights = np.zeros(len(found.labels), bool)
    taken = np.zeros(len(true.labels), bool)
    shares = _alike(found, true)
    for i in np.flatnonzero(found.labels == number):
        free = (true.labels == number) & true.counts & ~taken
        if free.any():
            best = int(np.where(free, shares[i], -1).argmax())
            if shares[i, best] >= SAME:
                rights[i] = taken[best] = True
    return rights, taken


def excused(true: Boxes, found: Boxes, number: int) -> Pixels:
    """Which of the found boxes of a class lie, by half of their own area, on one of its objects that does not count."""
    others = (true.labels == number) & ~true.counts
    if found.masks is not None and true.masks is not None:
        inside = _shared(found.masks, true.masks[others]) / np.maximum(found.masks.sum((1, 2)), 1e-9)[:, None]
        return (found.labels == number) & (inside >= SAME).any(1)
    there = true.boxes[others].astype(float)
    boxes = found.boxes.astype(float)
    low = np.maximum(boxes[:, None, :2], there[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], there[None, :, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    shares = (high - low).clip(0).prod(2) / np.maximum(areas, 1e-9)[:, None]
    return (found.labels == number) & (shares >= SAME).any(1)


def drawn(
    image: Pixels, lines: list[tuple[Pixels, Colour, int]], masks: Sequence[tuple[Pixels, Colour]] = ()
) -> Pixels:
    """The image in the page's size under masks of some colour, and boxes of some colour and width.

    Small images are made larger by a whole factor before, so that lines do not cover what they surround.
    """
    mixed = image.astype(np.float32)
    for inside, colour in masks:
        mixed[inside] = (1 - OPACITY) * mixed[inside] + OPACITY * np.array(colour, np.float32)
    picture = Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))
    longer = max(picture.size)
    scale = LONGER / longer if longer > LONGER else LONGER // longer
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((size[0], size[1]), Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for box, colour, width in lines:
        left, top, right, bottom = (float(value) * scale for value in box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
    return np.asarray(picture)


def _picked(boxes: Boxes, rows: Pixels, colour: Colour) -> list[tuple[Pixels, Colour]]:
    """The masks of some objects, all in one colour."""
    return [] if boxes.masks is None else [(boxes.masks[i], colour) for i in np.flatnonzero(rows)]


def _own(image: Pixels, boxes: Boxes, number: int, colours: tuple[Colour, ...]) -> Pixels:
    """The image under all objects in the colours of their classes, one class on top, with its masks."""
    order = sorted(range(len(boxes.labels)), key=lambda i: bool(boxes.labels[i] == number))
    width = {True: THICK, False: THIN}
    lines = [(boxes.boxes[i], colours[boxes.labels[i]], width[bool(boxes.labels[i] == number)]) for i in order]
    return drawn(image, lines, _picked(boxes, boxes.labels == number, colours[number]))


def _panels(case: ObjectCase, number: int, found: ObjectCases) -> dict[str, Any]:
    rights, taken = matched(case.true, case.found, number)
    missed = (case.true.labels == number) & case.true.counts & ~taken
    wrong = (case.found.labels == number) & ~rights & ~excused(case.true, case.found, number)
    told = [(case.true, missed, MISSED), (case.found, wrong, WRONG), (case.found, rights, RIGHT)]
    difference = [(boxes.boxes[i], colour, THICK) for boxes, rows, colour in told for i in np.flatnonzero(rows)]
    masks = [mask for boxes, rows, colour in told for mask in _picked(boxes, rows, colour)]
    grey = (np.repeat(case.image.mean(2, keepdims=True), 3, 2) * 0.6 + 30).astype(np.uint8)
    pictures = {
        "image": drawn(case.image, []),
        "truth": _own(case.image, case.true, number, found.colours),
        "prediction": _own(case.image, case.found, number, found.colours),
        "difference": drawn(grey, difference, masks),
    }
    said = f"{rights.sum()} right, {wrong.sum()} not there, {missed.sum()} missed"
    return {
        "name": PurePosixPath(case.name).name,
        "value": f"{case.value:.2f}",
        "said": said,
        "panels": [(title, embedded(pixels)) for title, pixels in pictures.items()],
    }


def page(found: ObjectCases) -> str:
    """The page as HTML; everything is in it.

    Raises:
        ConfigError: No image of the part has an object that counts.
    """
    if np.isnan(found.values).all():
        raise ConfigError(
            f"no image of the part '{found.part}' of '{found.data}' has an object that counts, so that no class has a "
            "best or worst image: a page needs a part with annotated objects."
        )
    environment = Environment(
        loader=PackageLoader("selectra", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    classes = []
    for number, (name, colour, value, (best, worst)) in enumerate(
        zip(found.classes, found.colours, found.values, found.cases, strict=True)
    ):
        if np.isnan(value):
            continue
        groups = [("Best", best), ("Worst", worst)]
        classes.append({
            "id": f"class-{number}", "name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour),
            "value": f"{value:.3f}", "bar": round(100 * value),
            "groups": [(title, [_panels(case, number, found) for case in cases]) for title, cases in groups if cases],
        })  # fmt: skip
    said = [entry for entry in zip(found.classes, found.values, strict=True) if not np.isnan(entry[1])]
    low, high = min(said, key=lambda entry: entry[1]), max(said, key=lambda entry: entry[1])
    return environment.get_template("object_cases.html.jinja").render(
        run=found.run, model=found.model, data=PurePosixPath(found.data).name, part=found.part, images=found.images,
        map50=f"{found.map50:.3f}", low=(low[0], f"{low[1]:.2f}"), high=(high[0], f"{high[1]:.2f}"), classes=classes,
        threshold=f"{found.threshold:.0%}", masks=found.masks,
    )  # fmt: skip


def write_page(found: ObjectCases, path: Path) -> None:
    """Write the page, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(page(found), encoding="utf-8")
