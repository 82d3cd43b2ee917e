"""The clips of each class that a model is surest and least sure of, as one page that can be sent on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from selectra.report.cases import embedded
from selectra.report.read import whole


@dataclass(frozen=True)
class ClipCase:
    """A video by some frames of a clip of it, and what a model takes it for.

    Args:
        name: Of the video.
        frames: (k, h, w, 3) of bytes, as the model sees them.
        numbers: Of these frames in the clip, from 1.
        found: The likeliest class.
        probability: Of the likeliest class.
        own: Probability of the true class.
    """

    name: str
    frames: np.ndarray[Any, Any]
    numbers: tuple[int, ...]
    found: str
    probability: float
    own: float


@dataclass(frozen=True)
class ClipCases:
    """What a page shows.

    Args:
        run: Name of the training.
        model: Name of the model.
        data: Name of the set.
        part: Of the set.
        clip: Frames of a clip.
        classes: Names.
        confusion: How many videos of each class (row) were taken for each class (column).
        cases: The best and the worst cases of each class.
    """

    run: str
    model: str
    data: str
    part: str
    clip: int
    classes: tuple[str, ...]
    confusion: np.ndarray[Any, Any]
    cases: tuple[tuple[tuple[ClipCase, ...], tuple[ClipCase, ...]], ...]


def _shown(case: ClipCase, name: str) -> dict[str, Any]:
    return {
        "name": PurePosixPath(case.name).name,
        "correct": case.found == name,
        "found": case.found,
        "probability": f"{case.probability:.1%}",
        "own": f"{case.own:.1%}",
        "panels": [(f"frame {i}", embedded(frame)) for i, frame in zip(case.numbers, case.frames, strict=True)],
    }


def _taken_for(row: np.ndarray[Any, Any], number: int, classes: tuple[str, ...]) -> str:
    """The wrong class that a class is most often taken for, and how often."""
    wrong = np.where(np.arange(len(row)) == number, 0, row)
    return f"{classes[int(wrong.argmax())]} ({wrong.max():,})" if wrong.any() else "-"


def page(found: ClipCases) -> str:
    """The page as HTML; everything is in it."""
    environment = Environment(
        loader=PackageLoader("selectra", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    counts = found.confusion.sum(1)
    shares = np.diag(found.confusion) / np.maximum(1, counts)
    classes = []
    for number, (name, (best, worst)) in enumerate(zip(found.classes, found.cases, strict=True)):
        groups = [("Best", best), ("Worst", worst)]
        classes.append({
            "id": f"class-{number}", "name": name, "count": f"{counts[number]:,}",
            "share": f"{shares[number]:.1%}" if counts[number] else "does not occur",
            "bar": round(100 * shares[number]), "taken": _taken_for(found.confusion[number], number, found.classes),
            "groups": [(title, [_shown(case, name) for case in cases]) for title, cases in groups if cases],
        })  # fmt: skip
    there = np.flatnonzero(counts)
    low, high = ((found.classes[i], f"{shares[i]:.0%}") for i in (there[shares[there].argmin()],
                                                                 there[shares[there].argmax()]))  # fmt: skip
    return environment.get_template("clip_cases.html.jinja").render(
        run=found.run, model=found.model, data=PurePosixPath(found.data).name, part=found.part,
        videos=f"{counts.sum():,}", clip=found.clip, low=low, high=high, classes=classes,
        top1=f"{np.trace(found.confusion) / counts.sum():.1%}",
    )  # fmt: skip


def write_page(found: ClipCases, path: Path) -> None:
    """Write the page, whole or not at all."""
    with whole(path) as partial:
        partial.write_text(page(found), encoding="utf-8")
