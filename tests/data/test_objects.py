"""COCO's and Pascal VOC's forms as they are, and what is wrong with files of both."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval.core import mask as coding

from selectra.data import Objects
from selectra.errors import ConfigError, DataError
from selectra.tasks.detection import coco_annotations
from tests.data.pictures import encoded, pixels, write_folder, write_zip

HEIGHT, WIDTH = 24, 32
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]


def picture(seed: int = 0, size: tuple[int, int] = (HEIGHT, WIDTH)) -> bytes:
    return encoded(pixels(seed, size))


def coco(images: int = 4, first: int = 10, folder: str = "images/train") -> tuple[dict[str, Any], dict[str, bytes]]:
    """COCO's file of so many images with a cat and a dog each, and the pictures."""
    listed = [
        {"id": first + i, "file_name": f"{first + i:06}.png", "height": HEIGHT, "width": WIDTH} for i in range(images)
    ]
    notes = []
    for i in range(images):
        notes.append({"id": 2 * i + 1, "image_id": first + i, "category_id": 3, "bbox": [2, 3, 10, 8], "area": 80,
                      "iscrowd": 0, "segmentation": [[2, 3, 12, 3, 12, 11, 2, 11]]})  # fmt: skip
        notes.append({"id": 2 * i + 2, "image_id": first + i, "category_id": 7, "bbox": [15.5, 4, 12.25, 16],
                      "area": 150.5, "iscrowd": 0, "segmentation": [[16, 4, 28, 4, 28, 20, 16, 20]]})  # fmt: skip
    files = {f"{folder}/{each['file_name']}": picture(each["id"]) for each in listed}
    return {"images": listed, "annotations": notes, "categories": CATEGORIES}, files


def write_coco(root: Path, content: dict[str, Any], files: dict[str, bytes], name: str = "instances_train2017") -> str:
    return str(write_folder(root, {**files, f"annotations/{name}.json": json.dumps(content).encode()}))


def voc(name: str, things: list[tuple[str, str, int]], size: tuple[int, int] = (HEIGHT, WIDTH)) -> bytes:
    """An image's XML; things are a name, corners, and whether it is difficult."""
    objects = ""
    for what, box, hard in things:
        corners = zip(("xmin", "ymin", "xmax", "ymax"), box.split(), strict=True)
        sides = "".join(f"<{side}>{value}</{side}>" for side, value in corners)
        objects += f"<object><name>{what}</name><difficult>{hard}</difficult><bndbox>{sides}</bndbox></object>"
    height, width = size
    return (f"<annotation><filename>{name}.png</filename><size><width>{width}</width><height>{height}</height>"
            f"<depth>3</depth></size>{objects}</annotation>").encode()  # fmt: skip


def write_voc(root: Path, changed: dict[str, bytes] | None = None, count: int = 5) -> str:
    files = {f"VOC2007/JPEGImages/{i:03}.png": picture(i) for i in range(count)}
    things = [("cat", "3 4 12 11", 0), ("dog", "16 5 28 20", 0)]
    files |= {f"VOC2007/Annotations/{i:03}.xml": voc(f"{i:03}", things) for i in range(count)}
    parts = {"train": range(3), "val": range(3, 4), "test": range(4, count)}
    files |= {
        f"VOC2007/ImageSets/Main/{part}.txt": "".join(f"{i:03}\n" for i in rows).encode()
        for part, rows in parts.items()
    }
    return str(write_folder(root, files | (changed or {})))


def test_bccd(data_folder):
    data = Objects("bccd", degenerate="skip")
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 205, "val": 87, "test": 72}
    assert data.classes == ("Platelets", "RBC", "WBC") and data.problems.counts["degenerate"] == 2
    assert "2 boxes without area or outside are left out." in data.summary()
    assert sum(len(entry.marks) for entry in data.listing.entries) == 4886
    with pytest.raises(DataError, match=r"a box of 'RBC' in 'BCCD/Annotations/BloodImage_00338\.xml' has no area "
                                        r"\(left 504, top 337, width 0, height 0\).*degenerate=skip"):  # fmt: skip
        Objects("bccd")
    joined = Objects("bccd", degenerate="skip", join=True)
    assert len(joined.windows("train")) == 292 and len(joined.windows("val")) == 0


