"""The best and the worst cases of each class of a segmentation model as one page that can be sent on."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from selectra.report.read import whole

Pixels = np.ndarray[Any, Any]
# Of the classes' colours over the image, that of the class that a case is of, and that of the others.
STRONG, FAINT = 0.75, 0.25
# Pixels of the longer side of a picture in the page.
LONGER = 400
QUALITY = 82
WRONG, MISSED = (255, 40, 40), (255, 225, 0)


@dataclass(frozen=True)
class Picture:
    """An image with its true classes and those that a model found.

    Args:
        name: Of the image.
        image: (h, w, 3) of bytes.
        true: The number of each pixel's class (h, w), 255 where nothing counts.
        found: Likewise, by the model.
    """

    name: str
    image: Pixels
    true: Pixels
    found: Pixels


@dataclass(frozen=True)
class Case:
    """A picture, and the IoU of the class that it stands for in it."""

    picture: Picture
    iou: float


@dataclass(frozen=True)
class Cases:
    """What a page shows.

    Args:
        run: Name of the training.
        model: Name of the model.
        data: Name of the set.
        part: Of the set.
        images: In the part.
        miou: Mean IoU over the classes that occur.
        classes: Names.
        colours: Theirs.
        ious: Of each class over all images together; NaN where it does not occur.
        cases: The best and the worst cases of each class.
        least: Share of an image that a class has at least in a case.
    """

    run: str
    model: str
    data: str
    part: str
    images: int
    miou: float
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ious: tuple[float, ...]
    cases: tuple[tuple[tuple[Case, ...], tuple[Case, ...]], ...]
    least: float


def highlighted(
    image: Pixels, labels: Pixels, number: int, colours: tuple[tuple[int, int, int], ...], ignored: Pixels
) -> Pixels:
    """An image under its classes' colours, one class strong with a white border, others faint; grey where ignored."""
    palette = np.array([*colours, (128, 128, 128)], np.float64)
    shown = np.where(ignored, len(colours), np.minimum(labels, len(colours)))
    inside = (shown == number) & ~ignored
    opacity = np.where(inside, STRONG, FAINT)[..., None]
    mixed = (1 - opacity) * image + opacity * palette[shown]
    edge = np.zeros(inside.shape, bool)
    edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    edge[1:] |= inside[1:] != inside[:-1]
    mixed[edge] = 255
    return mixed.round().clip(0, 255).astype(np.uint8)


def compared(picture: Picture, number: int) -> Pixels:
    """The image in grey: green where the class was rightly found, red where it is not there, yellow where missed."""
    grey = np.repeat(picture.image.mean(2, keepdims=True), 3, 2) * 0.55 + 30
    counts = picture.true != 255
    true, found = (picture.true == number), (picture.found == number) & counts
    out = grey.copy()
    for where, colour in ((found & ~true, WRONG), (true & ~found, MISSED)):
        out[where] = 0.3 * grey[where] + 0.7 * np.array(colour)
    right = true & found
    out[right] = 0.35 * grey[right] + 0.65 * np.array((60, 200, 120))
    return out.round().clip(0, 255).astype(np.uint8)


def embedded(pixels: Pixels) -> str:
    """A picture as the source of an HTML image."""
    image, content = Image.fromarray(pixels), BytesIO()
    image.thumbnail((LONGER, LONGER))
    image.save(content, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + b64encode(content.getvalue()).decode()


def _panels(case: Case, number: int, found: Cases) -> dict[str, Any]:
    picture = case.picture
    ignored = picture.true == 255
    pictures = {
        "image": picture.image,
        "truth": highlighted(picture.image, picture.true, number, found.colours, ignored),
        "prediction": highlighted(picture.image, picture.found, number, found.colours, np.zeros_like(ignored)),
        "difference": compared(picture, number),
    }
    return {
        "name": PurePosixPath(picture.name).name,
        "iou": f"{case.iou:.2f}",
        "panels": [(title, embedded(pixels)) for title, pixels in pictures.items()],
    }


def page(found: Cases) -> str:
    """The page as HTML; everything is in it."""
    environment = Environment(
        loader=PackageLoader("selectra", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    classes = []
    for number, (name, colour, iou, (best, worst)) in enumerate(
        zip(found.classes, found.colours, found.ious, found.cases, strict=True)
    ):
        groups = [("Best", best), ("Worst", worst)]
        classes.append({
            "id": f"class-{number}", "name": name, "colour": "#{:02x}{:02x}{:02x}".format(*colour),
            "iou": "does not occur" if np.isnan(iou) else f"{iou:.3f}", "bar": 0 if np.isnan(iou) else round(100 * iou),
            "groups": [(title, [_panels(case, number, found) for case in cases]) for title, cases in groups if cases],
        })  # fmt: skip
    said = [entry for entry in zip(found.classes, found.ious, strict=True) if not np.isnan(entry[1])]
    low, high = min(said, key=lambda entry: entry[1]), max(said, key=lambda entry: entry[1])
    return environment.get_template("cases.html.jinja").render(
        run=found.run, model=found.model, data=PurePosixPath(found.data).name, part=found.part, images=found.images,
        miou=f"{found.miou:.3f}", low=(low[0], f"{low[1]:.2f}"), high=(high[0], f"{high[1]:.2f}"), classes=classes,
        least=f"{found.least:.1%}",
    )  # fmt: skip


def write_page(found: Cases, path: Path) -> None:
    """Write the page, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(page(found), encoding="utf-8")
