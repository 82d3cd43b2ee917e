"""Predictions: what the model gives for the pixels that it was trained on, and words about what does not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from selectra.classifier import from_run, from_weights, predict
from selectra.classifier.reading import UnreadableError, read_image, standardised
from selectra.data.image_decode import decode, fitted
from selectra.data.image_files import list_images
from selectra.errors import ConfigError, DataError
from selectra.registry import models
from selectra.spec import Spec
from tests.classifier.conftest import CLASSES, SIZE
from tests.data.pictures import deep, encoded, photo, pixels, write_folder

Make = Callable[..., Path]


def test_probabilities_are_those_of_the_trained_weights(make_run: Make, make_image: Make) -> None:
    trained, path = from_run(make_run()), make_image()
    (found,) = predict(trained, [path], top=9)
    pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 255
    with torch.no_grad():
        want = trained.model(((pixels - 0.4) / 0.2)[None]).softmax(1)[0]
    order = want.argsort(descending=True).tolist()
    assert found.classes == tuple(CLASSES[i] for i in order)
    assert found.probabilities == pytest.approx(want[order].tolist(), abs=1e-5)
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-5)


def test_many_images_are_predicted_as_one_by_one(make_run: Make, make_image: Make) -> None:
    trained = from_run(make_run())
    paths = [make_image(f"{i}.png", width=SIZE + i, seed=i) for i in range(35)]
    together = predict(trained, paths, top=2)
    assert [each.path for each in together] == paths
    for i in (0, 31, 32, 34):
        (alone,) = predict(trained, [paths[i]], top=2)
        assert alone.classes == together[i].classes
        assert alone.probabilities == pytest.approx(together[i].probabilities, abs=1e-5)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (64, 64), (50, 90), (90, 51), (20, 33), (7, 200)])
def test_images_are_brought_to_size_as_in_training(height: int, width: int) -> None:
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    image = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, height, width), dtype=np.uint8))
    ratio = max(SIZE / height, SIZE / width)
    covering = [max(SIZE, round(height * ratio)), max(SIZE, round(width * ratio))]
    resized = functional.resize(image, covering, interpolation=functional.InterpolationMode.BICUBIC, antialias=True)
    want = functional.center_crop(resized, [SIZE, SIZE])
    got = fitted(image, (SIZE, SIZE))
    assert torch.equal(got, want)


def test_a_crop_keeps_the_middle() -> None:
    image = torch.zeros(1, 64, 64, dtype=torch.uint8)
    image[:, 16:48, 16:48] = 255
    assert fitted(image, (32, 32), 0.5).min() == 255
    assert fitted(image, (32, 32)).min() == 0


def test_a_photo_is_turned_as_its_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", 3)
    assert image.shape == (3, 6, 4)
    assert image[0, 0, 3] == 255


def test_many_bands_come_as_arrays(make_run: Make, tmp_path: Path) -> None:
    trained = from_run(make_run(channels=13))
    np.save(tmp_path / "bands.npy", np.full((SIZE, SIZE, 13), 90, np.uint8))
    (found,) = predict(trained, [tmp_path / "bands.npy"])
    assert len(found.classes) == 5


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent.png", "there is no file '.*absent.png'"),
        ("folder", "'.*folder' is a folder; name images in it"),
        ("text.png", "'.*text.png' cannot be read as an image: cannot identify"),
        ("cut.png", "'.*cut.png' cannot be read as an image"),
        ("small.png", r"'.*small.png' is 9 x 3 pixels \(width x height\), smaller than the 4 x 4 pixels of one patch"),
        ("wrong.npy", "'.*wrong.npy' has 4 channels, and in_channels is 3"),
        ("float.npy", "is an array of float32 of shape"),
        ("bad.npy", "'.*bad.npy' cannot be read as an image"),
        ("deep.png", r"'.*deep.png' has more than 8 bits a channel \(mode I;16\)"),
        ("deep.tif", "'.*deep.tif' has more than 8 bits a channel"),
    ],
)
def test_what_does_not_fit_is_named(name: str, words: str, make_run: Make, make_image: Make, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(make_image("whole.png").read_bytes()[:900])
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY and no more")
    (tmp_path / "deep.png").write_bytes(deep((SIZE, SIZE)))
    (tmp_path / "deep.tif").write_bytes(deep((SIZE, SIZE), "TIFF"))
    make_image("small.png", width=9, height=3)
    np.save(tmp_path / "wrong.npy", np.zeros((32, 32, 4), np.uint8))
    np.save(tmp_path / "float.npy", np.zeros((32, 32, 3), np.float32))
    with pytest.raises(DataError, match=words):
        predict(from_run(make_run()), [tmp_path / name])


def test_pictures_have_no_thirteen_bands(make_run: Make, make_image: Make) -> None:
    with pytest.raises(DataError, match=r"in_channels is 13; give arrays \(h, w, 13\)"):
        predict(from_run(make_run(channels=13)), [make_image()])


def test_images_are_read_as_in_training(tmp_path: Path) -> None:
    """Of every form that both take, grey and coloured, turned or not."""
    files = {"a/photo.png": photo(pixels(0, (4, 6)), 6), "a/upright.png": encoded(pixels(1, (4, 6)))}
    root = write_folder(tmp_path, files)
    np.save(root / "a" / "grey.npy", pixels(2, (4, 6))[..., 0])
    np.save(root / "a" / "one.npy", pixels(3, (4, 6))[..., :1])
    np.save(root / "a" / "three.npy", pixels(4, (4, 6)))
    listing = list_images(str(root))
    for channels in (1, 3):
        for i, name in enumerate(listing.names):
            assert torch.equal(read_image(root / name, channels), decode(listing, i, channels)), name
    assert decode(listing, listing.names.index("a/photo.png"), 3).shape == (3, 6, 4)


def test_damaged_files_are_left_out_when_asked_for(make_run: Make, make_image: Make, tmp_path: Path) -> None:
    trained, good = from_run(make_run()), make_image()
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"nothing")
    with pytest.raises(UnreadableError):
        predict(trained, [bad, good])
    skipped: list[str] = []
    (found,) = predict(trained, [bad, good], skipped=skipped)
    assert found.path == good
    assert len(skipped) == 1 and "bad.png" in skipped[0]
    # Files that are not there are no damaged files.
    with pytest.raises(DataError, match="there is no file"):
        predict(trained, [tmp_path / "absent.png"], skipped=skipped)


def test_weights_of_a_diverged_training_are_refused(make_run: Make, make_image: Make) -> None:
    trained = from_run(make_run())
    torch.nn.init.constant_(trained.model.get_submodule("head").weight, float("nan"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(DataError, match="scores that are not finite"):
        predict(trained, [make_image()])


@pytest.mark.parametrize("absent", ["classes", "mean"])
def test_a_run_must_say_what_its_images_were(absent: str, make_run: Make) -> None:
    about: dict[str, Any] = {"classes": ["a"], "img_size": 32, "in_channels": 3, "mean": [0, 0, 0], "std": [1, 1, 1]}
    folder = make_run(about={name: value for name, value in about.items() if name != absent})
    with pytest.raises(DataError, match=f"does not say {absent} of its images"):
        from_run(folder)


def test_runs_of_series_and_empty_folders_are_refused(make_run: Make, tmp_path: Path) -> None:
    folder = make_run()
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace("vmamba_smoke", "dlinear_base"))
    with pytest.raises(ConfigError, match="is a model of kind 'series', and this is for models of images"):
        from_run(folder)
    with pytest.raises(DataError, match="there is no"):
        from_run(tmp_path)


def test_weights_alone_with_class_names(make_image: Make, tmp_path: Path) -> None:
    model: Any = models.build(Spec("vim_smoke", n_classes=7, img_size=SIZE), {}).eval()  # pyright: ignore[reportAttributeAccessIssue]
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    (tmp_path / "names.txt").write_text("\n".join("abcdefg") + "\n")
    trained = from_weights("vim_smoke", tmp_path / "weights.pth", tmp_path / "names.txt", SIZE)
    path = make_image(width=80, height=60)
    (found,) = predict(trained, [path])
    image = standardised(fitted(read_image(path, 3), (SIZE, SIZE), 0.875)[None], trained.mean, trained.std)
    with torch.no_grad():
        best = model(image).argmax().item()
    assert found.classes[0] == "abcdefg"[int(best)]
    assert from_weights("vim_smoke", tmp_path / "weights.pth").classes[-1] == "6"
    (tmp_path / "names.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="names 2 classes, and the weights have 7"):
        from_weights("vim_smoke", tmp_path / "weights.pth", tmp_path / "names.txt")


@pytest.mark.parametrize("channels", [1, 13])
@pytest.mark.parametrize("name", ["vim_smoke", "vmamba_smoke", "vit_smoke"])
def test_weights_of_other_channels_are_refused(name: str, channels: int, tmp_path: Path) -> None:
    """They would be summed or repeated, and give other classes than they were trained for."""
    model: Any = models.build(Spec(name, n_classes=7, in_channels=channels), {})
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(DataError, match=rf"is of images of {channels} channels, and --weights is for 3.*--run FOLDER"):
        from_weights(name, tmp_path / "weights.pth")


def test_a_file_of_another_model_is_named(tmp_path: Path) -> None:
    model: Any = models.build(Spec("vit_smoke", n_classes=7), {})
    torch.save(model.state_dict(), tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"other\.pth"):
        from_weights("vmamba_smoke", tmp_path / "other.pth")


def test_weights_of_a_rectangle_say_what_can_be_done(tmp_path: Path) -> None:
    model: Any = models.build(Spec("vim_smoke", n_classes=7, img_size=(32, 96)), {})  # pyright: ignore[reportArgumentType]
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(DataError, match=r"rows and columns: give the training's folder \(--run FOLDER\)"):
        from_weights("vim_smoke", tmp_path / "weights.pth")


def test_weights_without_a_head_give_no_classes(tmp_path: Path) -> None:
    model: Any = models.build(Spec("vim_smoke"), {})
    torch.save({k: v for k, v in model.state_dict().items() if not k.startswith("head")}, tmp_path / "backbone.pth")
    with pytest.raises(DataError, match="has no head"):
        from_weights("vim_smoke", tmp_path / "backbone.pth")
