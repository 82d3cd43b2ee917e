"""Images as they lie: folders, zip files, parquet, torchvision's sets, public sets; splits; what cannot be read."""

import json
import socket
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from selectra.data import image_check
from selectra.data import images as images_module
from selectra.data.image_decode import decode
from selectra.data.image_files import list_images
from selectra.data.image_listing import Listing
from selectra.data.images import Images
from selectra.errors import ConfigError, DataError
from tests.data.pictures import CLASSES, deep, encoded, names, pixels, write_folder, write_zip
from tests.data.shards import serving, within


def nested(tmp_path: Path) -> Path:
    """As CIFAR-10-JPEG lies: one zip file for each part, the part's folder inside."""
    write_zip(tmp_path / "set" / "train.zip", names("train"))
    write_zip(tmp_path / "set" / "test.zip", names("test", 3, first=50))
    (tmp_path / "set" / "README.md").write_text("about")
    return tmp_path / "set"


def layouts(tmp_path: Path) -> dict[str, Path]:
    both = names("train") | names("test", 3, first=50)
    return {
        "folders": write_folder(tmp_path / "folders", both),
        "zip": write_zip(tmp_path / "one.zip", both),
        "zip with a root": write_zip(tmp_path / "two.zip", {f"data/set/{name}": b for name, b in both.items()}),
        "zips in a folder": nested(tmp_path),
    }


@pytest.mark.parametrize("layout", ["folders", "zip", "zip with a root", "zips in a folder"])
def test_every_layout_gives_the_same_images(layout, tmp_path):
    listing = list_images(str(layouts(tmp_path)[layout]))
    assert listing.classes == CLASSES and len(listing.labels) == 39
    assert listing.ignored == (layout == "zips in a folder")
    images = Images(str(layouts(tmp_path)[layout]), val=0)
    assert {part: len(rows) for part, rows in images.rows.items()} == {"train": 30, "val": 0, "test": 9}
    held, labels = images.hold("train")
    assert labels.tolist() == [0] * 10 + [1] * 10 + [2] * 10
    expected = pixels(10 * int(labels[12]) + 2)
    assert np.array_equal(held[12].permute(1, 2, 0).numpy(), expected)
    assert images.facts == {"n_classes": 3, "in_channels": 3, "img_size": 8}


def test_parts_that_nobody_made_are_drawn_within_classes(tmp_path):
    root = write_folder(tmp_path, names(each=10))
    one, same, other = (Images(str(root), val=0.25, split_seed=seed) for seed in (0, 0, 1))
    assert {part: len(rows) for part, rows in one.rows.items()} == {"train": 18, "val": 6, "test": 6}
    for part in one.rows:
        assert len(set(np.bincount(one.listing.labels[one.rows[part]]))) == 1
        assert np.array_equal(one.rows[part], same.rows[part])
    assert any(not np.array_equal(one.rows[part], other.rows[part]) for part in one.rows)
    together = np.sort(np.concatenate(list(one.rows.values())))
    assert np.array_equal(together, np.arange(30))


def test_images_per_class_are_a_part_of_the_training_images(tmp_path):
    root = str(write_folder(tmp_path, names(each=10)))
    few, all_of_them = Images(root, per_class=3), Images(root)
    assert np.bincount(few.listing.labels[few.rows["train"]]).tolist() == [3, 3, 3]
    assert set(few.rows["train"]) < set(all_of_them.rows["train"])
    for part in ("val", "test"):
        assert np.array_equal(few.rows[part], all_of_them.rows[part])
    with pytest.raises(DataError, match=r"class 'cat' of .* has 7 images for training, and at least 9"):
        Images(root, per_class=9)


