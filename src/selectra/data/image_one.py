"""Images read from disk one by one, each with torchvision's augmentation, in as many processes as are asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional

from selectra.data.image_draws import keys
from selectra.data.image_views import CROP_RATIO, ERASED_RATIO, ERASED_SHARE, Augment
from selectra.data.vision import vision


class ReadableImages(Protocol):
    """What is read from."""

    size: tuple[int, int]
    mean_std: Any
    listing: Any

    def read(self, row: int) -> UInt8[Tensor, "c h w"]: ...

    def raw(self, row: int) -> UInt8[Tensor, "c h w"]: ...


class OneByOne:
    """A part whose images are read every time.

    Every image is changed by draws of its own, from a generator seeded by the training's seed, the pass and the image;
    a mixture, as torchvision has it, is one for a batch, seeded by the batch's first image.

    Args:
        images: Where from.
        rows: The part's images.
        augment: How training sees them; None shows them as they are.
        make: Makes a batch of images, classes and mixed targets.
    """

    def __init__(
        self, images: ReadableImages, rows: np.ndarray[Any, Any], augment: Augment | None, make: Callable[..., Any]
    ) -> None:
        self.images, self.rows, self.augment, self.make = images, rows, augment, make
        self.epoch, self.seed = 0, 0
        self.n_classes = len(images.listing.classes)
        self.steps = None if augment is None else Steps(augment, images.size)

    def __len__(self) -> int:
        return len(self.rows)

    def at_pass(self, number: int, seed: int) -> None:
        """Views of pass `number` of a training with this seed come next."""
        self.epoch, self.seed = number, seed

    def __getitem__(self, indices: list[int]) -> Any:
        mean, std = (each[:, None, None] for each in self.images.mean_std)
        x = torch.stack([self._one(i) for i in indices]).sub_(mean).div_(std)
        y = torch.from_numpy(self.images.listing.labels[self.rows[indices]])
        if self.augment is None or self.steps is None:
            return self.make(x, y)
        with self._drawing(indices[0], mixing=1):
            x = self.steps.erase_each(x, lambda i: self._drawing(indices[i], mixing=2))
            return self.make(*_mixed(self.augment, self.n_classes, x, y))

    def _one(self, i: int) -> Tensor:
        row = int(self.rows[i])
        if self.steps is None:
            return self.images.read(row).float() / 255
        with self._drawing(i):
            image = self.images.raw(row) if self.steps.crops else self.images.read(row)
            return self.steps.change(image).float() / 255

    def _drawing(self, i: int, mixing: int = 0) -> Any:
        return _Seeded(int(keys(self.seed + mixing * 2**32, self.epoch, torch.tensor([i]))[0]))


class _Seeded:
    """Inside the block PyTorch's generator draws from a seed; outside it goes on as if nothing had been."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.default_generator.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.before)


class Steps:
    """torchvision's transforms of one image, in the order of its reference recipe."""

    def __init__(self, augment: Augment, size: tuple[int, int]) -> None:
        v2 = vision("torchvision.transforms.v2")
        self.crops = augment.scale is not None
        steps: list[Any] = []
        if augment.scale is not None:
            ratio = (1 / CROP_RATIO, CROP_RATIO)
            steps.append(v2.RandomResizedCrop(list(size), scale=(augment.scale, 1.0), ratio=ratio, antialias=True))
        if augment.crop:
            steps.append(v2.RandomCrop(list(size), padding=augment.crop, padding_mode="reflect"))
        steps += [v2.RandomHorizontalFlip(augment.flip)] if augment.flip else []
        steps += [v2.RandomVerticalFlip(augment.flip_vertical)] if augment.flip_vertical else []
        steps += [v2.RandAugment(*augment.randaugment)] if augment.randaugment else []
        self.change = v2.Compose(steps) if steps else torch.nn.Identity()
        ratio = (1 / ERASED_RATIO, ERASED_RATIO)
        self.erase = v2.RandomErasing(augment.erase, scale=ERASED_SHARE, ratio=ratio) if augment.erase else None

    def erase_each(self, x: Tensor, drawing: Callable[[int], Any]) -> Tensor:
        """Boxes filled with the mean colour, behind standardisation."""
        if self.erase is None:
            return x
        erased = []
        for i, image in enumerate(x):
            with drawing(i):
                erased.append(self.erase(image))
        return torch.stack(erased)


def _mixed(augment: Augment, n_classes: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The batch blended with itself in another order, or with boxes of it, by torchvision."""
    if not augment.mixes:
        return x, y, None
    v2 = vision("torchvision.transforms.v2")
    kinds = [
        kind(alpha=alpha, num_classes=n_classes)
        for kind, alpha in ((v2.MixUp, augment.mixup), (v2.CutMix, augment.cutmix))
        if alpha > 0
    ]
    mixed, target = v2.RandomChoice(kinds)(x, y)
    assert isinstance(target, Tensor)
    # A single image mixes with itself.
    return mixed, y, target if target.dim() == 2 else functional.one_hot(y, n_classes).float()
