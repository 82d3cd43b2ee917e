"""The best and worst cases of each class of a trained segmentation model."""

import re

import numpy as np
import torch
from typer.testing import CliRunner

from selectra.classifier import cases
from selectra.cli import app
from selectra.errors import ConfigError
from selectra.report.cases import Case, Cases, Picture, compared, highlighted, page

RUN = CliRunner()
COLOURS = ((200, 0, 0), (0, 200, 0))


def call(*words):
    found = RUN.invoke(app, [str(word) for word in words])
    return found.exit_code, " ".join(found.output.split())


def test_best_and_worst_are_those_and_none_is_both():
    ious = np.array([0.5, np.nan, 0.1, 0.9, 0.3])
    assert cases.best_and_worst(ious, 2) == ([3, 0], [2, 4])
    assert cases.best_and_worst(ious, 1) == ([3], [2])
    assert cases.best_and_worst(ious[[0, 1, 2]], 2) == ([0], [2])
    assert cases.best_and_worst(ious[[0]], 2) == ([0], [])
    assert cases.best_and_worst(ious[[1]], 2) == ([], [])


def picture():
    true, found = np.array([[0, 1], [1, 255]]), np.array([[0, 1], [0, 1]])
    return Picture("a/b.png", np.full((2, 2, 3), 100, np.uint8), true, found)


def test_pictures_say_what_is_right_wrong_and_missed():
    shown = compared(picture(), 1)
    right, missed, ignored = shown[0, 1], shown[1, 0], shown[1, 1]
    assert right.argmax() == 1 and missed[0] > 150 < missed[1] and missed[2] < 100
    assert np.ptp(ignored.astype(int)) == 0
    wrong = compared(Picture("a", picture().image, picture().found, picture().true), 1)[0, 0]
    assert np.ptp(wrong.astype(int)) == 0
    ignored = picture().true == 255
    drawn = highlighted(np.full((4, 4, 3), 100, np.uint8), np.zeros((4, 4), int), 0, COLOURS, np.zeros((4, 4), bool))
    assert (drawn == drawn[0, 0]).all() and drawn[0, 0].tolist() == [175, 25, 25]
    assert highlighted(picture().image, picture().true, 0, COLOURS, ignored).shape == (2, 2, 3)


def test_the_page_holds_everything_and_escapes_names():
    one = Case(picture(), 0.25)
    found = Cases("run", "m", "d", "test", 3, 0.4, ("a<b", "absent"), COLOURS, (0.4, float("nan")),
                  (((one,), (one,)), ((), ())), 0.002)  # fmt: skip
    text = page(found)
    assert text.count("data:image/jpeg;base64,") == 8 and "a&lt;b" in text and "a<b" not in text
    assert "does not occur" in text and "No image has enough" in text
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def test_an_evaluated_training_gets_its_page(tmp_path):
    run = tmp_path / "run"
    small = ["data.test=0.05", "data.crop=32", "train.steps=2", "train.batch_size=4", "train.device=cpu"]
    assert call("train", "upernet_smoke", *small, "train.threads=1", "--out", run)[0] == 0
    code, said = call("eval", run, "--page")
    assert code == 0 and "test_cases.html" in said
    text = (run / "test_cases.html").read_text("utf-8")
    assert "<h3>Best</h3>" in text and "<h3>Worst</h3>" in text and 'id="class-4"' in text
    found = cases.cases_of(
        run,
        "test",
        {"miou": 0.1, **{f"iou {n}": 0.1 for n in ("ground", "disc", "ring", "square", "cross")}},
        torch.device("cpu"),
    )
    best, worst = found.cases[0]
    assert best[0].iou >= best[-1].iou >= worst[-1].iou >= worst[0].iou
    true, taken = best[0].picture.true == 0, best[0].picture.found == 0
    assert best[0].iou == (true & taken).sum() / (true | taken).sum()


def test_other_trainings_have_no_such_page(tmp_path):
    run = tmp_path / "run"
    words = ["data.path=shapes", "data.per_class=2", "train.steps=1", "train.batch_size=4", "train.device=cpu"]
    assert call("train", "vim_smoke", *words, "train.threads=1", "--out", run)[0] == 0
    refused = RUN.invoke(app, ["eval", str(run), "--page"]).exception
    assert isinstance(refused, ConfigError) and "a training of kind 'image'" in str(refused)
    assert not (run / "test.json").exists()