def test_parquet_as_hugging_face_writes_it(tmp_path):
    features = {"label": {"names": list(CLASSES), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    for part, count, first in (("train", 12, 0), ("test", 6, 100)):
        rows = [{"bytes": encoded(pixels(first + i)), "path": None} for i in range(count)]
        table = pa.table({"image": rows, "label": [i % 3 for i in range(count)]})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, tmp_path / f"{part}-00000-of-00001.parquet")
    images = Images(str(tmp_path), val=0)
    assert images.classes == CLASSES
    assert {part: len(rows) for part, rows in images.rows.items()} == {"train": 12, "val": 0, "test": 6}
    held, labels = images.hold("test")
    assert labels.tolist() == [0, 1, 2] * 2
    assert np.array_equal(held[1].permute(1, 2, 0).numpy(), pixels(101))


def test_parquet_with_named_labels(tmp_path):
    table = pa.table({"image": [encoded(pixels(i)) for i in range(20)], "label": ["b", "a"] * 10})
    pq.write_table(table, tmp_path / "all.parquet")
    images = Images(str(tmp_path / "all.parquet"))
    assert images.classes == ("a", "b") and len(images.rows["test"]) == 4
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"has the columns \['picture'\]; it needs 'image' and 'label'"):
        Images(str(tmp_path / "other.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(DataError, match=r"is no whole parquet file"):
        Images(str(tmp_path / "broken.parquet"))


def test_torchvision_sets_by_name(tmp_path, monkeypatch):
    """Fashion-MNIST's files, as torchvision keeps them."""
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"FashionMNIST cannot be read in .*data.download=true"):
        Images("torchvision:FashionMNIST")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 10)):
        image = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        header = b"\x00\x00\x08\x03" + np.array(image.shape, ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + image.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\x00\x00\x08\x01" + np.array([count], ">i4").tobytes() + labels.tobytes()
        )
    images = Images("torchvision:FashionMNIST", val=0)
    assert images.facts == {"n_classes": 10, "in_channels": 1, "img_size": 28}
    assert np.array_equal(
        images.hold("test")[0][:, 0], np.random.default_rng(10).integers(0, 256, (10, 28, 28), np.uint8)
    )
    with pytest.raises(DataError, match=r"torchvision has no set 'CIFAR11'. Did you mean 'CIFAR10'"):
        Images("torchvision:CIFAR11")


def test_a_download_of_torchvisions_that_stalls_is_named_in_time(tmp_path, monkeypatch):
    sets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("selectra.data.image_torchvision.PATIENCE", 0.5)
    name = sets.FashionMNIST.resources[0][0]
    (tmp_path / name).write_bytes(bytes(1000))
    with serving(tmp_path, stall=name) as server:
        monkeypatch.setattr(sets.FashionMNIST, "mirrors", [server.url("")])
        with within(0.5 + 5), pytest.raises(DataError, match=r"FashionMNIST cannot be read .*timed out"):
            Images("torchvision:FashionMNIST", download=True)
    assert socket.getdefaulttimeout() is None


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    """As where all images lie in one folder, "images"."""
    root = write_folder(tmp_path, {f"images/{i}.png": encoded(pixels(i)) for i in range(8)})
    with pytest.raises(DataError, match="are of one class, 'images', so there is nothing to tell apart"):
        Images(str(root))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0], [1]], r"the labels of '.*a\.parquet' are such as \[0\]; each must be one number or name"),
        (["a", None], r"a row of the table '.*a\.parquet' has no label"),
        ([-1, 0], r"labels of '.*a\.parquet' are -1 to 0"),
    ],
)
def test_labels_that_are_none_are_named(labels, message, tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [encoded(pixels(i)) for i in range(2)], "label": labels}), path)
    with pytest.raises(DataError, match=message):
        Images(str(path))


def test_thirteen_bands(tmp_path):
    for i in range(12):
        path = tmp_path / CLASSES[i % 3] / f"{i}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.random.default_rng(i).integers(0, 256, (6, 5, 13), np.uint8))
    images = Images(str(tmp_path), val=0)
    assert images.facts == {"n_classes": 3, "in_channels": 13, "img_size": (6, 5)}
    assert images.windows("train")[[0, 1]].to("cpu").x.shape == (2, 13, 6, 5)
    np.save(tmp_path / "cat" / "0.npy", np.zeros((6, 5, 13), np.float32))
    with pytest.raises(DataError, match=r"0.npy' is an array of float32 .*; it must be of uint8"):
        Images(str(tmp_path), val=0).hold("train")


def damaged(tmp_path: Path) -> str:
    root = write_folder(tmp_path, names("train", 5) | names("test", 2, first=50))
    (root / "train" / "dog" / "002.png").write_bytes(b"no picture")
    (root / "train" / "eel" / "001.png").write_bytes(encoded(pixels(7))[:60])
    return str(root)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_damaged_files_are_named_or_left_out_and_counted(keep, tmp_path):
    root = damaged(tmp_path)
    images = Images(root, val=0, keep=keep)
    with pytest.raises(DataError, match=r"'train/dog/002.png' in .* cannot be read as an image: .*data.corrupt=skip"):
        windows = images.windows("train")
        windows[list(range(len(windows)))]
    images = Images(root, val=0, keep=keep, corrupt="skip")
    assert images.summary()[-1] == "2 damaged files of the training and validation parts are left out."
    windows = images.windows("train")
    assert len(windows) == 13
    assert windows[list(range(13))].to("cpu").y.tolist() == [0] * 5 + [1] * 4 + [2] * 4


