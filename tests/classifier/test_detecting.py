"""`selectra train`, `eval` and `predict` of detection, as they are typed."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from selectra.classifier.detecting import detect, detector_from_run
from selectra.cli import main
from selectra.data import Objects
from selectra.errors import ConfigError, DataError
from selectra.report.detected import Detected, detected_figure, save_detected
from selectra.train.record import RUN

WORDS = ("train.steps=3", "train.batch_size=4", "train.device=cpu", "data.masks=true", "data.test=0.1")


def _run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code if isinstance(stop.value.code, int) else -1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of three steps on drawn shapes."""
    out = tmp_path_factory.mktemp("runs") / "shapes"
    torch.manual_seed(0)
    assert _run("train", "mask_rcnn_smoke", *WORDS, "--out", out) == 0
    return out


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    data, paths = Objects("shapes"), []
    for i, row in enumerate(data.rows["test"][:2]):
        pixels = data.read(int(row))[0].permute(1, 2, 0).numpy()
        paths.append(tmp_path / f"photo {i}.png")
        Image.fromarray(pixels[: 48 - 5 * i]).save(paths[-1])
    return paths


def test_a_training_is_evaluated(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert _run("eval", trained, "--batch-size", 5) == 0
    shown = capsys.readouterr().out
    assert "all 16 examples" in shown and "map50 ring" in shown and "mask_map50" in shown
    found = json.loads((trained / "test.json").read_text())
    assert sum(found["objects"].values()) == 32 and set(found["coco"]) == {"bbox", "segm"}
    assert found["metrics"]["map"] == found["coco"]["bbox"]["AP_all"]
    record = [json.loads(line) for line in (trained / "record.jsonl").read_text().splitlines()]
    step = next(each for each in record if "loss_mask" in each)
    parts = [value for name, value in step.items() if name.startswith("loss_")]
    assert len(parts) == 5 and step["loss"] == pytest.approx(sum(parts))


def test_predict_writes_pictures_and_objects(trained, photos, tmp_path, capsys):
    out = tmp_path / "out"
    words = ("predict", *photos, "--run", trained, "--out", out, "--device", "cpu", "--threshold", 0.06)
    assert _run(*words) == 0
    shown = capsys.readouterr().out
    assert "photo 0.png" in shown and str(out) in shown.replace("\n", "")
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"photo {i}_{kind}" for i in range(2) for kind in ("objects.json", "overlay.png")]
    written = json.loads((out / "photo 1_objects.json").read_text())
    found = detect(detector_from_run(trained), photos[1], threshold=0.06)
    assert len(written) == len(found.labels) == sum(found.counts()) > 0
    assert [each["score"] for each in written] == pytest.approx(found.scores.tolist(), abs=1e-5)
    # Few steps leave many scores alike, whose order is open.
    boxes = np.array([each["box"] for each in written])
    assert all(np.abs(boxes - box).max(1).min() < 1e-2 for box in found.boxes)
    assert {each["class"] for each in written} == {found.classes[label] for label in found.labels}
    assert found.masks is not None and found.masks.shape == (len(found.labels), 43, 64)
    assert (np.diff(found.scores) <= 0).all() and found.scores.min() >= 0.06
    assert _run(*words[:-1], 1) == 0
    assert "nothing from 100% up" in capsys.readouterr().out


