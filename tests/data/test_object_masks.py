"""Masks that are none: each is named before training."""

import pytest

from selectra.data import Objects
from selectra.errors import DataError
from tests.data.test_objects import HEIGHT, WIDTH, coco, coco_with, write_coco


def coded(counts):
    return {"size": [HEIGHT, WIDTH], "counts": counts}


BAD = {
    "numbers that do not add up": (coded([10, 5]), "run lengths that add up to 15, and the image has 768 pixels"),
    "less than nothing": (coded([800, -32]), "run lengths that are no whole numbers from 0 on"),
    "words": (coded(["768"]), "run lengths that are no whole numbers"),
    "another size": ({"size": [5, 5], "counts": [25]}, r"is of size \[5, 5\], and the image of \[24, 32\]"),
    "no size": ({"size": None, "counts": [768]}, "is of size None"),
    "cut text": (coded("abc"), "run lengths that cannot be decoded"),
    "text of another image": (coded("zz"), "run lengths that cannot be decoded: .*20 pixels"),
    "a lone surrogate": (coded("\ud800"), "run lengths that cannot be decoded"),
    "a number": (coded(5), "run lengths that are neither numbers nor text: 5"),
    "two corners": ([[1, 2, 3, 4]], "is no list of polygons with three corners or more"),
    "half a corner": ([[2, 3, 12, 3, 12, 11, 2]], "has a polygon of 7 numbers"),
    "not a number": ([[2, 3, 12, 3, float("nan"), 11]], "has a corner at nan; corners are finite numbers"),
    "endless": ([[2, 3, 12, 3, float("inf"), 11]], "has a corner at inf"),
    "far away": ([[2, 3, 12, 3, 10**400, 11]], "has a corner at 1000"),
    "a word": ([[2, 3, 12, 3, "12", 11]], "has a corner at 12"),
    "text": ("mask", "is no list of polygons"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_named_before_training(tmp_path, name):
    shape, message = BAD[name]

    def change(content, _):
        content["annotations"][2].update(segmentation=shape)

    with pytest.raises(DataError, match=rf"'images/train/000011\.png' \(image id 11 in 'annotations/instances_train201"
                                        rf"7\.json'\): the mask of annotation 3 .*{message}.*masks=false"):  # fmt: skip
        coco_with(tmp_path / "masks", change, masks=True)
    # Boxes alone need none.
    coco_with(tmp_path / "boxes", change)


def test_an_object_without_a_mask_is_named(tmp_path):
    with pytest.raises(DataError, match=r"image id 11 .*: annotation 3 has no mask, and data\.masks=true asks for"):
        coco_with(tmp_path, lambda content, _: content["annotations"][2].update(segmentation=None), masks=True)


def test_masks_of_images_of_unknown_size_are_checked_when_read(tmp_path):
    content, files = coco()
    for image in content["images"]:
        del image["height"], image["width"]
    content["annotations"][2].update(segmentation=coded([10, 5]))
    data = Objects(write_coco(tmp_path, content, files), masks=True, val=0, test=0.25)
    assert data.read(0)[1].masks is not None
    with pytest.raises(DataError, match=r"image id 11 .*: the mask of annotation 3 .* add up to 15"):
        data.read(1)