def test_damaged_files_on_disk_are_named_before_the_first_batch(tmp_path, monkeypatch):
    """All of them, and only what looks wrong is decoded for it."""
    root = Path(damaged(tmp_path))
    (root / "train" / "cat" / "003.jpg").write_bytes(encoded(pixels(8, (32, 32)), "JPEG")[:-40])
    # Behind the end of a JPEG there may be other things.
    (root / "train" / "cat" / "004.jpg").write_bytes(encoded(pixels(9, (32, 32)), "JPEG") + b"\0\0more")
    decoded: set[str] = set()

    def decoding(listing: Listing, row: int, channels: int | None) -> torch.Tensor:
        decoded.add(listing.names[row])
        return decode(listing, row, channels)

    images = Images(str(root), val=0, img_size=8, keep="disk", standard="half")
    monkeypatch.setattr(images_module, "decode", decoding)
    message = (r"'train/cat/003.jpg' in .* cannot be read as an image: .*data.corrupt=skip. "
               r"2 more cannot be used: 'train/dog/002.png', 'train/eel/001.png'.$")  # fmt: skip
    with pytest.raises(DataError, match=message):
        images.windows("train")
    assert decoded == {f"train/{name}" for name in ("cat/003.jpg", "cat/004.jpg", "dog/002.png", "eel/001.png")}
    # Without sizes that are asked for, one of another size is found by its header.
    for name in ("cat/003.jpg", "cat/004.jpg", "dog/002.png"):
        (root / "train" / name).unlink()
    (root / "train" / "eel" / "001.png").write_bytes(encoded(pixels(1, (12, 16))))
    images = Images(str(root), val=0, keep="disk", standard="half")
    with pytest.raises(DataError, match=r"'train/eel/001.png' is 12 x 16 pixels, and others are 8 x 8"):
        images.windows("train")
    # Crops of random size take any.
    assert len(Images(str(root), val=0, keep="disk", standard="half", scale=0.5).windows("train")) == 14
    assert len(images.windows("test")) == 6


def test_of_too_many_images_none_is_looked_at_before(tmp_path, monkeypatch):
    monkeypatch.setattr(image_check, "MOST_CHECKED", 14)
    windows = Images(damaged(tmp_path), val=0, keep="disk", standard="half").windows("train")
    with pytest.raises(DataError, match=r"'train/dog/002.png' in .* cannot be read as an image: .*data.corrupt=skip"):
        windows[[7]]


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_a_damaged_member_of_a_zip_file_is_named_or_left_out(keep, tmp_path):
    path = write_zip(tmp_path / "one.zip", names("train", 4) | names("test", 2, first=50))
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("train/dog/002.png").header_offset + 60
    path.write_bytes(content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :])
    with pytest.raises(DataError, match=r"'train/dog/002.png' in .* cannot be read as an image: .*data.corrupt=skip"):
        Images(str(path), val=0, keep=keep, standard="half").windows("train")
    assert len(Images(str(path), val=0, keep=keep, standard="half", corrupt="skip").windows("train")) == 11


@pytest.mark.parametrize(
    ("change", "message"),
    [({}, r"'train/dog/002.png' has more than 8 bits a channel \(mode I;16\); convert it to 8 bits"),
     ({"in_channels": 13}, "'train/cat/000.png' is a picture, which gives 1, 3 or 4 channels, and in_channels is 13")],
)  # fmt: skip
def test_whole_images_of_another_kind_are_not_left_out_as_damaged(change, message, tmp_path):
    root = write_folder(tmp_path, names("train", 5) | names("test", 2, first=50))
    (root / "train" / "dog" / "002.png").write_bytes(deep())
    with pytest.raises(DataError, match=message) as caught:
        Images(str(root), val=0, corrupt="skip", **change).hold("train")
    assert "cannot be read" not in str(caught.value)