def test_damaged_files_are_named_or_left_out(trained, photos, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(photos[0].read_bytes()[:60])
    words = ("predict", bad, photos[0], "--run", trained, "--out", tmp_path / "out", "--device", "cpu")
    assert _run(*words) == 2
    assert "bad.png' cannot be read as an image" in capsys.readouterr().err
    assert _run(*words, "--skip-corrupt") == 0
    assert "left out" in capsys.readouterr().out


def test_what_has_no_effect_is_said(trained, photos, capsys):
    assert _run("predict", photos[0], "--run", trained, "--window", 32) == 2
    assert "--window is for trainings of segmentation alone" in capsys.readouterr().err
    assert _run("predict", photos[0], photos[0], "--run", trained) == 2
    assert "two images are named 'photo 0'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="threshold=2"):
        detect(detector_from_run(trained), photos[0], threshold=2)


def test_an_old_run_and_diverged_weights_are_named(trained, photos, tmp_path):
    model = detector_from_run(trained)
    for parameter in model.model.parameters():
        parameter.data.fill_(float("nan"))
    with pytest.raises(DataError, match="weights that are not finite"):
        detect(model, photos[0])
    (tmp_path / RUN).write_text((trained / RUN).read_text().replace('"colours"', '"paints"'))
    with pytest.raises(DataError, match=r"does not say .*colours"):
        detector_from_run(tmp_path)


def make_detected(**changed: Any) -> Detected:
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 10:20, 10:30] = True
    masks[1, 5:35, 20:50] = True
    values: dict[str, Any] = {
        "model": "model", "file": "folder/photo.jpg", "image": np.full((40, 60, 3), 100, np.uint8),
        "boxes": np.array([[10.0, 10, 30, 20], [20, 5, 50, 35]]), "labels": np.array([1, 0]),
        "scores": np.array([0.9, 0.6]), "masks": masks, "classes": ("cat", "dog", "eel"),
        "colours": ((200, 0, 0), (0, 200, 0), (0, 0, 200)), "threshold": 0.5,
    }  # fmt: skip
    return Detected(**{**values, **changed})


def test_the_picture_says_what_there_is():
    axes: Any = detected_figure(make_detected()).axes
    whole, seen, side = axes
    assert [text.get_text() for text in seen.texts] == ["cat 0.60", "dog 0.90"]
    boxes = {(patch.get_x(), patch.get_y(), patch.get_width(), patch.get_height()): to_rgb(patch.get_edgecolor())
             for patch in seen.patches}  # fmt: skip
    assert boxes == {(20, 5, 30, 30): to_rgb((200 / 255, 0, 0)), (10, 10, 20, 10): to_rgb((0, 200 / 255, 0))}
    legend = side.get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["cat  1  (0.60)", "dog  1  (0.90)"]
    image = np.asarray(seen.images[0].get_array())
    # The surest mask is on top; what is in none is the image's own.
    assert image[15, 25].tolist() == [55, 145, 55] and image[30, 40].tolist() == [145, 55, 55]
    assert image[2, 2].tolist() == [100, 100, 100] == np.asarray(whole.images[0].get_array())[2, 2].tolist()


@pytest.mark.parametrize(("ground", "colour"), [(0, (20, 0, 60)), (255, (250, 250, 220))])
def test_boxes_show_on_any_ground(ground: int, colour: tuple[int, int, int]):
    """Boxes almost as dark, or as light, as the image; more of them than are named."""
    boxes, labels = np.tile([[15.0, 10, 45, 30]], (60, 1)), np.zeros(60, int)
    image = np.full((40, 60, 3), ground, np.uint8)
    figure = detected_figure(make_detected(image=image, boxes=boxes, labels=labels, scores=np.linspace(1, 0.5, 60),
                                           masks=None, colours=(colour,) * 3))  # fmt: skip
    drawn = BytesIO()
    figure.savefig(drawn, format="png")
    inside = figure.axes[1].get_window_extent().padded(-5)
    pixels = np.asarray(Image.open(drawn).convert("L")).astype(int)[::-1]
    seen = pixels[int(inside.y0) : int(inside.y1), int(inside.x0) : int(inside.x1)]
    assert (np.abs(seen - ground) > 150).sum() > 500


def test_nothing_found_many_found_and_grey_images(tmp_path):
    none = make_detected(boxes=np.zeros((0, 4)), labels=np.zeros(0, int), scores=np.zeros(0), masks=None)
    axes: Any = detected_figure(none).axes
    assert axes[2].get_legend().get_title().get_text() == "nothing found"
    assert "0 objects from 50%" in axes[1].get_title()
    many = make_detected(boxes=np.tile([[1.0, 2, 30, 30]], (60, 1)), labels=np.arange(60) % 3,
                         scores=np.linspace(1, 0.5, 60), masks=None)  # fmt: skip
    assert not detected_figure(many).axes[1].texts and many.counts() == [20, 20, 20]
    path = save_detected(make_detected(image=np.full((40, 60, 1), 90, np.uint8)), tmp_path / "new")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        save_detected(make_detected(), path)
