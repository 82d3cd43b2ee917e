"""Images and their classes: splits, sizes, standardisation, and batches for training and evaluation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from selectra.data.image_check import looks_wrong, require_whole
from selectra.data.image_decode import CorruptError, decode, fitted
from selectra.data.image_files import list_images
from selectra.data.image_one import OneByOne
from selectra.data.image_split import Rows, split_images
from selectra.data.image_views import Augment, Held, ImageBatch
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets

Part = Literal["train", "val", "test"]
MOST_HELD = 4 * 2**30
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Waiting:
    """A batch that is made where it is asked for: `to` takes images from those that lie on that device."""

    images: HeldImages
    index: list[int]
    epoch: int

    def to(self, device: torch.device | str) -> ImageBatch:
        """The batch, made on that device."""
        return self.images.make(self.index, self.epoch, device)

    def __len__(self) -> int:
        return len(self.index)


class HeldImages:
    """A part whose images lie in memory, and after the first batch on the device that trains.

    Args:
        held: The images.
        augment: How training sees them; None shows them as they are.
    """

    def __init__(self, held: Held, augment: Augment | None) -> None:
        self.held = held if augment is None else held.with_tables(augment)
        self.augment, self.epoch, self.seed = augment, 0, 0

    def __len__(self) -> int:
        return len(self.held.labels)

    def at_pass(self, number: int, seed: int) -> None:
        """Views of pass `number` of a training with this seed come next."""
        self.epoch, self.seed = number, seed

    def __getitem__(self, indices: list[int]) -> Waiting | ImageBatch:
        if get_worker_info() is not None:
            # A process of its own has no device, and hands out what it made.
            return self.make(indices, self.epoch, "cpu")
        return Waiting(self, list(indices), self.epoch)

    def make(self, index: list[int], epoch: int, device: torch.device | str) -> ImageBatch:
        """A batch on a device, to which all images go first."""
        if self.held.pixels.device != torch.empty(0, device=device).device:
            self.held = self.held.to(device)
        rows = torch.tensor(index, device=device)
        return self.held.batch(rows, self.augment, self.seed, epoch)


@datasets.register("images", kind="image")
class Images:
    """Images in folders of classes, in zip or parquet files, in torchvision's sets, or in public sets by name.

    Layouts: CLASS/NAME.jpg, or PART/CLASS/NAME.jpg with the parts train, val and test, in folders, in a zip file, or in
    zip files in a folder; parquet with the columns image and label, as Hugging Face has them.

    Args:
        path: A folder or file; "cifar10_jpeg", "fashion_mnist" or "ucmerced" in SELECTRA_DATA; "torchvision:NAME";
            "shapes" (drawn) or "digits" (scikit-learn's), which need no file.
        img_size: Pixels of the sides, or height and width; images of another size are made to cover it and cut around
            the middle. None: the images' own, if all have the same.
        in_channels: 1 for grey, 3 for colour; None as the images are.
        val: Share of the training images of each class that validate, where the set has no part for that; 0 for none.
        test: Share of the images of each class that are for the test, where the set has no part for that.
        per_class: Training images of each class; None takes all.
        split_seed: Of these draws.
        keep: Hold images in memory, and on the device that trains; or read them from disk every time.
        corrupt: What to do with files that cannot be read: name them and stop, or leave them out and count them. "skip"
            decodes every file once before the training; "refuse" does so with images in memory, and of images on disk
            looks at headers, checksums and ends (`image_check`), so that damage inside a file may show only later.
        standard: Mean and deviation by which channels are standardised: those of the training images, ImageNet's, or
            1/2 and 1/2; "auto" is the first for images in memory and the second for others.
        download: Whether torchvision may load its set.
        crop: Training: pixels by which an image is moved at most, a random crop of the padded image.
        scale: Training: least share of the image that a crop of random size keeps; None for no such crop.
        flip: Training: share of images that are mirrored left to right.
        flip_vertical: Training: share that is turned upside down.
        randaugment: Training: RandAugment's number of operations and magnitude out of 30.
        erase: Training: share of images in which a box is erased.
        mixup: Training: parameter of mixup's Beta distribution; 0 for none.
        cutmix: Training: that of cutmix; with both, each is for half of the images.
    """

    def __init__(
        self,
        path: str = "shapes",
        *,
        img_size: int | tuple[int, int] | None = None,
        in_channels: int | None = None,
        val: float = 0.1,
        test: float = 0.2,
        per_class: int | None = None,
        split_seed: int = 0,
        keep: Literal["auto", "memory", "disk"] = "auto",
        corrupt: Literal["refuse", "skip"] = "refuse",
        standard: Literal["auto", "train", "imagenet", "half"] = "auto",
        download: bool = False,
        crop: int = 0,
        scale: float | None = None,
        flip: float = 0.0,
        flip_vertical: float = 0.0,
        randaugment: tuple[int, int] | None = None,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        if not (0 <= val < 1 and 0 < test < 1):
            raise ConfigError(f"val={val}, test={test}: shares from 0 up to, but not, 1, and test above 0")
        if per_class is not None and per_class < 1:
            raise ConfigError(f"per_class={per_class}: needs at least 1")
        self.listing = list_images(path, download)
        self.corrupt = corrupt
        self._readable: dict[str, Rows] = {}
        self._checked: set[str] = set()
        self.rows = split_images(self.listing, val, test, per_class, split_seed)
        if len(self.listing.classes) == 1:
            raise DataError(
                f"all images of '{path}' are of one class, '{self.listing.classes[0]}', so there is nothing to tell "
                "apart: each class needs a folder, or a label, of its own."
            )
        self.augment = Augment(crop, scale, flip, flip_vertical, randaugment, erase, mixup, cutmix)
        self.size, self.in_channels = self._first_image(img_size, in_channels)
        held = self.in_channels * self.size[0] * self.size[1] * len(self.listing.labels) <= MOST_HELD
        if randaugment is not None and keep == "memory":
            raise ConfigError(
                "randaugment runs image by image, and images held in memory are changed a batch at a time; "
                "set data.keep to 'disk', or data.randaugment to none."
            )
        self.in_memory = keep == "memory" or (keep == "auto" and held and randaugment is None)
        self.standard = standard if standard != "auto" else "train" if self.in_memory else "imagenet"
        if self.standard == "imagenet" and self.in_channels != 3:
            raise ConfigError(f"standard='imagenet' is for 3 channels, not {self.in_channels}; take 'half' or 'train'.")
        if self.standard == "train" and not self.in_memory:
            raise ConfigError("standard='train' measures images in memory; with keep='disk' take 'imagenet' or 'half'.")

    def _first_image(self, img_size: int | tuple[int, int] | None, channels: int | None) -> tuple[tuple[int, int], int]:
        """Size and channels, from the first training image that can be read where they are not given."""
        for row in self.rows["train"]:
            try:
                shape = decode(self.listing, int(row), channels).shape
                break
            except CorruptError:
                if self.corrupt == "refuse":
                    raise
        else:
            raise DataError(f"'{self.listing.where}' has no training image that can be read.")
        size = img_size or (shape[1], shape[2])
        size = (size, size) if isinstance(size, int) else size
        if min(size) < 1:
            raise ConfigError(f"img_size={img_size}: needs at least 1 pixel")
        self.given_size = img_size is not None
        return size, channels or shape[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels."""
        return self.listing.classes

    @property
    def facts(self) -> dict[str, Any]:
        """What models are built from."""
        size = self.size[0] if self.size[0] == self.size[1] else self.size
        return {"n_classes": len(self.classes), "in_channels": self.in_channels, "img_size": size}

    def read(self, row: int) -> UInt8[Tensor, "c h w"]:
        """One image in the set's size.

        Raises:
            DataError: It cannot be read, or has another size and none is given.
        """
        image = decode(self.listing, row, self.in_channels)
        if not self.given_size and tuple(image.shape[1:]) != self.size:
            raise DataError(
                f"'{self.listing.names[row]}' is {image.shape[1]} x {image.shape[2]} pixels, and others are "
                f"{self.size[0]} x {self.size[1]}: set data.img_size (`selectra compare`: "
                "--img-size), to which all are brought."
            )
        return fitted(image, self.size)

    def raw(self, row: int) -> UInt8[Tensor, "c h w"]:
        """One image in its own size."""
        return decode(self.listing, row, self.in_channels)

    def readable(self, part: str) -> Rows:
        """The numbers of a part's images; with corrupt="skip" every file is tried once, and bad ones are left out."""
        if part not in self._readable:
            rows = self.rows[part]
            kept = rows if self.corrupt == "refuse" else [row for row in rows if self._decodes(int(row))]
            self._readable[part] = np.asarray(kept, np.int64)
        return self._readable[part]

    def _decodes(self, row: int) -> bool:
        try:
            decode(self.listing, row, self.in_channels)
        except CorruptError:
            return False
        return True

    def hold(self, part: str) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """A part's pixels and labels."""
        rows = self.readable(part)
        pixels = torch.empty(len(rows), self.in_channels, *self.size, dtype=torch.uint8)
        for i, row in enumerate(rows):
            pixels[i] = self.read(int(row))
        return pixels, torch.from_numpy(self.listing.labels[rows])

    @cached_property
    def train(self) -> tuple[UInt8[Tensor, "n c h w"], Int64[Tensor, " n"]]:
        """The training part in memory."""
        return self.hold("train")

    @cached_property
    def mean_std(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """By which channels are standardised, in shares of 255."""
        if self.standard == "imagenet":
            return torch.tensor(IMAGENET["mean"]), torch.tensor(IMAGENET["std"])
        if self.standard == "half":
            return torch.full((self.in_channels,), 0.5), torch.full((self.in_channels,), 0.5)
        counts = torch.stack([torch.bincount(c.flatten().long(), minlength=256) for c in self.train[0].unbind(1)])
        values, shares = torch.arange(256).double() / 255, counts.double() / counts.sum(1, keepdim=True)
        mean = shares @ values
        std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
        return mean.float(), std.clamp(min=1 / 255).float()

    def windows(self, part: str) -> HeldImages | OneByOne:
        """A part, in batches by lists of numbers; the training part with augmentation."""
        if part not in self.rows:
            raise ConfigError(f"there is no part '{part}'; there are {sorted(self.rows)}.")
        augment = self.augment if part == "train" else None
        if self.in_memory:
            pixels, labels = self.train if part == "train" else self.hold(part)
            return HeldImages(Held(pixels, labels, *self.mean_std, len(self.classes)), augment)
        shown = OneByOne(self, self.readable(part), augment, ImageBatch)
        if self.corrupt == "refuse" and part not in self._checked:
            # Crops of random size take images of any size.
            any_size = self.given_size or (shown.steps is not None and shown.steps.crops)
            read, size = (self.raw, None) if any_size else (self.read, self.size)
            odd = partial(looks_wrong, self.listing.source, size=size)
            require_whole(self.rows[part], odd, read, self.listing.names)
            self._checked.add(part)
        return shown

    def summary(self) -> list[str]:
        """The set in a few lines."""
        counts = ", ".join(f"{part} {len(self.rows[part]):,}" for part in ("train", "val", "test"))
        place = "in memory" if self.in_memory else "read from disk"
        lines = [
            f"{self.listing.where}: {len(self.classes)} classes, {self.in_channels} x {self.size[0]} x {self.size[1]} "
            f"({place}); images: {counts}"
        ]
        if self.listing.ignored:
            lines.append(f"{self.listing.ignored} other files are not read.")
        if self.corrupt == "skip":
            count = sum(len(self.rows[part]) - len(self.readable(part)) for part in ("train", "val"))
            lines.append(f"{count} damaged files of the training and validation parts are left out.")
        return lines

    def describe(self) -> dict[str, Any]:
        """What identifies the data, and what using a trained model on new images needs, in JSON's types."""
        rows = hashlib.sha256(b"".join(self.rows[part].tobytes() for part in ("train", "val", "test")))
        mean, std = (each.tolist() for each in self.mean_std)
        return {
            "fingerprint": f"{self.listing.digest}-{rows.hexdigest()[:8]}",
            "images": len(self.listing.labels),
            "classes": list(self.classes),
            "img_size": list(self.size),
            "in_channels": self.in_channels,
            "mean": mean,
            "std": std,
        }