def test_coco_mini(data_folder):
    data = Objects("coco_mini", masks=True)
    assert len(data.classes) == 80 and sum(len(rows) for rows in data.rows.values()) == 80
    assert len(data.rows["test"]) == 40 and data.classes[0] == "person"
    image, truth = data.read(0)
    assert truth.masks is not None and len(truth.masks) == len(truth.boxes) and image.shape[1:] == truth.size
    # Boxes and areas are those of the masks that the set was made from.
    for box, area, shape in zip(truth.boxes, truth.areas, truth.masks, strict=True):
        assert coding.area(shape) == area and np.abs(coding.toBbox(shape) - box).max() <= 1
    chosen = Objects("coco_mini", only=("000000000025", "000000000030"), overfit=True)
    assert [len(chosen.windows(part)) for part in ("train", "val", "test")] == [2, 2, 2]


def test_coco_as_published(tmp_path):
    first, pictures = coco(folder="train2017")
    second, others = coco(2, 50, "val2017")
    second["images"][0]["file_name"] = "000051.png"
    second["images"][1]["file_name"] = "000050.png"
    write_coco(tmp_path, first, pictures)
    path = write_coco(tmp_path, second, others, "instances_val2017")
    (tmp_path / "annotations" / "captions_val2017.json").write_text("{}")
    data = Objects(path, val=0.25)
    assert data.classes == ("cat", "dog")
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 3, "val": 1, "test": 2}
    assert data.listing.entries[4].file == "val2017/000051.png"
    _, truth = data.read(1)
    assert truth.boxes.tolist() == [[2, 3, 10, 8], [15.5, 4, 12.25, 16]] and truth.areas.tolist() == [80, 150.5]
    assert truth.labels.tolist() == [0, 1] and truth.masks is None
    assert Objects(path, classes=("dog",)).read(0)[1].labels.tolist() == [0]


def test_coco_beside_the_images_in_a_zip_file(tmp_path):
    files = {}
    for part, first in (("train", 10), ("valid", 10)):
        content, pictures = coco(3, first, part)
        files |= {**pictures, f"{part}/_annotations.coco.json": json.dumps(content).encode()}
    data = Objects(str(write_zip(tmp_path / "set.zip", files)), val=0)
    assert [len(data.rows[part]) for part in ("train", "val", "test")] == [3, 0, 3]
    assert [entry.file.partition("/")[0] for entry in data.listing.entries] == ["train"] * 3 + ["valid"] * 3


def test_the_forms_of_masks_are_the_same(tmp_path):
    """Polygons, run lengths as numbers, and run lengths as text."""
    content, files = coco(3)
    rectangle = np.zeros((HEIGHT, WIDTH), np.uint8)
    rectangle[4:20, 16:28] = 1
    flat = rectangle.T.ravel()
    edges = (np.flatnonzero(np.diff(flat)) + 1).tolist()
    runs = np.diff(np.array([0, *edges, len(flat)])).tolist()
    content["annotations"][3]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": runs}
    text = coding.encode(np.asfortranarray(rectangle))
    content["annotations"][5]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": text["counts"].decode()}
    data = Objects(write_coco(tmp_path, content, files), masks=True, test=0.3, val=0)
    for row in range(3):
        truth = data.read(row)[1]
        assert truth.masks is not None and (coding.decode(truth.masks[1]) == rectangle).all()
    batch = data.windows("train")[[0]].to("cpu")
    assert batch.targets[0]["masks"].shape == (2, HEIGHT, WIDTH)
    # With masks, training's boxes are the masks' own.
    assert batch.targets[0]["boxes"][1].tolist() == [16, 4, 28, 20]


def test_voc(tmp_path):
    hard = voc("000", [("cat", "3 4 12 11", 0), ("dog", "16 5 28 20", 1)])
    path = write_voc(tmp_path, {"VOC2007/Annotations/000.xml": hard, "VOC2007/JPEGImages/extra.png": picture(9)})
    data = Objects(path)
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 3, "val": 1, "test": 1}
    # All names are of VOC's twenty.
    assert len(data.classes) == 20 and data.listing.alone == 1
    _, truth = data.read(0)
    # Corners count pixels from 1, and the last is inside.
    assert truth.boxes.tolist() == [[2, 3, 10, 8], [15, 4, 13, 16]] and truth.areas.tolist() == [80, 208]
    assert truth.crowd.tolist() == [False, True] and truth.ignored is not None
    assert truth.ignored.tolist() == [False, True] and Objects(path, difficult=True).read(0)[1].crowd.sum() == 0
    batch = data.windows("train")[[0]].to("cpu")
    assert batch.targets[0]["labels"].tolist() == [data.classes.index("cat")]
    # What evaluation gets: no crowd, inside of which anything would be excused.
    assert [each["iscrowd"] for each in coco_annotations(truth)] == [0, 0]
    assert [each["area"] for each in coco_annotations(truth)] == [80, 2e10]


