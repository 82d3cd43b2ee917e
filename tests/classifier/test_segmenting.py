"""`selectra train`, `eval` and `predict` of segmentation, as they are typed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selectra.classifier.segmenting import segment, segmenter_from_run
from selectra.cli import main
from selectra.data import Masks
from selectra.errors import ConfigError, DataError
from selectra.report.overlay import Overlay, overlay_figure, save_overlay
from selectra.train.record import RUN

WORDS = ("model.backbone=vmamba_smoke", "train.steps=4", "train.batch_size=4", "train.device=cpu", "data.crop=32,48")


def _run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return stop.value.code if isinstance(stop.value.code, int) else -1


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training of four steps on drawn shapes."""
    out = tmp_path_factory.mktemp("runs") / "shapes"
    torch.manual_seed(0)
    assert _run("train", "upernet_smoke", *WORDS, "--out", out) == 0
    return out


@pytest.fixture
def photos(tmp_path: Path) -> list[Path]:
    data, paths = Masks("shapes"), []
    for i, row in enumerate(data.rows["test"][:2]):
        pixels = data.read(int(row))[0].permute(1, 2, 0).numpy()
        paths.append(tmp_path / f"photo {i}.png")
        Image.fromarray(pixels[: 48 - 5 * i]).save(paths[-1])
    return paths


def test_a_training_is_evaluated(trained: Path, capsys: pytest.CaptureFixture[str]):
    assert _run("eval", trained, "--batch-size", 5) == 0
    shown = capsys.readouterr().out
    assert "all 32 examples" in shown and "miou" in shown and "iou ring" in shown
    found = json.loads((trained / "test.json").read_text())
    confusion = np.array(found["confusion"])
    assert found["classes"] == ["ground", "disc", "ring", "square", "cross"] and confusion.sum() == 32 * 48 * 64
    assert found["metrics"]["accuracy"] == pytest.approx(confusion.trace() / confusion.sum())
    record = [json.loads(line) for line in (trained / "record.jsonl").read_text().splitlines()]
    (step, *_) = [each for each in record if each.get("kind") == "step" or "cross_entropy" in each]
    assert step["loss"] == pytest.approx(step["cross_entropy"] + step["aux"])


def test_predict_writes_pictures_and_masks(trained, photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert _run("predict", *photos, "--run", trained, "--out", out, "--device", "cpu") == 0
    shown = capsys.readouterr().out
    assert "mean probability" in shown and "64 x 43" in shown and str(out) in shown.replace("\n", "")
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"photo {i}_{kind}.png" for i in range(2) for kind in ("mask", "overlay")]
    with Image.open(out / "photo 1_mask.png") as mask:
        assert mask.mode == "P" and mask.size == (64, 43)
        found = segment(segmenter_from_run(trained), photos[1])
        assert (np.asarray(mask) == found.labels).all()


def test_windows_and_whole_images(trained, photos):
    model = segmenter_from_run(trained)
    whole, same = segment(model, photos[0]), segment(model, photos[0], window=64)
    assert (whole.labels == same.labels).all() and whole.probability == pytest.approx(same.probability, abs=1e-5)
    small = segment(model, photos[0], window=32)
    assert small.labels.shape == (48, 64) and 0 < small.probability <= 1


def test_damaged_files_are_named_or_left_out(trained, photos, tmp_path, capsys):
    bad = tmp_path / "bad.png"
    bad.write_bytes(photos[0].read_bytes()[:60])
    words = ("predict", bad, photos[0], "--run", trained, "--out", tmp_path / "out", "--device", "cpu")
    assert _run(*words) == 2
    assert "bad.png' cannot be read as an image" in capsys.readouterr().err
    assert _run(*words, "--skip-corrupt") == 0
    assert "left out" in capsys.readouterr().out
    assert _run("predict", bad, "--run", trained, "--skip-corrupt", "--device", "cpu") == 2
    assert "none of the files could be read" in capsys.readouterr().err


def test_what_has_no_effect_or_would_be_lost_is_said(trained, photos, make_run, tmp_path, capsys):
    assert _run("predict", photos[0], "--run", make_run(), "--window", 32) == 2
    assert "--window is for trainings of segmentation alone" in capsys.readouterr().err
    other = tmp_path / "other" / photos[0].name
    other.parent.mkdir()
    other.write_bytes(photos[0].read_bytes())
    assert _run("predict", photos[0], other, "--run", trained, "--device", "cpu") == 2
    assert "two images are named 'photo 0'" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert _run("predict", photos[0], "--run", trained, "--out", tmp_path / "file", "--device", "cpu") == 2
    assert "cannot write in" in capsys.readouterr().err


def test_a_run_that_does_not_say_its_classes_is_named(trained, tmp_path):
    content = json.loads((trained / RUN).read_text())
    del content["data"]["colours"]
    (tmp_path / RUN).write_text(json.dumps(content))
    with pytest.raises(DataError, match="does not say colours"):
        segmenter_from_run(tmp_path)


def make_overlay(**changes: object) -> Overlay:
    labels = np.zeros((40, 60), np.uint8)
    labels[10:30, 20:50] = 2
    arguments = {
        "model": "upernet_base", "file": "some/street.png", "image": np.full((40, 60, 3), 100, np.uint8),
        "labels": labels, "classes": ("road", "sky", "car"), "colours": ((128, 64, 128), (0, 0, 255), (255, 0, 0)),
        "probability": 0.8,
    }  # fmt: skip
    return Overlay(**{**arguments, **changes})  # pyright: ignore[reportArgumentType]


def legend_of(overlay: Overlay) -> Any:
    return next(ax.get_legend() for ax in overlay_figure(overlay).axes if ax.get_legend() is not None)


def test_the_legend_names_what_is_there_with_its_share():
    legend = legend_of(make_overlay())
    assert [text.get_text() for text in legend.get_texts()] == ["road  75.0%", "car  25.0%"]
    assert [patch.get_facecolor()[:3] for patch in legend.get_patches()][1] == (1.0, 0.0, 0.0)


def test_the_picture_shows_the_classes_colours():
    image = np.asarray(overlay_figure(make_overlay()).axes[1].get_images()[0].get_array())
    assert image[20, 30].tolist() == [185, 45, 45] and image[2, 2].tolist() == [115, 80, 115]


def test_many_classes_are_cut_and_counted():
    labels = np.arange(40 * 60).reshape(40, 60) % 30
    classes, colours = tuple(f"class {i}" for i in range(30)), tuple((i, i, i) for i in range(30))
    legend = legend_of(make_overlay(labels=labels.astype(np.uint8), classes=classes, colours=colours))
    assert len(legend.get_texts()) == 24 and "6 smaller classes not shown" in legend.get_title().get_text()


def test_a_grey_image_is_drawn(tmp_path):
    path = save_overlay(make_overlay(image=np.full((40, 60, 1), 90, np.uint8)), tmp_path / "new")
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        save_overlay(make_overlay(), path)
