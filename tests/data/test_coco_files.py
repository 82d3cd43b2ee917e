"""Files of COCO's form whose records are not what they should be."""

import json

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
