"""Images and the classes of their pixels: splits, crops, standardisation, and batches for training and evaluation."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from selectra.data.image_check import looks_wrong, require_whole
from selectra.data.image_decode import DEEP, UNREADABLE, reason_of, require_bytes
from selectra.data.image_examples import shape_masks
from selectra.data.image_files import Arrays
from selectra.data.images import IMAGENET, MOST_HELD
from selectra.data.mask_batches import HeldMasks, ReadMasks, Rows
from selectra.data.mask_coding import Coding, by_numbers
from selectra.data.mask_files import Layout, MaskListing, list_masks
from selectra.data.mask_views import IGNORED, HeldPairs, MaskAugment
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets

# Orientations in which a camera's picture is to be turned onto its side.
SIDEWAYS = (5, 6, 7, 8)


class FaultyError(DataError):
    """A pair that cannot be used: damaged, or of two sizes."""


@datasets.register("masks", kind="segmentation")
class Masks:
    """Images and masks of CamVid, ADE20K, Cityscapes, LoveDA, Potsdam, Vaihingen, of lists or of folders.

    Layouts: `selectra.data.mask_files.HOW`. Where a set has no labelled test part (ADE20K, Cityscapes, LoveDA), its
    validation part is the test, and a share of the training images validates.

    Args:
        path: "camvid" in SELECTRA_DATA, "shapes" (drawn, needs no file), a folder, or a zip file.
        layout: How files lie; "auto" finds out.
        classes: Names of the classes, where neither the layout nor a file classes.txt says them; with neither they are
            numbers, as many as the training masks have.
        first_label: Number of the first of these classes in masks.
        labels: Numbers of all classes in masks, where they do not follow each other, such as 0 and 255.
        ignore: Labels that do not count beside these classes.
        crop: Training: height and width of what is seen, or one number for both; None for whole images of one size.
        zoom: Training: least and greatest factor by which an image is made larger before it is cropped.
        flip: Training: share of images that are mirrored left to right.
        flip_vertical: Training: share that is turned upside down, for pictures from above.
        jitter: Training: brightness, contrast and saturation change by up to this share.
        short_side: Evaluation: pixels of the shorter side that images are brought to; the scores are brought back to
            the masks' size. None leaves images as they are.
        val: Share of the training images that validate, where the set has no part for that; 0 for none.
        test: Share of the images that test, where the set has no part for that.
        split_seed: Of these draws.
        keep: Hold pairs in memory, and on the device that trains, which needs images of one size; or read them from
            disk every time.
        unknown: What to do with pixels of unknown labels: name them and stop, or let them not count.
        faulty: What to do with pairs that are damaged or of two sizes: name the first and stop, or leave them out.
        standard: Mean and deviation by which channels are standardised: ImageNet's, or 1/2 and 1/2.
    """

    in_channels = 3

    def __init__(
        self,
        path: str = "shapes",
        *,
        layout: Layout = "auto",
        classes: tuple[str, ...] = (),
        first_label: int = 0,
        labels: tuple[int, ...] = (),
        ignore: tuple[int, ...] = (255,),
        crop: int | tuple[int, int] | None = None,
        zoom: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.0,
        flip_vertical: float = 0.0,
        jitter: float = 0.0,
        short_side: int | None = None,
        val: float = 0.1,
        test: float = 0.2,
        split_seed: int = 0,
        keep: Literal["auto", "memory", "disk"] = "auto",
        unknown: Literal["refuse", "ignore"] = "refuse",
        faulty: Literal["refuse", "skip"] = "refuse",
        standard: Literal["imagenet", "half"] = "imagenet",
    ) -> None:
        if not (0 <= val < 1 and 0 < test < 1):
            raise ConfigError(f"val={val}, test={test}: shares from 0 up to, but not, 1, and test above 0")
        if short_side is not None and short_side < 1:
            raise ConfigError(f"short_side={short_side}: needs at least 1 pixel")
        self.listing = example() if path == "shapes" else list_masks(path, layout, classes, first_label, ignore, labels)
        self.unknown, self.faulty, self.short_side = unknown, faulty, short_side
        self.rows = split_rows(self.listing, val, test, split_seed)
        self._readable: dict[str, Rows] = {}
        self._checked: set[str] = set()
        self.coding = self.listing.coding or self._numbered(first_label, ignore)
        self._require_classes()
        first = self._first()
        size = tuple(first.shape[1:]) if crop is None else (crop, crop) if isinstance(crop, int) else tuple(crop)
        self.augment = MaskAugment((size[0], size[1]), zoom, flip, flip_vertical, jitter)
        self.mean_std = tuple(
            torch.tensor(IMAGENET[name] if standard == "imagenet" else (0.5,) * 3) for name in ("mean", "std")
        )
        held = first.numel() * 4 // 3 * len(self.listing.names) <= MOST_HELD and short_side is None
        self.in_memory = keep == "memory" or (
            keep == "auto" and held and self._same_size((first.shape[1], first.shape[2]))
        )

    def _numbered(self, first: int, ignored: Sequence[int]) -> Coding:
        """As many classes as the training masks have numbers."""
        most = first
        for row in self.rows["train"]:
            numbers = self._mask(int(row))
            if numbers.ndim != 2:
                raise DataError(
                    f"the mask '{self.listing.mask_names[row]}' has colours, and nobody says of what classes: save "
                    "masks as numbers, with their names in classes.txt."
                )
            own = [int(number) for number in np.unique(numbers) if number not in ignored]
            most = max(most, *own, most)
            if most - first >= IGNORED:
                raise DataError(
                    f"the mask '{self.listing.mask_names[row]}' has the label {most}, and classes that nobody names "
                    f"are numbered from {first} on, at most {IGNORED} of them: name its labels (data.labels=[0,{most}])"
                    f", or those that do not count (data.ignore=[{most}])."
                )
        return by_numbers([f"class {i}" for i in range(first, most + 1)], first=first, ignored=ignored)

    def _require_classes(self) -> None:
        """Refuse training masks in which all that counts is of one class; what cannot be read is named elsewhere."""
        counted: set[int] = set()
        other: set[int] = set()
        for row in self.readable("train"):
            with suppress(DataError):
                mask = self._mask(int(row))
                classes = self.coding.read(mask, "", unknown_counts=False)
                counted |= set(np.unique(classes[classes != IGNORED]).tolist())
                other |= set() if self.coding.by_colour else set(np.unique(mask[classes == IGNORED]).tolist())
            if len(counted) > 1:
                return
        if not counted and not other:
            return
        own = f"of the class '{self.classes[counted.pop()]}'" if counted else "of none"
        beside = (
            f" Beside it there are the labels {sorted(other)}, which do not count: name all labels of classes in their "
            "order, such as data.labels=[0,255]."
        )
        raise DataError(
            f"all that counts in the training masks of '{self.listing.where}' is {own}, so there is nothing to tell "
            f"apart.{beside if other else ''}"
        )

    def _first(self) -> UInt8[Tensor, "c h w"]:
        rows = self.readable("train")
        if len(rows) == 0:
            raise DataError(f"'{self.listing.where}' has no training pair that can be read.")
        return self.read(int(rows[0]))[0]

    def _same_size(self, size: tuple[int, int]) -> bool:
        """Whether all images have this size, by their headers alone."""
        return all(self._size(row) == size for row in range(len(self.listing.names)))

    def _size(self, row: int) -> tuple[int, int] | None:
        content = self.listing.images.read(row)
        if not isinstance(content, bytes):
            return content.shape[:2]
        try:
            with Image.open(io.BytesIO(content)) as image:
                # Only with its mask it is known whether a picture is turned.
                is_sideways = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
                return None if is_sideways else (image.height, image.width)
        except UNREADABLE:
            # What is damaged is named where it is read.
            return None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels."""
        return self.coding.classes

    @property
    def facts(self) -> dict[str, Any]:
        """What models are built from."""
        size = self.augment.crop[0] if self.augment.crop[0] == self.augment.crop[1] else self.augment.crop
        return {"n_classes": len(self.classes), "in_channels": self.in_channels, "img_size": size}

    def read(self, row: int) -> tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "h w"]]:
        """An image and its mask.

        Raises:
            FaultyError: One of them cannot be read, or they differ in size.
            DataError: The mask has unknown labels.
        """
        name, mask_name = self.listing.names[row], self.listing.mask_names[row]
        mask = self._mask(row)
        image = decoded(self.listing.images.read(row), name, "RGB", (mask.shape[0], mask.shape[1]))
        if image.shape[:2] != mask.shape[:2]:
            raise FaultyError(
                f"the image '{name}' is {image.shape[0]} x {image.shape[1]} pixels, and its mask '{mask_name}' "
                f"{mask.shape[0]} x {mask.shape[1]}: bring them to one size, or leave such pairs out with "
                "data.faulty=skip."
            )
        classes = self.coding.read(mask, mask_name, self.unknown == "refuse")
        return torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(classes)

    def _mask(self, row: int) -> np.ndarray[Any, Any]:
        return decoded(self.listing.masks.read(row), self.listing.mask_names[row], None)

    def readable(self, part: str) -> Rows:
        """The numbers of a part's pairs; with faulty="skip" every pair is tried once, and bad ones are left out."""
        if part not in self._readable:
            rows = self.rows[part]
            kept = rows if self.faulty == "refuse" else [row for row in rows if self._reads(int(row))]
            self._readable[part] = np.asarray(kept, np.int64)
        return self._readable[part]

    def _reads(self, row: int) -> bool:
        try:
            self.read(row)
        except FaultyError:
            return False
        return True

    def hold(self, part: str) -> HeldPairs:
        """A part's pixels and masks."""
        rows = self.readable(part)
        pairs = [self.read(int(row)) for row in rows]
        sizes = {tuple(mask.shape) for _, mask in pairs}
        if len(sizes) > 1:
            raise DataError(
                f"the images of '{self.listing.where}' have several sizes, such as {sorted(sizes)[:2]}; data.keep=disk "
                "takes them."
            )
        size = next(iter(sizes), self.augment.crop)
        pixels = torch.stack([image for image, _ in pairs]) if pairs else torch.zeros(0, 3, *size, dtype=torch.uint8)
        masks = torch.stack([mask for _, mask in pairs]) if pairs else torch.zeros(0, *size, dtype=torch.uint8)
        return HeldPairs(pixels, masks, *self.mean_std)

    @cached_property
    def shares(self) -> tuple[float, ...]:
        """Of the training pixels that count, those of each class; reads all training masks."""
        counts = np.zeros(256, np.int64)
        for row in self.readable("train"):
            mask_name = self.listing.mask_names[int(row)]
            counts += np.bincount(self.coding.read(self._mask(int(row)), mask_name, self.unknown == "refuse").ravel(),
                                  minlength=256)  # fmt: skip
        own = counts[: len(self.classes)]
        return tuple((own / max(1, own.sum())).tolist())

    def windows(self, part: str) -> HeldMasks | ReadMasks:
        """A part, in batches by lists of numbers; the training part with augmentation."""
        if part not in self.rows:
            raise ConfigError(f"there is no part '{part}'; there are {sorted(self.rows)}.")
        augment = self.augment if part == "train" else None
        if self.in_memory:
            return HeldMasks(self.hold(part), augment)
        if self.faulty == "refuse" and part not in self._checked:
            require_whole(self.rows[part], self._looks_odd, self.read, self.listing.names)
            self._checked.add(part)
        return ReadMasks(self, self.readable(part), augment)

    def _looks_odd(self, row: int) -> bool:
        return looks_wrong(self.listing.images, row) or looks_wrong(self.listing.masks, row)

    def summary(self) -> list[str]:
        """The set in a few lines."""
        counts = ", ".join(f"{part} {len(self.rows[part]):,}" for part in ("train", "val", "test"))
        place = "in memory" if self.in_memory else "read from disk"
        seen = " x ".join(map(str, self.augment.crop))
        lines = [f"{self.listing.where}: {len(self.classes)} classes, crops of {seen} ({place}); images: {counts}"]
        if self.listing.alone:
            lines.append(f"{self.listing.alone} images without a mask are not used.")
        if self.faulty == "skip":
            count = sum(len(self.rows[part]) - len(self.readable(part)) for part in ("train", "val"))
            lines.append(f"{count} faulty pairs of the training and validation parts are left out.")
        return lines

    def describe(self) -> dict[str, Any]:
        """What identifies the data, and what using a trained model on new images needs, in JSON's types."""
        rows = hashlib.sha256(b"".join(self.rows[part].tobytes() for part in ("train", "val", "test")))
        mean, std = (each.tolist() for each in self.mean_std)
        return {
            "fingerprint": f"{self.listing.digest}-{rows.hexdigest()[:8]}",
            "images": len(self.listing.names),
            "classes": list(self.classes),
            "colours": [list(colour) for colour in self.coding.colours],
            "img_size": list(self.augment.crop),
            "in_channels": self.in_channels,
            "short_side": self.short_side,
            "mean": mean,
            "std": std,
        }


