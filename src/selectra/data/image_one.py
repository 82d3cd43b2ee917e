"""Images read from disk one by one, each with torchvision's augmentation, in as many processes as are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from selectra.data.image_draws import keys, uniforms
from selectra.data.image_views import (
    CROP_RATIO,
    ERASED_RATIO,
    ERASED_SHARE,
    N_MIXING,
    Augment,
    mix,
    mixing_tables,
)
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

    Every image is changed by draws of its own, from a generator seeded by the training's seed, the pass and the image,
    and so is it mixed with its partner: the image that follows it in the batch.

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
        self.mixes = augment is not None and augment.mixes
        """Whether an image's view has a part of another's: then lists of numbers may be pairs of image and partner."""
        self.tables = {} if augment is None else mixing_tables(augment)

    def __len__(self) -> int:
        return len(self.rows)

    def at_pass(self, number: int, seed: int) -> None:
        """Views of pass `number` of a training with this seed come next."""
        self.epoch, self.seed = number, seed

    def __getitem__(self, indices: Sequence[int] | Sequence[tuple[int, int]]) -> Any:
        """A batch.

        Args:
            indices: Numbers of images. Where these are a part of a batch that is mixed, pairs of an image and its
                partner, which may lie beyond the part; else the partner is the next, and the last one's the first.
        """
        pairs = paired(indices)
        own, others = ([pair[i] for pair in pairs] for i in (0, 1))
        views = {i: self._view(i) for i in dict.fromkeys([*own, *others] if self.mixes else own)}
        x, y = torch.stack([views[i] for i in own]), self._labels(own)
        if not self.mixes or self.augment is None:
            return self.make(x, y)
        key = keys(self.seed + 2**32, self.epoch, torch.tensor(own))
        other = torch.stack([views[i] for i in others])
        x, share = mix(x, other, uniforms(key, N_MIXING), self.augment, self.tables)
        first, second = (functional.one_hot(each, self.n_classes).float() for each in (y, self._labels(others)))
        return self.make(x, y, torch.lerp(second, first, share[:, None]))

    def _labels(self, indices: Sequence[int]) -> Int64[Tensor, " b"]:
        return torch.from_numpy(self.images.listing.labels[self.rows[indices]])

    def _view(self, i: int) -> Float[Tensor, "c h w"]:
        """An image as it is before it is mixed, standardised."""
        mean, std = (each[:, None, None] for each in self.images.mean_std)
        x = self._one(i).sub_(mean).div_(std)
        if self.steps is None or self.steps.erase is None:
            return x
        with self._drawing(i, mixing=2):
            return self.steps.erase(x)

    def _one(self, i: int) -> Tensor:
        row = int(self.rows[i])
        if self.steps is None:
            return self.images.read(row).float() / 255
        with self._drawing(i):
            image = self.images.raw(row) if self.steps.crops else self.images.read(row)
            return self.steps.change(image).float() / 255

    def _drawing(self, i: int, mixing: int = 0) -> Any:
        return _Seeded(int(keys(self.seed + mixing * 2**32, self.epoch, torch.tensor([i]))[0]))


def paired(indices: Sequence[int] | Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Every image of a batch with the one that follows it; pairs as they are."""
    return [
        each if isinstance(each, tuple) else (each, following)
        for each, following in zip(indices, [*indices[1:], *indices[:1]], strict=True)
    ]  # pyright: ignore[reportReturnType]


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
        """Boxes filled with the mean colour, behind standardisation."""
