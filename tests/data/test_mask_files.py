"""Segmentation sets in their real layouts, made small."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from selectra.data import Masks
from selectra.data.mask_coding import CITYSCAPES, ISPRS, distinct_colours
from selectra.data.mask_files import list_masks
from selectra.errors import ConfigError, DataError
from tests.data.pictures import deep, encoded, photo, pixels, write_folder, write_zip

SIZE = (6, 8)


def mask(values: list[int], size: tuple[int, int] = SIZE) -> bytes:
    """A picture of these numbers, one after the other."""
    return encoded(np.resize(np.array(values, np.uint8), size))


def colours(values: list[tuple[int, int, int]], kind: str = "TIFF") -> bytes:
    return encoded(np.resize(np.array(values, np.uint8), (SIZE[0] * SIZE[1], 3)).reshape(*SIZE, 3), kind)


def picture(seed: int = 0, kind: str = "PNG", size: tuple[int, int] = SIZE) -> bytes:
    return encoded(pixels(seed, size), kind)


def of_part(data: Masks, part: str) -> list[list[int]]:
    """The classes in each mask of a part."""
    return [sorted(np.unique(data.read(int(row))[1].numpy()).tolist()) for row in data.rows[part]]


def test_camvid(data_folder: Path):
    data = Masks("camvid")
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 367, "val": 101, "test": 233}
    assert len(data.classes) == 11 and data.facts == {"n_classes": 11, "in_channels": 3, "img_size": (360, 480)}
    image, classes = data.read(0)
    assert image.shape == (3, 360, 480) and set(classes.unique().tolist()) <= {*range(11), 255}
    assert data.in_memory and data.listing.alone == 0


def test_lists_as_segnet_writes_them(tmp_path):
    files = {f"CamVid/{part}/{i}.png": picture(i) for part in ("train", "test") for i in range(3)}
    files |= {f"CamVid/{part}annot/{i}.png": mask([0, 3, 11]) for part in ("train", "test") for i in range(3)}
    for part in ("train", "test"):
        lines = [f"/SegNet/CamVid/{part}/{i}.png /SegNet/CamVid/{part}annot/{i}.png" for i in range(3)]
        files[f"CamVid/{part}.txt"] = "\n".join(lines).encode()
    data = Masks(str(write_zip(tmp_path / "camvid.zip", files)), val=0)
    assert data.classes[0] == "Sky" and of_part(data, "train") == [[0, 3, 255]] * 3 and len(data.rows["val"]) == 0
    files["CamVid/train.txt"] += b"\nCamVid/train/9.png CamVid/trainannot/9.png"
    with pytest.raises(DataError, match=r"names 'train/9\.png', which is not there"):
        Masks(str(write_folder(tmp_path / "lost", files)))
    files["CamVid/train.txt"] = b"train/1.png"
    with pytest.raises(DataError, match=r"has the line 'train/1\.png'; it must be"):
        Masks(str(write_folder(tmp_path / "line", files)))


def test_ade20k(tmp_path):
    files = {f"images/{part}/ADE_{i}.jpg": picture(i, "JPEG") for part in ("training", "validation") for i in range(4)}
    files |= {f"annotations/{p}/ADE_{i}.png": mask([0, 1, 150]) for p in ("training", "validation") for i in range(4)}
    del files["annotations/training/ADE_3.png"]
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    rows += [f"{i}\t0.1\t1\t1\t1\tthing {i}, other word" for i in range(1, 151)]
    files["objectInfo150.txt"] = "\n".join(rows).encode()
    top = {f"ADEChallengeData2016/{name}": content for name, content in files.items()}
    data = Masks(str(write_folder(tmp_path, top)), val=0)
    assert len(data.classes) == 150 and data.classes[0] == "thing 1"
    assert of_part(data, "train") == [[0, 149, 255]] * 3 and len(data.rows["test"]) == 4
    assert data.listing.alone == 1 and "1 images without a mask" in data.summary()[1]
    plain = {name: content for name, content in files.items() if name != "objectInfo150.txt"}
    assert Masks(str(write_folder(tmp_path / "plain", plain)), val=0).classes[149] == "class 150"


def test_cityscapes(tmp_path):
    files = {}
    for part, city in (("train", "aachen"), ("train", "bochum"), ("val", "lindau"), ("test", "bonn")):
        stem = f"{city}_000000_000019"
        files[f"leftImg8bit/{part}/{city}/{stem}_leftImg8bit.png"] = picture()
        if part != "test":
            files[f"gtFine/{part}/{city}/{stem}_gtFine_labelIds.png"] = mask([0, 7, 26, 33, 29])
            files[f"gtFine/{part}/{city}/{stem}_gtFine_color.png"] = picture()
            files[f"gtFine/{part}/{city}/{stem}_gtFine_polygons.json"] = b"{}"
    data = Masks(str(write_folder(tmp_path / "ids", files)), val=0)
    assert data.classes == CITYSCAPES.classes and len(data.classes) == 19
    assert of_part(data, "train") == [[0, 13, 18, 255]] * 2 and len(data.rows["test"]) == 1
    for name in [name for name in files if name.endswith("labelIds.png")]:
        files[name.replace("labelIds", "labelTrainIds")] = mask([0, 18, 255])
    assert of_part(Masks(str(write_folder(tmp_path / "train", files)), val=0), "train") == [[0, 18, 255]] * 2


def test_loveda(tmp_path):
    files = {}
    for part in ("Train", "Val", "Test"):
        for area in ("Urban", "Rural"):
            files[f"{part}/{area}/images_png/1.png"] = picture()
            if part != "Test":
                files[f"{part}/{area}/masks_png/1.png"] = mask([0, 1, 7])
    data = Masks(str(write_folder(tmp_path, files)), val=0.5)
    assert len(data.classes) == 7 and of_part(data, "train") == [[0, 6, 255]]
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 1, "val": 1, "test": 2}


def test_loveda_in_its_zip_files(tmp_path):
    """As they are published: one archive a part, with its folder inside."""
    for part in ("Train", "Val"):
        files = {f"{part}/Urban/{kind}_png/{i}.png": content for i in range(2)
                 for kind, content in (("images", picture(i)), ("masks", mask([0, 1, 7])))}  # fmt: skip
        write_zip(tmp_path / f"{part}.zip", files)
    data = Masks(str(tmp_path), val=0)
    assert len(data.rows["train"]) == len(data.rows["test"]) == 2


ISPRS_PIXELS = [*ISPRS.colours, (0, 0, 0)]


def test_potsdam(tmp_path):
    files = {}
    for tile in ("2_10", "7_12", "2_13"):
        files[f"2_Ortho_RGB/top_potsdam_{tile}_RGB.tif"] = picture(1, "TIFF")
        files[f"3_Ortho_IRRG/top_potsdam_{tile}_IRRG.tif"] = picture(2, "TIFF")
        files[f"5_Labels_all/top_potsdam_{tile}_label.tif"] = colours(ISPRS_PIXELS)
        files[f"5_Labels_all_noBoundary/top_potsdam_{tile}_label_noBoundary.tif"] = colours([(0, 0, 0)])
    data = Masks(str(write_folder(tmp_path, files)), val=0)
    assert of_part(data, "train") == [[0, 1, 2, 3, 4, 5, 255]] * 2 and len(data.rows["test"]) == 1
    assert data.listing.names[0].startswith("2_Ortho_RGB/") and data.classes[1] == "building"


def test_vaihingen(tmp_path):
    files = {}
    for area in (1, 3, 2):
        files[f"ISPRS_semantic_labeling_Vaihingen/top/top_mosaic_09cm_area{area}.tif"] = picture(1, "TIFF")
        files[f"ISPRS_semantic_labeling_Vaihingen/gts_for_participants/top_mosaic_09cm_area{area}.tif"] = colours(
            ISPRS_PIXELS
        )
    data = Masks(str(write_folder(tmp_path, files)), val=0)
    assert of_part(data, "train") == [[0, 1, 2, 3, 4, 5, 255]] * 2 and len(data.rows["test"]) == 1


def test_a_colour_that_is_no_class_is_shown(tmp_path):
    files = {"top/top_mosaic_09cm_area1.tif": picture(1, "TIFF"), "gts/top_mosaic_09cm_area1.tif": colours([(1, 2, 3)])}
    with pytest.raises(DataError, match=r"unknown labels: \(1, 2, 3\) \(48 pixels\); known are \(0, 0, 0\)"):
        Masks(str(write_folder(tmp_path, files)), val=0)


def folders(each: int = 4, values: tuple[int, ...] = (0, 1, 2)) -> dict[str, bytes]:
    files = {f"images/{i}.jpg": picture(i, "JPEG") for i in range(each)}
    return files | {f"masks/{i}.png": mask(list(values)) for i in range(each)}


def test_folders_with_names_of_classes_in_a_file(tmp_path):
    data = Masks(str(write_folder(tmp_path, {**folders(10), "classes.txt": b"sea\nland\nice\n"})), val=0.2)
    assert data.classes == ("sea", "land", "ice")
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 6, "val": 2, "test": 2}
    assert sorted(np.concatenate(list(data.rows.values()))) == list(range(10))
    again = Masks(str(tmp_path), val=0.2)
    assert all((again.rows[part] == rows).all() for part, rows in data.rows.items())
    other = Masks(str(tmp_path), val=0.2, split_seed=1)
    assert any((other.rows[part] != rows).any() for part, rows in data.rows.items())


def test_folders_as_openmmlab_has_them(tmp_path):
    """Converted sets: numbers from 1 on, 0 for what does not count."""
    files = {}
    for part in ("train", "val"):
        files |= {f"img_dir/{part}/2_10_{i}.png": picture(i) for i in range(3)}
        files |= {f"ann_dir/{part}/2_10_{i}.png": mask([0, 1, 6]) for i in range(3)}
    root = str(write_folder(tmp_path, files))
    data = Masks(root, classes=ISPRS.classes, first_label=1, ignore=(0,), test=0.3)
    assert of_part(data, "val") == [[0, 5, 255]] * 3 and len(data.rows["train"]) == 2
    numbered = Masks(root, first_label=1, ignore=(0,), test=0.3)
    assert numbered.classes == tuple(f"class {i}" for i in range(1, 7))


def test_parts_around_images_and_masks_and_ends_of_names(tmp_path):
    files = {f"{part}/images/a{i}.png": picture(i) for part in ("train", "test") for i in range(2)}
    files |= {f"{part}/masks/a{i}_mask.png": mask([0, 1]) for part in ("train", "test") for i in range(2)}
    data = Masks(str(write_folder(tmp_path, files)), val=0)
    assert len(data.rows["train"]) == len(data.rows["test"]) == 2 and data.classes == ("class 0", "class 1")


def test_a_palettes_numbers_are_the_classes(tmp_path):
    files = folders(4)
    image = Image.fromarray(np.resize(np.array([0, 1, 2], np.uint8), SIZE))
    image.putpalette([c for colour in distinct_colours(3) for c in colour])
    assert image.mode == "P"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    files["masks/0.png"] = buffer.getvalue()
    data = Masks(str(write_folder(tmp_path, files)), classes=("a", "b", "c"), val=0)
    assert sorted(data.read(0)[1].unique().tolist()) == [0, 1, 2]


def test_masks_of_one_bit_have_two_classes(tmp_path):
    bits = np.resize(np.array([False, True]), SIZE)
    files = folders(4) | {f"masks/{i}.png": encoded(bits) for i in range(4)}
    data = Masks(str(write_folder(tmp_path, files)), val=0)
    assert data.classes == ("class 0", "class 1") and of_part(data, "train") == [[0, 1]] * 3


def test_masks_of_black_and_white(tmp_path):
    """255, which by default does not count, is often the class itself."""
    root = str(write_folder(tmp_path, folders(4, (0, 255))))
    message = r"all that counts in the training masks of .* is of the class 'class 0'.* labels \[255\].*data\.labels="
    with pytest.raises(DataError, match=message):
        Masks(root, val=0)
    with pytest.raises(DataError, match="is of the class 'sea'"):
        Masks(root, val=0, classes=("sea", "land"))
    data = Masks(root, val=0, labels=(255, 0), classes=("land", "sea"))
    assert data.classes == ("land", "sea") and of_part(data, "train") == [[0, 1]] * 3
    assert data.read(0)[1][0, :2].tolist() == [1, 0]
    assert Masks(root, val=0, labels=(0, 255)).classes == ("class 0", "class 255")
    with pytest.raises(ConfigError, match=r"labels=\(0, 255\): needs one for each of the 3 classes"):
        Masks(root, labels=(0, 255), classes=("a", "b", "c"))
    with pytest.raises(ConfigError, match=r"labels=\(0, 0\): needs one for each"):
        Masks(root, labels=(0, 0))
    with pytest.raises(DataError, match="is of none"):
        Masks(root, val=0, first_label=1, classes=("a", "b"), ignore=(0, 255))


def test_labels_that_are_no_classes_are_named(tmp_path):
    wide = encoded(np.resize(np.array([0, 1, 65535], np.uint16), SIZE))
    broken = encoded(np.resize(np.array([0, 0.5], np.float32), SIZE), "TIFF")
    root = str(write_folder(tmp_path / "wide", folders(4) | {f"masks/{i}.png": wide for i in range(4)}))
    with pytest.raises(DataError, match=r"has the label 65535.*at most 255.*data\.ignore=\[65535\]"):
        Masks(root)
    assert of_part(Masks(root, ignore=(65535,), val=0), "train") == [[0, 1, 255]] * 3
    files = {f"images/{i}.jpg": picture(i, "JPEG") for i in range(4)} | {f"masks/{i}.tif": broken for i in range(4)}
    with pytest.raises(DataError, match=r"has fractions, such as 0\.5"):
        Masks(str(write_folder(tmp_path / "broken", files)), classes=("a", "b"), val=0).windows("train")
    with pytest.raises(DataError, match="there are 256 classes; masks of at most 255"):
        Masks(root, classes=tuple(map(str, range(256))))


def test_images_are_turned_as_their_camera_says_unless_their_masks_are_not(tmp_path):
    array = pixels(0, SIZE)
    files = {"images/0.png": photo(array, 6), "masks/0.png": mask([0, 1], (8, 6))}
    files |= {"images/1.png": photo(array, 6), "masks/1.png": mask([0, 1])}
    files |= {"images/2.png": photo(array, 3), "masks/2.png": mask([0, 1])}
    data = Masks(str(write_folder(tmp_path, files)), val=0)
    shown = [data.read(i)[0].permute(1, 2, 0).numpy() for i in range(3)]
    assert (shown[0] == np.rot90(array, -1)).all() and (shown[1] == array).all()
    assert (shown[2] == array[::-1, ::-1]).all()
    assert not data.in_memory


def test_images_of_more_than_8_bits_are_named(tmp_path):
    files = folders(4, (0, 1)) | {"images/0.png": deep(SIZE), "masks/0.png": mask([0, 1])}
    del files["images/0.jpg"]
    with pytest.raises(DataError, match=r"'images/0\.png' has more than 8 bits a channel"):
        Masks(str(write_folder(tmp_path, files)), val=0, faulty="skip", test=0.3)


def test_unknown_labels_are_named_or_left_out(tmp_path):
    root = str(write_folder(tmp_path, {**folders(4, (0, 1, 7, 9)), "classes.txt": b"a\nb\nc"}))
    message = r"the mask 'masks/\d\.png' has unknown labels: 7 \(12 pixels\), 9 \(12 pixels\); known are 0, 1, 2, 255"
    with pytest.raises(DataError, match=message):
        Masks(root).windows("train")
    assert of_part(Masks(root, unknown="ignore", val=0), "test") == [[0, 1, 255]]


def test_images_and_masks_of_two_sizes_are_named_or_left_out(tmp_path):
    files = {**folders(8), "classes.txt": b"a\nb\nc", "masks/3.png": mask([0], (6, 9))}
    root = str(write_folder(tmp_path, files))
    message = r"the image 'images/3\.jpg' is 6 x 8 pixels, and its mask 'masks/3\.png' 6 x 9.*data\.faulty=skip"
    with pytest.raises(DataError, match=message):
        for part in ("train", "val", "test"):
            Masks(root).windows(part)
    data = Masks(root, faulty="skip", val=0.2)
    kept = sum(len(data.windows(part)) for part in ("train", "val", "test"))
    assert kept == 7


def test_truncated_files_are_named_or_left_out(tmp_path):
    files = {**folders(8), "classes.txt": b"a\nb\nc"}
    for name in ("images/2.jpg", "masks/5.png"):
        files[name] = files[name][: len(files[name]) // 2]
    root = str(write_folder(tmp_path, files))
    data = Masks(root, val=0)
    for row, name in ((2, r"images/2\.jpg"), (5, r"masks/5\.png")):
        with pytest.raises(DataError, match=rf"'{name}' cannot be read as an image.*data\.faulty=skip"):
            data.read(row)
    # All of them, before the first batch.
    data = Masks(root, val=0, keep="disk")
    data.rows = {"train": np.arange(8), "val": np.arange(0), "test": np.arange(0)}
    with pytest.raises(DataError, match=r"'images/2\.jpg' cannot .* 1 more cannot be used: 'images/5\.jpg'\.$"):
        data.windows("train")
    kept = Masks(root, val=0, faulty="skip")
    assert sum(len(kept.windows(part)) for part in ("train", "test")) == 6
    assert "faulty pairs" in kept.summary()[-1]


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"there are no masks at 'camvit'.*Did you mean 'camvid'"):
        Masks("camvit")
    with pytest.raises(DataError, match="holds no images with masks in the layout 'folders': images/NAME"):
        Masks(str(write_folder(tmp_path / "a", {"cats/1.png": picture()})))
    with pytest.raises(DataError, match="in the layout 'loveda': Train/Urban"):
        list_masks(str(tmp_path / "a"), "loveda")
    with pytest.raises(DataError, match="no whole zip file"):
        (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and no more")
        Masks(str(tmp_path / "bad.zip"))
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"camvid \(CamVid's.*\) is not on this machine; looked for 'camvid'"):
        Masks("camvid")
    with pytest.raises(DataError, match="has colours of shape"):
        Masks(str(write_folder(tmp_path / "b", {**folders(2), "masks/0.png": picture(), "masks/1.png": picture(),
                                                "classes.txt": b"x"})))  # fmt: skip
    with pytest.raises(DataError, match="has colours, and nobody says of what classes"):
        Masks(str(write_folder(tmp_path / "c", {**folders(2), "masks/0.png": picture(), "masks/1.png": picture()})))


def test_names_of_classes_are_given_once(tmp_path):
    root = str(write_folder(tmp_path, {**folders(4), "classes.txt": b"sea\nland\nsea"}))
    with pytest.raises(DataError, match="classes name 'sea' twice"):
        Masks(root)
    with pytest.raises(DataError, match="classes name 'a' twice"):
        Masks(root, classes=("a", "a", "b"))


def test_classes_of_a_known_set_are_its_own(data_folder):
    with pytest.raises(ConfigError, match="the set has its own"):
        Masks("camvid", classes=("a", "b"))


def test_the_digest_changes_with_a_mask(tmp_path):
    files = {**folders(4), "classes.txt": b"a\nb\nc"}
    with zipfile.ZipFile(tmp_path / "one.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    before = list_masks(str(tmp_path / "one.zip")).digest
    files["masks/0.png"] = mask([0, 1, 2, 1])
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    assert list_masks(str(tmp_path / "two.zip")).digest != before


def test_colours_are_distinct():
    assert len(set(distinct_colours(150))) == 150
