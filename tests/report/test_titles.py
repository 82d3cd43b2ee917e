"""Names as long as people make them stay inside pictures, and off each other."""

from io import BytesIO
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from selectra.report.detected import Detected, detected_figure
from selectra.report.explanation import Explanation, Field, explanation_figure
from selectra.report.overlay import Overlay, overlay_figure
from selectra.report.titles import shortened

LONG = "a_photograph_with_a_rather_long_name_as_cameras_and_people_give_them_2026-11-23_at_07-02-11_final.png"
CLASS = "a disc that is filled with one colour and has no hole"
MODEL = "a_model_of_somebody_with_a_long_name_tiny"
COLOURS = ((200, 0, 0), (0, 200, 0))


def explanation() -> Figure:
    values = np.random.default_rng(0).uniform(0.1, 1, (64, 96))
    field = Field(values, (32.0, 48.0), (8, 12), {0.5: 0.1, 0.95: 0.3}, {0.5: 0.8, 0.95: 0.3})
    found = Explanation(
        MODEL, LONG, np.zeros((64, 96, 3)), (CLASS, "other"), (0.9, 0.1), CLASS, 0.9, values, field, None
    )
    return explanation_figure(found)


def overlay(size: tuple[int, int]) -> Figure:
    labels = np.zeros(size, np.uint8)
    return overlay_figure(Overlay(MODEL, LONG, np.zeros((*size, 3), np.uint8), labels, (CLASS, "other"), COLOURS, 0.5))


def detected(size: tuple[int, int]) -> Figure:
    boxes, labels, scores = np.array([[1.0, 1, 9, 9]]), np.array([0]), np.array([0.9])
    image = np.zeros((*size, 3), np.uint8)
    return detected_figure(Detected(MODEL, LONG, image, boxes, labels, scores, None, (CLASS, "other"), COLOURS, 0.5))


def boxes_of(figure: Figure) -> tuple[Any, list[Any]]:
    """The picture's rectangle and those of its titles."""
    figure.savefig(BytesIO(), format="png")
    own: Any = figure
    titles = [ax.title for ax in own.axes if ax.title.get_text()]
    head = own._suptitle  # pyright: ignore[reportAttributeAccessIssue]
    return figure.bbox, [text.get_window_extent() for text in [*titles, *([head] if head else [])]]


@pytest.mark.parametrize(
    "make",
    [
        explanation,
        lambda: overlay((48, 64)),
        lambda: overlay((200, 20)),
        lambda: detected((48, 64)),
        lambda: detected((200, 20)),
    ],
)
def test_titles_lie_in_the_picture_and_not_on_each_other(make: Any) -> None:
    whole, boxes = boxes_of(make())
    assert len(boxes) >= 2
    for i, box in enumerate(boxes):
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 and box.y1 <= whole.y1 + 1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_short_names_stay_and_long_ones_keep_both_ends() -> None:
    assert shortened("photo.png", 9) == "photo.png"
    assert shortened("photograph_2026.png", 12) == "photogra…png"
    assert shortened("photograph_2026.png", 12, tail=False) == "photograph_…"
    assert all(len(shortened(LONG, most)) == most for most in (4, 5, 20, 56))