def decoded(
    content: bytes | np.ndarray[Any, Any], name: str, mode: str | None, size: tuple[int, int] | None = None
) -> np.ndarray[Any, Any]:
    """Pixels (h, w) or (h, w, 3) of a picture.

    Args:
        content: A file's bytes, or pixels.
        name: Of the file, for messages.
        mode: Of the result: that of an image, which is turned as its camera says; or None for a mask, whose numbers
            are kept: those of its palette, its greys, and 0 and 1 where it has one bit.
        size: Height and width of what is annotated. Where they fit the picture only as it lies, so it is annotated.

    Raises:
        FaultyError: It is damaged or no picture.
        DataError: It is an image with more than 8 bits a channel.
    """
    if isinstance(content, np.ndarray):
        return content
    try:
        with Image.open(io.BytesIO(content)) as image:
            if mode is None:
                return _numbers(image)
            require_bytes(image, name)
            turned = ImageOps.exif_transpose(image)
            as_it_lies = size == (image.height, image.width) != (turned.height, turned.width)
            return np.array((image if as_it_lies else turned).convert(mode))
    except DataError:
        raise
    except UNREADABLE as error:
        raise FaultyError(
            f"'{name}' cannot be read as an image: {reason_of(error)}. Remove or replace it, or leave such pairs out "
            "with data.faulty=skip."
        ) from error


