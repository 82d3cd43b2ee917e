"""The best and the worst images of each class of a detector as one page that can be sent on."""

from __future__ import annotations

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
# Of a box that was found and one that is there, over their union, from which on they are the same.
SAME = 0.5
RIGHT, WRONG, MISSED = (60, 200, 120), (255, 40, 40), (255, 225, 0)
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
    """

    boxes: Pixels
    labels: Pixels
    scores: Pixels
    counts: Pixels


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
        map50: Mean over the classes that occur of the average precision at half overlap.
        classes: Names.
        colours: Theirs.
        values: Of each class over all images together; NaN where it does not occur.
        cases: The best and the worst cases of each class.
        threshold: Least score of what is drawn; the average precision counts all.
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


def overlaps(first: Pixels, second: Pixels) -> Pixels:
    """Intersection over union of boxes (n, 4) and (m, 4), as (n, m)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inside = (high - low).clip(0).prod(2)
    areas = [(each[:, 2:] - each[:, :2]).prod(1) for each in (first, second)]
    return inside / np.maximum(areas[0][:, None] + areas[1][None] - inside, 1e-9)


def matched(true: Boxes, found: Boxes, number: int) -> tuple[Pixels, Pixels]:
    """Which of the found boxes of a class are right, and which true ones are found: surest first, each once."""
    rights = np.zeros(len(found.labels), bool)
    taken = np.zeros(len(true.labels), bool)
    shares = overlaps(found.boxes.astype(float), true.boxes.astype(float))
    for i in np.flatnonzero(found.labels == number):
        free = (true.labels == number) & true.counts & ~taken
        if free.any():
            best = int(np.where(free, shares[i], -1).argmax())
            if shares[i, best] >= SAME:
                rights[i] = taken[best] = True
    return rights, taken


def excused(true: Boxes, found: Boxes, number: int) -> Pixels:
    """Which of the found boxes of a class lie, by half of their own area, on one of its objects that does not count."""
    there = true.boxes[(true.labels == number) & ~true.counts].astype(float)
    boxes = found.boxes.astype(float)
    low = np.maximum(boxes[:, None, :2], there[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], there[None, :, 2:])
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    shares = (high - low).clip(0).prod(2) / np.maximum(areas, 1e-9)[:, None]
    return (found.labels == number) & (shares >= SAME).any(1)


def drawn(image: Pixels, lines: list[tuple[Pixels, tuple[int, int, int], int]]) -> Pixels:
    """The image in the page's size under boxes of some colour and width."""
    picture = Image.fromarray(image)
    scale = min(1.0, LONGER / max(picture.size))
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize((size[0], size[1]))
    pen = ImageDraw.Draw(picture)
    for box, colour, width in lines:
        left, top, right, bottom = (float(value) * scale for value in box)
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=width)
    return np.asarray(picture)


def _panels(case: ObjectCase, number: int, found: ObjectCases) -> dict[str, Any]:
    def own(boxes: Boxes) -> list[tuple[Pixels, tuple[int, int, int], int]]:
        # The class on top.
        order = sorted(range(len(boxes.labels)), key=lambda i: bool(boxes.labels[i] == number))
        width = {True: THICK, False: THIN}
        return [(boxes.boxes[i], found.colours[boxes.labels[i]], width[bool(boxes.labels[i] == number)]) for i in order]

    rights, taken = matched(case.true, case.found, number)
    missed = (case.true.labels == number) & case.true.counts & ~taken
    wrong = (case.found.labels == number) & ~rights & ~excused(case.true, case.found, number)
    difference = [(case.true.boxes[i], MISSED, THICK) for i in np.flatnonzero(missed)]
    difference += [(case.found.boxes[i], WRONG, THICK) for i in np.flatnonzero(wrong)]
    difference += [(case.found.boxes[i], RIGHT, THICK) for i in np.flatnonzero(rights)]
    grey = (np.repeat(case.image.mean(2, keepdims=True), 3, 2) * 0.6 + 30).astype(np.uint8)
    pictures = {
        "image": drawn(case.image, []),
        "truth": drawn(case.image, own(case.true)),
        "prediction": drawn(case.image, own(case.found)),
        "difference": drawn(grey, difference),
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
        threshold=f"{found.threshold:.0%}",
    )  # fmt: skip


def write_page(found: ObjectCases, path: Path) -> None:
    """Write the page, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(page(found), encoding="utf-8")
