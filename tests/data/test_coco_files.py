"""Files of COCO's form whose records are not what they should be."""

import json
from typing import Any

import pytest

from selectra.data import Objects
from selectra.errors import DataError
from tests.data.pictures import write_folder
from tests.data.test_objects import coco, coco_with, write_coco


def test_a_repeated_image_id_is_an_error(tmp_path):
    def change(content, _):
        content["images"][2]["id"] = 10

    with pytest.raises(DataError, match=r"'annotations/instances_train2017\.json' gives the id 10 to two images, "
                                        r"'000010\.png' and '000012\.png', .*: number images anew"):  # fmt: skip
        coco_with(tmp_path, change, faulty="skip")


def test_one_image_is_not_in_two_parts(tmp_path):
    first, pictures = coco(folder="pictures")
    second, others = coco(2, 13, "pictures")
    notes = {"train": first, "val": second}
    files = {f"annotations/instances_{part}.json": json.dumps(content).encode() for part, content in notes.items()}
    path = str(write_folder(tmp_path, {**pictures, **others, **files}))
    with pytest.raises(DataError, match=r"'pictures/000013\.png' \(image id 13 in 'annotations/instances_val\.json'\) "
                       r"is listed already, as .*instances_train\.json'\)\. .*data\.faulty=skip"):  # fmt: skip
        Objects(path, val=0)
    data = Objects(path, val=0, faulty="skip")
    assert {part: len(rows) for part, rows in data.rows.items()} == {"train": 4, "val": 0, "test": 1}
    assert data.problems.counts == {"faulty": 1}


def test_one_image_has_one_id(tmp_path):
    content, files = coco()
    content["images"][3]["file_name"] = content["images"][1]["file_name"]
    with pytest.raises(DataError, match=r"'images/train/000011\.png' \(image id 13 .* is listed already, as .*id 11"):
        Objects(write_coco(tmp_path, content, files), val=0)


def _field(section: str, row: int, **fields: Any) -> Any:
    return lambda content, _: content[section][row].update(fields)


def _record(section: str, row: int, record: Any) -> Any:
    return lambda content, _: content[section].__setitem__(row, record)


BAD = {
    "area of text": (_field("annotations", 2, area="x"), "annotation 3 of image id 11 .* has area 'x'"),
    "area below nothing": (_field("annotations", 2, area=-1), "annotation 3 of image id 11 .* has area -1"),
    "area not a number": (_field("annotations", 2, area=float("nan")), "has area nan"),
    "crowd of text": (_field("annotations", 2, iscrowd="0"), "annotation 3 of image id 11 .* has iscrowd '0', not 0 o"),
    "crowd of two": (_field("annotations", 2, iscrowd=2), "has iscrowd 2, not 0 or 1"),
    "an annotation that is a list": (_record("annotations", 2, [1, 2]), r"has the annotation \[1, 2\], which is no re"),
    "an image id that is a list": (_field("annotations", 2, image_id=[11]), r"annotation 3 .* is of image id \[11\]"),
    "ids of other types": (_field("annotations", 2, image_id="11"), "annotation 3 .* is of image id '11', which the"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_fields_of_other_types_are_named_or_left_out(tmp_path, name):
    change, message = BAD[name]
    with pytest.raises(DataError, match=rf"{message}.* data\.faulty=skip"):
        coco_with(tmp_path / "refused", change)
    data = coco_with(tmp_path / "skipped", change, faulty="skip")
    assert data.problems.counts == {"faulty": 1} and sum(len(entry.marks) for entry in data.listing.entries) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, _: content["images"][1].pop("id"), r"lists the image \{'file_name': '000011\.png'.*an id"),
        (_record("images", 1, "000011.png"), r"lists the image '000011\.png'; an image has an id"),
        (_field("images", 1, height="x"), "image id 11 in .* has height 'x', no whole number of pixels"),
        (_field("images", 1, width=0), "image id 11 in .* has width 0, no whole"),
        (_field("images", 1, width=[32]), r"image id 11 in .* has width \[32\], no whole"),
    ],
)
def test_images_with_fields_of_other_types_are_named_or_left_out(tmp_path, change, message):
    with pytest.raises(DataError, match=rf"{message}.* data\.faulty=skip"):
        coco_with(tmp_path / "refused", change)
    data = coco_with(tmp_path / "skipped", change, faulty="skip")
    # The image and its two annotations.
    assert data.problems.counts == {"faulty": 3} and len(data.listing.entries) == 3


@pytest.mark.parametrize("record", [{"id": 3}, {"name": "cat"}, {"id": [3], "name": "cat"}, "cat"])
def test_categories_without_name_or_id_are_named(tmp_path, record):
    with pytest.raises(DataError, match=r"'annotations/instances_train2017\.json' has the category .*an id .*a name"):
        coco_with(tmp_path, lambda content, _: content.update(categories=[record, *content["categories"][1:]]))


def test_an_area_that_is_null_is_that_of_the_box(tmp_path):
    data = coco_with(tmp_path, _field("annotations", 2, area=None))
    assert [mark.area for mark in data.listing.entries[1].marks] == [80, 150.5]
    data = coco_with(tmp_path / "other", _field("annotations", 3, area=None))
    assert [mark.area for mark in data.listing.entries[1].marks] == [80, 12.25 * 16]


def test_ids_of_several_types_are_in_order(tmp_path):
    def change(content, _):
        content["images"][0]["id"] = "b"
        content["annotations"][0]["image_id"] = content["annotations"][1]["image_id"] = "b"
        content["categories"] = [{"id": "a", "name": "cat"}, {"id": 7, "name": "dog"}]
        for annotation in content["annotations"][::2]:
            annotation["category_id"] = "a"

    data = coco_with(tmp_path, change)
    assert data.classes == ("dog", "cat") and data.listing.entries[3].file == "images/train/000010.png"
    assert [mark.label for mark in data.listing.entries[3].marks] == [1, 0]
