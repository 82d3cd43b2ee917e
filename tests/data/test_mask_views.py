"""What training shows of images and masks: the same pixels of both, from any place, alike in memory and from disk."""

from typing import Any

import numpy as np
import pytest
import torch

from selectra.data import Masks
from selectra.data.mask_batches import HeldMasks, ReadMasks, resized
from selectra.data.mask_views import HeldPairs, MaskAugment, viewed
from selectra.errors import ConfigError
from tests.data.pictures import encoded, pixels, write_folder

MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.25, 0.3])


def pairs(n: int = 4, size: tuple[int, int] = (9, 12)) -> HeldPairs:
    """Images whose red is their mask's label times ten."""
    masks = torch.randint(0, 20, (n, *size), dtype=torch.uint8)
    images = torch.stack([masks * 10, torch.randint(0, 256, masks.shape).byte(), masks], 1)
    return HeldPairs(images, masks, MEAN, STD)


def test_no_change_is_no_change():
    held = pairs()
    x, y = held.view(torch.arange(4), MaskAugment((9, 12)), seed=3, epoch=1)
    assert torch.equal(y, held.labels.long()) and torch.allclose(x, held.plain(torch.arange(4)), atol=1e-6)


@pytest.mark.parametrize("crop", [(5, 7), (9, 12), (14, 20)])
def test_image_and_mask_move_together(crop):
    held, augment = pairs(64), MaskAugment(crop, flip=0.5, flip_vertical=0.5)
    x, y = held.view(torch.arange(64), augment, seed=0, epoch=0)
    assert x.shape == (64, 3, *crop) and y.shape == (64, *crop) and y.dtype == torch.long
    red = (x[:, 0] * STD[0] + MEAN[0]) * 255 / 10
    seen = y != 255
    assert torch.allclose(red[seen], y[seen].float(), atol=1e-3)
    # Outside is the mean colour and does not count.
    assert (x[:, 0][~seen] == 0).all() and bool((~seen).any()) == (crop[0] > 9)
    again = held.view(torch.arange(64), augment, seed=0, epoch=0)
    assert torch.equal(x, again[0]) and not torch.equal(x, held.view(torch.arange(64), augment, 0, 1)[0])
    alone = held.view(torch.tensor([5]), augment, seed=0, epoch=0)
    assert torch.equal(alone[0][0], x[5]) and torch.equal(alone[1][0], y[5])


def test_every_place_is_seen_and_no_more_than_the_image():
    held = HeldPairs(torch.zeros(1, 3, 9, 12).byte(), torch.arange(108).view(1, 9, 12).byte(), MEAN, STD)
    seen: set[int] = set()
    for epoch in range(1000):
        y = held.view(torch.tensor([0]), MaskAugment((3, 3)), 0, epoch)[1]
        seen |= set(y.flatten().tolist())
    assert seen == set(range(108))


def test_scale_makes_things_larger():
    mask = torch.zeros(1, 40, 40, dtype=torch.uint8)
    mask[:, 16:24, 16:24] = 1
    image = mask[:, None].expand(-1, 3, -1, -1) * 200
    u = torch.full((1, 8), 0.5)
    for factor, area in ((0.5, 16), (1.0, 64), (2.0, 256)):
        x, y = viewed(image, mask, u, MaskAugment((40, 40), (factor, factor)), MEAN, STD)
        assert abs(int((y == 1).sum()) - area) <= 0.3 * area
        bright = (x[:, 0] * STD[0] + MEAN[0]) * 255 > 100
        assert (bright == (y == 1))[y != 255].float().mean() > 0.98


def test_light_changes_images_alone():
    held = pairs()
    plain, y = held.view(torch.arange(4), MaskAugment((9, 12)), 0, 0)
    x, other = held.view(torch.arange(4), MaskAugment((9, 12), jitter=0.5), 0, 0)
    assert torch.equal(y, other) and not torch.allclose(x, plain)
    grey = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    x, _ = viewed(
        grey, grey[:, 0], torch.tensor([[0.5] * 5 + [1.0, 0.2, 0.7]]), MaskAugment((4, 4), jitter=0.5), MEAN, STD
    )
    # Grey has no contrast and no colour: light alone acts.
    assert torch.allclose((x * STD[:, None, None] + MEAN[:, None, None]) * 255, torch.tensor(150.0), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"crop": (0, 4)}, r"crop=\(0, 4\)"),
        ({"crop": (4, 4), "zoom": (2.0, 1.0)}, r"zoom=\(2.0, 1.0\)"),
        ({"crop": (4, 4), "flip": 1.5}, "flip=1.5"),
        ({"crop": (4, 4), "jitter": 1.0}, "jitter=1.0"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        MaskAugment(**arguments)


def pieces_of(part: Any, rows: list[int]) -> Any:
    return part[rows].to("cpu").pieces


def test_memory_and_disk_show_the_same():
    views = {"crop": (24, 40), "zoom": (0.5, 2.0), "flip": 0.5, "jitter": 0.2}
    held, read = (Masks("shapes", keep=keep, **views).windows("train") for keep in ("memory", "disk"))
    assert isinstance(held, HeldMasks) and isinstance(read, ReadMasks)
    for part in (held, read):
        part.at_pass(2, 7)
    (one,), (other,) = (pieces_of(part, [3, 9, 4]) for part in (held, read))
    assert torch.equal(one.y, other.y) and torch.allclose(one.x, other.x, atol=1e-5)


def test_images_of_several_sizes_come_in_pieces(tmp_path):
    files = {}
    for i, size in enumerate([(8, 8), (8, 8), (8, 12), (10, 8), (8, 8), (8, 12)]):
        files[f"images/{i}.png"] = encoded(pixels(i, size))
        files[f"masks/{i}.png"] = encoded(np.full(size, i % 3, np.uint8))
    data = Masks(str(write_folder(tmp_path, files)), crop=8, test=0.5, val=0, classes=("a", "b", "c"))
    assert not data.in_memory
    test = data.windows("test")
    found = pieces_of(test, [0, 1, 2])
    assert sum(len(piece) for piece in found) == 3
    assert all(piece.x.shape[2:] == piece.y.shape[1:] for piece in found)
    train = data.windows("train")
    (piece,) = pieces_of(train, [0, 1, 2])
    assert piece.x.shape == (3, 3, 8, 8)
    small = Masks(str(tmp_path), crop=8, test=0.5, val=0, classes=("a", "b", "c"), short_side=4)
    piece = pieces_of(small.windows("test"), [0])[0]
    assert min(piece.x.shape[2:]) == 4 and min(piece.y.shape[1:]) == 8


def test_an_image_is_brought_to_its_shorter_side():
    assert resized(torch.zeros(3, 20, 30).byte(), 10).shape == (3, 10, 15)
    assert resized(torch.zeros(3, 20, 30).byte(), None).shape == (3, 20, 30)


def test_shares_of_the_classes_are_of_training_pixels_that_count():
    data = Masks("shapes")
    rows = data.rows["train"]
    counts = torch.stack([data.read(int(row))[1] for row in rows]).flatten().bincount(minlength=5)
    assert data.shares == pytest.approx((counts / counts.sum()).tolist())
