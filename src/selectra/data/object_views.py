"""What training and evaluation see of images with objects: torchvision's views, and batches of images of any size."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from selectra.data.image_draws import keys
from selectra.data.object_truth import Truth
from selectra.data.vision import vision
from selectra.errors import ConfigError

Target = dict[str, Tensor]
Rows = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class ObjectAugment:
    """How training changes images with their boxes and masks.

    Args:
        crop: Height and width of what training sees; None for whole images.
        zoom: Least and greatest factor beyond the size at which the whole image fits into the crop.
        flip: Share of images that are mirrored left to right.
        flip_vertical: Share that is turned upside down.
        jitter: Brightness, contrast and saturation change by up to this share.
    """

    crop: tuple[int, int] | None = None
    zoom: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    flip_vertical: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "flip_vertical"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: a share is from 0 to 1")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ConfigError(f"zoom={self.zoom}: least and greatest factor, above 0")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter={self.jitter}: from 0 up to, but not, 1")
        if self.crop is not None and min(self.crop) < 1:
            raise ConfigError(f"crop={self.crop}: needs at least 1 pixel")
        if self.crop is None and self.zoom != (1, 1):
            raise ConfigError(f"zoom={self.zoom} without a crop has no effect; give data.crop, too.")

    def transform(self, fill: tuple[int, ...]) -> Any:
        """torchvision's transform, of images, boxes, masks and labels together.

        Args:
            fill: The colour of what is beside an image.
        """
        v2, kinds = vision("torchvision.transforms.v2"), vision("torchvision.tv_tensors")
        steps: list[Any] = []
        if self.crop is not None:
            beside = {kinds.Image: fill, "others": 0}
            steps.append(v2.ScaleJitter(self.crop, self.zoom, antialias=True))
            steps.append(v2.RandomCrop(self.crop, pad_if_needed=True, fill=beside))
        steps += [v2.RandomHorizontalFlip(self.flip)] if self.flip else []
        steps += [v2.RandomVerticalFlip(self.flip_vertical)] if self.flip_vertical else []
        steps += [v2.ColorJitter(self.jitter, self.jitter, self.jitter)] if self.jitter else []
        return v2.Compose([*steps, v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(min_size=1)])


@dataclass(frozen=True)
class ObjectBatch:
    """Images of any size, what training learns of them, and what evaluation compares with.

    Args:
        images: Pixels.
        targets: Of training: "boxes" (n, 4) as left, top, right, bottom, "labels" (n,), perhaps "masks" (n, h, w), and
            "key" (), from which a model may draw for the image: it follows from seed, pass and image.
        truths: Of evaluation.
        mean: Of every channel, in shares of 255.
        std: Likewise.
    """

    images: tuple[UInt8[Tensor, "c _ _"], ...]
    targets: tuple[Target, ...]
    truths: tuple[Truth, ...]
    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]

    def to(self, device: torch.device | str) -> ObjectBatch:
        """The same on another device; truths stay where they are."""
        targets = tuple({name: value.to(device) for name, value in target.items()} for target in self.targets)
        images = tuple(image.to(device) for image in self.images)
        return ObjectBatch(images, targets, self.truths, self.mean.to(device), self.std.to(device))

    def __len__(self) -> int:
        return len(self.images)

    def agreed(self, most: Callable[[Tensor], Tensor]) -> ObjectBatch:
        """A share of a batch whose targets know, as "least" (2,), the largest height and width in all of it.

        Args:
            most: The greatest numbers of all shares.
        """
        least = most(torch.tensor([image.shape[1:] for image in self.images]).amax(0))
        return replace(self, targets=tuple({**target, "least": least} for target in self.targets))

    @cached_property
    def x(self) -> list[Float[Tensor, "c _ _"]]:
        """Images, standardised by channel."""
        shift, scale = self.mean[:, None, None], self.std[:, None, None]
        if len({image.shape for image in self.images}) == 1:
            return list(((torch.stack(self.images).float() / 255 - shift) / scale).unbind())
        return [(image.float() / 255 - shift) / scale for image in self.images]


class ReadableObjects(Protocol):
    """What is read from."""

    mean_std: Any
    in_memory: bool

    def read(self, row: int) -> tuple[UInt8[Tensor, "c h w"], Truth]: ...


@dataclass(frozen=True)
class Waiting:
    """A batch that is made where it is asked for."""

    views: ObjectViews
    index: list[int]
    epoch: int
    reads: ClassVar[bool] = True
    """Whether `to` may read files, which a training waits for."""

    def to(self, device: torch.device | str) -> ObjectBatch:
        """The batch, made on that device."""
        return self.views.make(self.index, self.epoch, torch.device(device))

    def __len__(self) -> int:
        return len(self.index)


class ObjectViews:
    """A part of a set, in batches by lists of numbers.

    Images that are kept in memory are kept on the device that trains, and their views are made there, but for those of
    worker processes.

    Args:
        objects: Where from.
        rows: The part's images.
        augment: How training sees them; None gives them as they are, for evaluation.
    """

    def __init__(self, objects: ReadableObjects, rows: Rows, augment: ObjectAugment | None) -> None:
        self.objects, self.rows, self.augment = objects, rows, augment
        self.epoch, self.seed = 0, 0
        self.held: dict[int, tuple[Tensor, Target, Truth]] = {}
        mean, std = objects.mean_std
        fill = tuple(round(255 * value) for value in mean.tolist())
        self.transform = None if augment is None else augment.transform(fill)
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.rows)

    def at_pass(self, number: int, seed: int) -> None:
        """Views of pass `number` of a training with this seed come next."""
        self.epoch, self.seed = number, seed
        if self.objects.in_memory and not self.held:
            # Here, because worker processes begin with what this one has, and end with the pass.
            for row in self.rows:
                self.sample(int(row), torch.device("cpu"))

    def __getitem__(self, indices: list[int]) -> Waiting | ObjectBatch:
        if get_worker_info() is not None:
            # A process of its own has no device, and hands out what it made.
            return self.make(indices, self.epoch, torch.device("cpu"))
        return Waiting(self, list(indices), self.epoch)

    def make(self, indices: list[int], epoch: int, device: torch.device) -> ObjectBatch:
        """A batch on a device."""
        found = [self.sample(int(self.rows[i]), device) for i in indices]
        mean, std = self.mean.to(device), self.std.to(device)
        if self.transform is None:
            return ObjectBatch(
                tuple(image for image, _, _ in found), (), tuple(truth for *_, truth in found), mean, std
            )
        views = [self.view(i, epoch, image, target) for i, (image, target, _) in zip(indices, found, strict=True)]
        return ObjectBatch(tuple(image for image, _ in views), tuple(target for _, target in views), (), mean, std)

    def sample(self, row: int, device: torch.device) -> tuple[Tensor, Target, Truth]:
        """An image, what training learns of it, and its truth."""
        if row in self.held and self.held[row][0].device == device:
            return self.held[row]
        image, truth = self.objects.read(row)
        target = {} if self.transform is None else target_of(truth)
        made = (image.to(device), {name: value.to(device) for name, value in target.items()}, truth)
        if self.objects.in_memory:
            self.held[row] = made
        return made

    def view(self, i: int, epoch: int, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        """An image and its target as training sees them in a pass; draws depend on seed, pass and image alone."""
        kinds = vision("torchvision.tv_tensors")
        sample = {
            "image": kinds.Image(image),
            "boxes": kinds.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[1:]),
            "labels": target["labels"],
        }
        if "masks" in target:
            sample["masks"] = kinds.Mask(target["masks"])
        assert self.transform is not None
        key = keys(self.seed, epoch, torch.tensor([i]))[0]
        with drawing(int(key)):
            seen = self.transform(sample)
        boxes, labels = seen["boxes"].as_subclass(Tensor), seen["labels"]
        found = {"boxes": boxes, "labels": labels, "key": key.to(image.device)}
        if "masks" in target:
            masks = seen["masks"].as_subclass(Tensor)
            # A box may lap over a crop that its object does not.
            there = (masks > 0).flatten(1).any(1)
            tight = vision("torchvision.ops").masks_to_boxes(masks[there])
            boxes = tight + tight.new_tensor([0, 0, 1, 1])
            found |= {"boxes": boxes, "labels": labels[there], "masks": masks[there]}
        return seen["image"].as_subclass(Tensor), found


@contextlib.contextmanager
def drawing(key: int) -> Iterator[None]:
    """Draws of torch's own generator begin from a key; behind it they go on as if there had been none."""
    before = torch.get_rng_state()
    # Those of GPUs are left alone.
    torch.default_generator.manual_seed(key % 2**63)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def target_of(truth: Truth) -> Target:
    """What training learns: what is no crowd, inside of the image."""
    kept, (height, width) = ~truth.crowd, truth.size
    left, top, wide, high = truth.boxes[kept].T
    edges = [left.clip(0, width), top.clip(0, height), (left + wide).clip(0, width), (top + high).clip(0, height)]
    target = {
        "boxes": torch.from_numpy(np.stack(edges, 1).astype(np.float32).reshape(-1, 4)),
        "labels": torch.from_numpy(truth.labels[kept]),
    }
    if truth.masks is not None:
        shapes = [shape for shape, keep in zip(truth.masks, kept, strict=True) if keep]
        masks = np.zeros((0, height, width), np.uint8)
        if shapes:
            masks = vision("faster_coco_eval.core.mask").decode(shapes).transpose(2, 0, 1)
        target["masks"] = torch.from_numpy(np.ascontiguousarray(masks))
    return target
