"""The best and worst images of each class of a trained detector."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from selectra.classifier import object_cases
from selectra.cli import app
from selectra.errors import ConfigError
from selectra.report.object_cases import (
    RIGHT,
    WRONG,
    Boxes,
    ObjectCase,
    ObjectCases,
    drawn,
    excused,
    matched,
    overlaps,
    page,
)

RUN = CliRunner()
COLOURS = ((200, 0, 0), (0, 200, 0))


def boxes(corners, labels, counts=None):
    return Boxes(np.array(corners, float).reshape(-1, 4), np.array(labels, int), np.ones(len(labels)),
                 np.array(counts or [True] * len(labels), bool))  # fmt: skip


def test_overlaps_are_areas_shared():
    first, second = np.array([[0.0, 0, 10, 10]]), np.array([[5.0, 0, 15, 10], [20, 20, 30, 30], [0, 0, 10, 10]])
    assert np.allclose(overlaps(first, second), [[1 / 3, 0, 1]])
    assert overlaps(np.zeros((0, 4)), second).shape == (0, 3)


def test_each_true_box_is_found_once_and_surest_first():
    true = boxes(
        [[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]], [0, 0, 1, 0], [True, True, True, False]
    )
    found = boxes([[0, 0, 10, 9], [0, 0, 10, 10], [40, 0, 50, 10], [60, 0, 70, 10]], [0, 0, 0, 0])
    rights, taken = matched(true, found, 0)
    # The second lies on the same object, the third on another class; the fourth, on what does not count, is no gain and
    # no error.
    assert excused(true, found, 0).tolist() == [False, False, False, True]
    assert rights.tolist() == [True, False, False, False] and taken.tolist() == [True, False, False, False]
    assert matched(true, boxes([], []), 1)[1].tolist() == [False] * 4


def test_what_lies_in_a_region_that_does_not_count_is_no_error():
    true = boxes([[0, 0, 10, 10], [20, 0, 60, 40]], [0, 0], [True, False])
    # Right, inside, most of it inside, a quarter inside, inside but of another class, and beside.
    corners = [[0, 0, 10, 10], [30, 10, 35, 15], [55, 0, 62, 10], [57, 10, 69, 20], [30, 10, 35, 15], [70, 0, 80, 10]]
    found = boxes(corners, [0, 0, 0, 0, 1, 0])
    assert excused(true, found, 0).tolist() == [False, True, True, False, False, False]
    assert not excused(true, found, 1).any() and not excused(boxes([], []), found, 0).any()
    one = ObjectCase("b.png", np.full((40, 80, 3), 90, np.uint8), true, found, 0.5)
    text = page(ObjectCases("run", "m", "d", "test", 3, 0.4, ("a", "b"), COLOURS, (0.4, float("nan")),
                            (((one,), ()), ((), ())), 0.5))  # fmt: skip
    assert "1 right, 2 not there, 0 missed" in text


def test_a_part_without_objects_that_count_is_said():
    none = ObjectCases("run", "m", "d", "val", 3, float("nan"), ("a", "b"), COLOURS, (float("nan"),) * 2,
                       (((), ()), ((), ())), 0.5)  # fmt: skip
    with pytest.raises(ConfigError, match="no image of the part 'val' of 'd' has an object that counts"):
        page(none)


def test_boxes_are_drawn_where_they_are_in_the_pages_size():
    image = np.full((400, 800, 3), 100, np.uint8)
    shown = drawn(image, [(np.array([200.0, 100, 400, 300]), RIGHT, 3), (np.array([0.0, 0, 100, 100]), WRONG, 1)])
    assert shown.shape == (200, 400, 3)
    assert shown[100, 101].tolist() == list(RIGHT) and shown[52, 150].tolist() == list(RIGHT)
    assert shown[100, 150].tolist() == [100] * 3 and shown[0, 20].tolist() == list(WRONG)


def test_lines_on_a_small_image_leave_what_they_surround():
    image, mask = np.full((48, 64, 3), 100, np.uint8), np.zeros((48, 64), bool)
    mask[10:30, 10:30] = True
    shown = drawn(image, [(np.array([10.0, 10, 30, 30]), RIGHT, 3)], [(mask, (200, 0, 100))])
    assert shown.shape == (288, 384, 3)
    inside = shown[60:180, 60:180]
    assert inside[0, 0].tolist() == inside[2, 60].tolist() == list(RIGHT)
    assert (inside[3:-3, 3:-3] == [145, 55, 100]).all() and shown[59, 60].tolist() == [100] * 3


def test_the_page_holds_everything_and_escapes_names():
    one = ObjectCase("a/b.png", np.full((40, 60, 3), 90, np.uint8), boxes([[1, 2, 30, 30]], [0]),
                     boxes([[2, 2, 30, 31], [40, 0, 50, 10]], [0, 0]), 0.25)  # fmt: skip
    found = ObjectCases("run", "m", "d", "test", 3, 0.4, ("a<b", "absent"), COLOURS, (0.4, float("nan")),
                        (((one,), (one,)), ((), ())), 0.5)  # fmt: skip
    text = page(found)
    assert text.count("data:image/jpeg;base64,") == 8 and "a&lt;b" in text and "a<b" not in text
    assert "1 right, 1 not there, 0 missed" in text and "absent" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_masks_tell_right_from_wrong_where_there_are_such():
    """Two objects of one box: the upper and the lower half of it."""
    upper, lower = np.zeros((2, 10, 10), bool)
    upper[:5], lower[5:] = True, True
    corners = [[0, 0, 10, 10]]
    true, same = (replace(boxes(corners, [0]), masks=upper[None]) for _ in range(2))
    other = replace(same, masks=lower[None])
    assert matched(true, same, 0)[0].tolist() == [True] and matched(true, other, 0)[0].tolist() == [False]
    assert matched(replace(true, masks=None), other, 0)[0].tolist() == [True]
    crowd = replace(boxes(corners, [0], [False]), masks=upper[None])
    assert excused(crowd, same, 0).tolist() == [True] and excused(crowd, other, 0).tolist() == [False]
    shown = drawn(np.full((10, 10, 3), 100, np.uint8), [], [(upper, (200, 0, 100))])
    assert shown[0, 0].tolist() == [145, 55, 100] and shown[-1, -1].tolist() == [100] * 3


def test_a_training_with_masks_is_ranked_by_them(tmp_path, monkeypatch):
    words = ["train", "mask_rcnn_smoke", "train.steps=2", "train.batch_size=4", "train.device=cpu", "data.test=0.05"]
    out = tmp_path / "run"
    assert RUN.invoke(app, [*words, "data.masks=true", "--out", str(out)]).exit_code == 0
    monkeypatch.setattr(object_cases, "SHOWN", 0.0)
    metrics = {"map50": 0.9, "mask_map50": 0.1, **{f"mask_map50 {name}": 0.1 for name in ("disc", "ring")}}
    found = object_cases.object_cases_of(out, "test", metrics)
    assert found.masks and found.map50 == 0.1 and np.nansum(found.values) == pytest.approx(0.2)
    cases = [case for pair in found.cases for each in pair for case in each]
    assert cases
    # With such a threshold every class is found everywhere: worst where it is not.
    absent = [case for number, (_, worst) in enumerate(found.cases) for case in worst
              if not (case.true.labels == number).any()]  # fmt: skip
    assert absent and {case.value for case in absent} == {0.0}
    for case in cases:
        for side in (case.true, case.found):
            assert side.masks is not None and side.masks.shape == (len(side.labels), *case.image.shape[:2])
        masks: Any = case.true.masks
        for box, mask in zip(case.true.boxes, masks, strict=True):
            rows, columns = np.nonzero(mask)
            assert np.allclose([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], box, atol=1)
    text = page(found)
    assert "Average precision of masks at half overlap 0.100" in text and "Masks and boxes of scores" in text


def test_an_evaluated_training_gets_its_page(tmp_path):
    words = ["train", "retinanet_smoke", "train.steps=2", "train.batch_size=4", "train.device=cpu", "data.test=0.05"]
    assert RUN.invoke(app, [*words, "--out", str(tmp_path / "run")]).exit_code == 0
    found = RUN.invoke(app, ["eval", str(tmp_path / "run"), "--page"])
    assert found.exit_code == 0 and "test_cases.html" in found.output.replace("\n", "")
    text = (tmp_path / "run" / "test_cases.html").read_text()
    assert "on 8 images" in text and text.count("<h3>Best</h3>") == text.count('<h2 id="class-') > 0
