"""Views of images with their boxes and masks, and batches."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from selectra.data import Objects
from selectra.data.object_truth import Truth
from selectra.data.object_views import ObjectAugment, ObjectViews, drawing, target_of

SIZE = (40, 60)


class Squares:
    """Images of zeros with a bright rectangle in the box."""

    in_memory = True
    mean_std = (torch.tensor([0.2, 0.2, 0.2]), torch.tensor([0.25, 0.25, 0.25]))

    def read(self, row: int):
        image = torch.zeros(3, *SIZE, dtype=torch.uint8)
        left, top, wide, high = 8 + row, 6, 20, 14
        image[:, top : top + high, left : left + wide] = 200
        box = np.array([[left, top, wide, high]], np.float64)
        return image, Truth(row, SIZE, box, np.array([1]), np.array([280.0]), np.array([False]))


def bright(image: torch.Tensor) -> list[int]:
    """Left, top, right, bottom of what is bright."""
    rows, columns = torch.nonzero(image[0] > 100, as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize(
    "augment",
    [
        ObjectAugment(),
        ObjectAugment(flip=1.0),
        ObjectAugment(flip_vertical=1.0),
        ObjectAugment(crop=(60, 60), zoom=(0.8, 1.3), flip=0.5),
        ObjectAugment(crop=(20, 90), zoom=(1.0, 2.0), flip=0.5, jitter=0.1),
        ObjectAugment(crop=(30, 30), zoom=(2.0, 3.0)),
    ],
)
def test_boxes_follow_what_they_are_around(augment):
    views = ObjectViews(Squares(), np.arange(6), augment)
    seen = 0
    for number in range(4):
        views.at_pass(number, 0)
        batch = views[list(range(6))].to("cpu")
        for image, target in zip(batch.images, batch.targets, strict=True):
            assert image.shape[1:] == (SIZE if augment.crop is None else augment.crop)
            for box in target["boxes"].tolist():
                assert np.abs(np.array(box) - bright(image)).max() <= 1.5
                seen += 1
    assert seen > 6


def test_masks_follow_and_boxes_are_theirs():
    data = Objects("shapes", masks=True, crop=(40, 40), zoom=(0.7, 2.5), flip=0.5)
    windows = data.windows("train")
    cut = 0
    for number in range(3):
        windows.at_pass(number, 0)
        batch = windows[list(range(12))].to("cpu")
        for image, target in zip(batch.images, batch.targets, strict=True):
            for box, mask in zip(target["boxes"].long().tolist(), target["masks"], strict=True):
                assert mask.shape == image.shape[1:] == (40, 40) and mask.any()
                assert bright(mask[None] * 200) == box
                # Shapes are brighter than the ground, which the noise does not hide.
                assert image[:, mask > 0].float().mean() > image[:, 0, 0].float().mean() - 60
                cut += box[0] == 0 or box[2] == 40
            assert len(target["boxes"]) == len(target["labels"])
    assert cut > 0


def test_draws_depend_on_seed_pass_and_image_alone():
    data = Objects("shapes", crop=32, zoom=(1.0, 2.0), flip=0.5, jitter=0.3)

    def seen(seed: int, number: int, rows: list[int], workers: int = 0) -> list[torch.Tensor]:
        windows = data.windows("train")
        windows.at_pass(number, seed)
        if not workers:
            return list(windows[rows].to("cpu").images)
        loader = DataLoader(windows, batch_size=None, sampler=[rows], num_workers=workers, collate_fn=lambda b: b)  # pyright: ignore
        return [image for batch in loader for image in batch.to("cpu").images]

    first = seen(0, 0, [3, 5])
    torch.manual_seed(9)
    assert torch.equal(first[1], seen(0, 0, [5])[0])
    assert not torch.equal(first[0], seen(0, 1, [3])[0]) and not torch.equal(first[0], seen(1, 0, [3])[0])
    assert all(torch.equal(a, b) for a, b in zip(first, seen(0, 0, [3, 5], workers=1), strict=True))


def test_draws_leave_the_generator_as_it_was():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with drawing(-5):
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_sees_images_as_they_are():
    data = Objects("shapes", masks=True, crop=32, flip=1.0)
    batch = data.windows("test")[[0, 1]].to("cpu")
    row = int(data.rows["test"][0])
    image, truth = data.read(row)
    assert torch.equal(batch.images[0], image) and batch.targets == () and batch.truths[0].image == row
    assert (batch.truths[0].boxes == truth.boxes).all() and len(batch) == 2
    mean, std = data.mean_std
    expected = (image.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.allclose(batch.x[0], expected)


def test_training_learns_no_crowds_and_nothing_outside():
    truth = Truth(0, (20, 30), np.array([[-5.0, 2, 20, 30], [4, 4, 5, 5]]), np.array([2, 0]), np.array([1.0, 1]),
                  np.array([False, True]))  # fmt: skip
    target = target_of(truth)
    assert target["boxes"].tolist() == [[0, 2, 15, 20]] and target["labels"].tolist() == [2]
    empty = Truth(0, (20, 30), np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), ())
    assert target_of(empty)["boxes"].shape == (0, 4) and target_of(empty)["masks"].shape == (0, 20, 30)


def test_images_without_objects_are_seen():
    class Empty(Squares):
        def read(self, row: int):
            none = Truth(row, SIZE, np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool), ())
            return torch.zeros(3, *SIZE, dtype=torch.uint8), none

    views = ObjectViews(Empty(), np.arange(2), ObjectAugment(crop=(30, 30), zoom=(0.5, 1.5), flip=0.5))
    batch = views[[0, 1]].to("cpu")
    assert batch.targets[0]["boxes"].shape == (0, 4) and batch.targets[0]["masks"].shape == (0, 30, 30)


def test_images_in_memory_are_read_once():
    class Counted(Squares):
        reads = 0

        def read(self, row: int):
            self.reads += 1
            return super().read(row)

    objects = Counted()
    views = ObjectViews(objects, np.arange(3), ObjectAugment())
    for number in range(3):
        views.at_pass(number, 0)
        views[[0, 1, 2]].to("cpu")
    assert objects.reads == 3
    objects.in_memory = False
    views = ObjectViews(objects, np.arange(3), ObjectAugment())
    views.at_pass(0, 0)
    views[[0, 1]].to("cpu")
    views[[0, 1]].to("cpu")
    assert objects.reads == 7