@pytest.mark.parametrize("keep", ["memory", "disk"])
def test_sizes(keep, tmp_path):
    root = write_folder(tmp_path, names("train", 4) | names("test", 2, first=50))
    (root / "train" / "dog" / "002.png").write_bytes(encoded(pixels(1, (12, 16))))
    images = Images(str(root), val=0, keep=keep)
    with pytest.raises(
        DataError, match=r"'train/dog/002.png' is 12 x 16 pixels, and others are 8 x 8: set data.img_size"
    ):
        images.windows("train")[[6]]
    images = Images(str(root), val=0, keep=keep, img_size=(6, 4), standard="half")
    assert images.facts["img_size"] == (6, 4)
    assert images.windows("train")[[0, 6]].to("cpu").x.shape == (2, 3, 6, 4)


def test_channels(tmp_path):
    root = str(write_folder(tmp_path, names("train", 4) | names("test", 2, first=50)))
    images = Images(root, val=0, in_channels=1)
    assert images.facts["in_channels"] == 1
    red, green, blue = (torch.from_numpy(pixels(0)[..., i].astype(np.float64)) for i in range(3))
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    assert (images.hold("train")[0][0, 0] - grey).abs().max() <= 1
    with pytest.raises(DataError, match=r"in_channels is 5"):
        Images(root, in_channels=5)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"notes.txt": b"x"}, "has no images; it must hold CLASS/NAME.jpg"),
        ({"a.png": encoded(pixels(0)), "b/c.png": encoded(pixels(1))}, "outside of a class's folder, 'a.png'"),
        ({"test/a/b.png": encoded(pixels(0))}, r"has the parts \['test'\] and no training part"),
    ],
)
def test_folders_that_are_no_set(files, message, tmp_path):
    with pytest.raises(DataError, match=message):
        Images(str(write_folder(tmp_path / "set", files)))


def test_what_does_not_exist_is_named(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"there are no images at 'cifar10_jpg'.*Did you mean 'cifar10_jpeg'"):
        Images("cifar10_jpg")
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path))
    with pytest.raises(
        DataError, match=r"ucmerced .* is not on this machine; looked for 'ucmerced128' in .*SELECTRA_DATA"
    ):
        Images("ucmerced")
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 but no more")
    with pytest.raises(DataError, match=r"is no whole zip file"):
        Images(str(tmp_path / "x.zip"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val": 1.0}, "val=1.0"),
        ({"flip": 2.0}, "flip=2.0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"randaugment": (0, 9)}, "randaugment"),
        ({"randaugment": (2, 9), "keep": "memory"}, "set data.keep to 'disk'"),
        ({"keep": "disk", "standard": "train"}, "with keep='disk' take"),
        ({"per_class": 0}, "per_class=0"),
    ],
)
def test_settings_that_do_not_fit(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Images("shapes", **arguments)


def test_the_description_changes_with_the_data(tmp_path):
    root = write_folder(tmp_path, names("train", 4) | names("test", 2, first=50))
    before = Images(str(root), val=0).describe()
    assert before == Images(str(root), val=0).describe()
    json.dumps(before)
    assert before["fingerprint"] != Images(str(root), val=0.25).describe()["fingerprint"]
    (root / "train" / "dog" / "002.png").unlink()
    assert before["fingerprint"] != Images(str(root), val=0).describe()["fingerprint"]


def test_real_sets(data_folder):
    """As they lie in the data folder."""
    images = Images("fashion_mnist", per_class=5)
    assert images.facts == {"n_classes": 10, "in_channels": 1, "img_size": 28}
    assert len(images.rows["test"]) == 10_000 and len(images.windows("train")) == 50
    images = Images("ucmerced", val=0, per_class=2)
    assert images.facts == {"n_classes": 21, "in_channels": 3, "img_size": 128}
    assert (len(images.rows["train"]), len(images.rows["test"])) == (42, 420)
    images = Images("cifar10_jpeg", per_class=3)
    assert images.facts == {"n_classes": 10, "in_channels": 3, "img_size": 32}
    assert {part: len(rows) for part, rows in images.rows.items()} == {"train": 30, "val": 5_000, "test": 10_000}
    assert images.classes[:2] == ("airplane", "automobile")
    assert len(images.windows("train")[list(range(30))].to("cpu")) == 30


def test_digits():
    pytest.importorskip("sklearn")
    assert Images("digits").facts == {"n_classes": 10, "in_channels": 1, "img_size": 8}