def test_voc_lists_that_say_train_and_val_together(tmp_path):
    files = {"VOC2007/ImageSets/Main/trainval.txt": b"000\n001\n002\n003\n", "VOC2007/ImageSets/Main/val.txt": b"003\n",
             "VOC2007/ImageSets/Main/train.txt": b""}  # fmt: skip
    data = Objects(write_voc(tmp_path, files), classes=("cat", "dog"))
    assert [len(data.rows[part]) for part in ("train", "val", "test")] == [3, 1, 1] and data.classes == ("cat", "dog")


def coco_with(tmp_path: Path, change: Any, **arguments: Any) -> Objects:
    content, files = coco()
    change(content, files)
    return Objects(write_coco(tmp_path, content, files), val=0, test=0.25, **arguments)


def _box(box: Any) -> Any:
    return lambda content, _: content["annotations"][2].update(bbox=box)


BAD_COCO = {
    "no area": (_box([2, 3, 0, 8]), "degenerate", r"the box of annotation 3 of image id 11 in 'annotations/instances_"
                r"train2017\.json' \('images/train/000011\.png'\) has no area \(left 2, top 3, width 0, height 8\)"),
    "outside": (_box([40, 3, 5, 8]), "degenerate",
                r"image id 11 .* lies outside of the image \(left 40.*32 x 24 pixels"),
    "not finite": (_box([2, 3, float("nan"), 8]), "degenerate", r"is \[2, 3, nan, 8\], not four numbers"),
    "three": (_box([2, 3, 4]), "degenerate", r"is \[2, 3, 4\], not four numbers"),
    "none": (lambda content, _: content["annotations"][2].pop("bbox"), "degenerate", "annotation 3 .* is not there"),
    "absent image": (lambda content, _: content["annotations"][2].update(image_id=99), "faulty",
                     r"annotation 3 in '.*json' is of image id 99, which the file does not list"),
    "absent file": (lambda _, files: files.pop("images/train/000011.png"), "faulty",
                    r"image id 11 in '.*json' is the file '000011\.png', which is not there"),
    "unknown class": (lambda content, _: content["annotations"][2].update(category_id=5), "unknown",
                      r"annotation 3 of image id 11 .* has category id 5, .*categories are 3 cat, 7 dog"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_COCO)
def test_bad_annotations_of_coco_are_named_or_left_out(tmp_path, name):
    change, kind, message = BAD_COCO[name]
    with pytest.raises(DataError, match=rf"{message}.* Correct it, or leave .* data\.{kind}=skip"):
        coco_with(tmp_path / "refused", change)
    data = coco_with(tmp_path / "skipped", change, **{kind: "skip"})
    assert data.problems.counts == {kind: 1} and "1 " in data.summary()[-1]
    others = {"degenerate": "unknown", "unknown": "faulty", "faulty": "degenerate"}
    with pytest.raises(DataError, match=message):
        coco_with(tmp_path / "other", change, **{others[kind]: "skip"})


def test_categories_of_one_name_are_one_class(tmp_path):
    def twice(content: dict[str, Any], _: Any) -> None:
        (cat,) = (each for each in content["categories"] if each["id"] == 3)
        content["categories"] = [*content["categories"], {**cat, "id": 99}]
        content["annotations"][0]["category_id"] = 99

    data, before = (coco_with(tmp_path / name, change) for name, change in (("a", twice), ("b", lambda *_: None)))
    assert data.classes == before.classes
    labels, others = ([mark.label for entry in each.listing.entries for mark in entry.marks] for each in (data, before))
    assert labels == others


def test_nothing_to_learn_is_named(tmp_path):
    def empty(content: dict[str, Any], _: Any) -> None:
        content["annotations"] = []

    def crowds(content: dict[str, Any], _: Any) -> None:
        for each in content["annotations"]:
            each["iscrowd"] = 1

    def nameless(content: dict[str, Any], _: Any) -> None:
        content["categories"] = []

    for i, change in enumerate((empty, crowds)):
        with pytest.raises(DataError, match=r"none of the \d training images of .* has an object that counts"):
            coco_with(tmp_path / str(i), change)
    with pytest.raises(DataError, match="the list 'categories' is empty, so there are no classes"):
        coco_with(tmp_path / "nameless", nameless, unknown="skip")


def test_damaged_files_of_coco_are_named(tmp_path):
    content, files = coco()
    root = Path(write_coco(tmp_path, content, files))
    note = root / "annotations" / "instances_train2017.json"
    whole = note.read_bytes()
    note.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        DataError, match=r"'annotations/instances_train2017\.json' is no whole JSON file: .*fetch it again"
    ):
        Objects(str(root), faulty="skip")
    note.write_text('{"images": []}')
    with pytest.raises(DataError, match="has no list 'annotations' and no list 'categories'"):
        Objects(str(root))