def _numbers(mask: Image.Image) -> np.ndarray[Any, Any]:
    """What a mask's pixels are called by: a palette's numbers are the classes; its colours are for the eye."""
    if mask.mode == "1":
        return np.array(mask, np.uint8)
    own = mask.mode if mask.mode in ("L", "P", *DEEP) else "L" if mask.mode == "LA" else "RGB"
    return np.array(mask if own == mask.mode else mask.convert(own))


def example() -> MaskListing:
    """Drawn shapes and their masks."""
    images, masks, classes = shape_masks()
    names = [f"image {i}" for i in range(len(images))]
    digest = hashlib.sha256(images.tobytes() + masks.tobytes()).hexdigest()[:16]
    return MaskListing("shapes", by_numbers(classes), names, names, None, Arrays(images), Arrays(masks), digest, 0)


def split_rows(listing: MaskListing, val: float, test: float, seed: int) -> dict[str, Rows]:
    """The numbers of each part's pairs, rising: by the set's own parts, and by seeded draws where it has none.

    Raises:
        DataError: Nothing is left for training.
    """
    every = np.arange(len(listing.names))
    parts = (
        {"train": every}
        if listing.parts is None
        else {str(p): every[listing.parts == p] for p in np.unique(listing.parts)}
    )
    draw = np.random.default_rng(seed)
    for part, share in (("test", test), ("val", val)):
        if part not in parts and "train" in parts:
            mixed = draw.permutation(parts["train"])
            count = round(share * len(mixed))
            parts[part], parts["train"] = np.sort(mixed[:count]), np.sort(mixed[count:])
    if len(parts.get("train", ())) == 0:
        raise DataError(f"'{listing.where}' has no pairs for training; its parts are {sorted(parts)}.")
    return parts