def test_bad_images_are_named_or_left_out(tmp_path):
    content, files = coco(8)
    files["images/train/000012.png"] = files["images/train/000012.png"][:200]
    files["images/train/000013.png"] = picture(3, (20, 20))
    path = write_coco(tmp_path, content, files)
    data = Objects(path, val=0, test=0.2)
    with pytest.raises(DataError, match=r"'images/train/000012\.png' cannot be read as an image.*data\.faulty=skip"):
        data.read(2)
    with pytest.raises(DataError, match=r"image id 13 .* is 20 x 20 pixels, and its annotations are of one of 32 x 24"):
        data.read(3)
    # All of them, before the first batch; what is annotated says which size an image must have.
    data.rows = {"train": np.arange(8), "val": np.arange(0), "test": np.arange(0)}
    with pytest.raises(DataError, match=r"000012\.png' cannot .* 1 more cannot be used: 'images/train/000013\.png'\.$"):
        data.windows("train")
    kept = Objects(path, val=0, test=0.2, faulty="skip")
    assert sum(len(kept.windows(part)) for part in ("train", "test")) == 6


BAD_VOC = {
    "truncated": ({"VOC2007/Annotations/001.xml": voc("001", [("cat", "3 4 12 11", 0)])[:90]}, "faulty",
                  r"'VOC2007/Annotations/001\.xml' is no whole XML file"),
    "no image": ({"VOC2007/Annotations/777.xml": voc("777", []), "VOC2007/ImageSets/Main/train.txt": b"000\n001\n777"},
                 "faulty", r"'VOC2007/Annotations/777\.xml' is of an image that is not there"),
    "no annotation": ({"VOC2007/ImageSets/Main/train.txt": b"000\n001\n888"}, "faulty",
                      r"'VOC2007/ImageSets/Main/train\.txt' lists '888', and there is no '.*/Annotations/888\.xml'"),
    "unknown": ({"VOC2007/Annotations/001.xml": voc("001", [("ant", "3 4 12 11", 0)])}, "unknown",
                r"'VOC2007/Annotations/001\.xml' has an object 'ant'; the classes are \['cat', 'dog'\]"),
    "no area": ({"VOC2007/Annotations/001.xml": voc("001", [("cat", "3 4 3 11", 0)])}, "degenerate",
                r"a box of 'cat' in 'VOC2007/Annotations/001\.xml' has no area"),
    "no number": ({"VOC2007/Annotations/001.xml": voc("001", [("cat", "3 4 x 11", 0)])}, "degenerate",
                  r"a box of 'cat' in 'VOC2007/Annotations/001\.xml' lacks a side"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VOC)
def test_bad_files_of_voc_are_named_or_left_out(tmp_path, name):
    changed, kind, message = BAD_VOC[name]
    path = write_voc(tmp_path, changed)
    with pytest.raises(DataError, match=rf"{message}.*data\.{kind}=skip"):
        Objects(path, classes=("cat", "dog"))
    skipped: dict[str, Any] = {kind: "skip"}
    data = Objects(path, classes=("cat", "dog"), **skipped)
    assert data.problems.counts == {kind: 1}


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(DataError, match=r"no annotated images at 'bcdd'.*Did you mean 'bccd'"):
        Objects("bcdd")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no files"):
        Objects(str(tmp_path / "empty"))
    with pytest.raises(DataError, match=r"no annotated images in the layout 'coco'.*The other layout is 'voc'"):
        Objects(str(write_folder(tmp_path / "pictures", {"a.png": picture()})))
    content, files = coco()
    path = write_coco(tmp_path / "coco", content, files)
    with pytest.raises(DataError, match=r"data\.classes names 'dig', which no category has.*Did you mean 'dog'"):
        Objects(path, classes=("dig",))
    with pytest.raises(DataError, match=r"data\.only names '000019'.*Did you mean '00001\d'"):
        Objects(path, only=("000019",))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val": 1.0}, "val=1.0"),
        ({"flip": 1.5}, "flip=1.5"),
        ({"zoom": (2.0, 1.0), "crop": 8}, "zoom="),
        ({"zoom": (1.0, 2.0)}, "without a crop has no effect"),
        ({"jitter": 1.0}, "jitter=1.0"),
        ({"crop": 0}, "crop="),
        ({"overfit": True, "join": True}, "exclude each other"),
        ({"classes": ("a",)}, "the drawn set has its own"),
    ],
)
def test_what_cannot_be_is_named(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Objects("shapes", **arguments)
