"""Images with objects on them, their boxes, classes and masks: splits, views, and batches."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from selectra.data.image_check import looks_wrong, require_whole
from selectra.data.images import IMAGENET, MOST_HELD
from selectra.data.mask_coding import distinct_colours, require_once
from selectra.data.masks import FaultyError, decoded, split_rows
from selectra.data.object_files import Layout, ObjectListing, list_objects, shapes
from selectra.data.object_truth import Policy, Problems, Truth, check_masks, truth_of
from selectra.data.object_views import ObjectAugment, ObjectViews, Rows
from selectra.errors import ConfigError, DataError
from selectra.registry import datasets
from selectra.spec import nearest


@datasets.register("objects", kind="detection")
class Objects:
    """Images and objects of BCCD, COCO, Pascal VOC, or of your own in these forms.

    Layouts: `selectra.data.object_files.HOW`. Where a set has no test part, its validation part is the test, and a
    share of the training images validates.

    Args:
        path: "bccd" or "coco_mini" in SELECTRA_DATA, "shapes" (drawn, needs no file), a folder, or a zip file.
        layout: How files lie; "auto" finds out.
        classes: Names of the classes, where not all that the annotations name are wanted (COCO), or where others are
            an error (VOC).
        masks: Give the masks of objects, which Mask R-CNN needs.
        only: Names of images without suffix, where not all are wanted.
        overfit: Training, validation and test are all the same images: can a network learn them at all?
        join: Train on the validation part, too; nothing validates then.
        crop: Training: height and width of what is seen, or one number for both; None for whole images.
        zoom: Training: least and greatest factor beyond the size at which the whole image fits into the crop.
        flip: Training: share of images that are mirrored left to right.
        flip_vertical: Training: share that is turned upside down, for pictures from above.
        jitter: Training: brightness, contrast and saturation change by up to this share.
        val: Share of the training images that validate, where the set has no part for that; 0 for none.
        test: Share of the images that test, where the set has no part for that.
        split_seed: Of these draws.
        keep: Hold images in memory, on the device that trains; or read them from disk every time.
        difficult: Whether objects that Pascal VOC marks as difficult count as others do; else nothing learns from them,
            and finding each once (at an overlap of the threshold, at least a half) is no error.
        degenerate: What to do with boxes without area, outside of their image, or not of four numbers: name the first
            and stop, or leave them out.
        unknown: Likewise with annotations of unknown classes.
        faulty: Likewise with damaged images and files of annotations, annotations of images that are not there, and
            images of another size than annotated.
        standard: Mean and deviation by which channels are standardised: ImageNet's, or 1/2 and 1/2.
    """

    in_channels = 3

    def __init__(
        self,
        path: str = "shapes",
        *,
        layout: Layout = "auto",
        classes: tuple[str, ...] = (),
        masks: bool = False,
        only: tuple[str, ...] = (),
        overfit: bool = False,
        join: bool = False,
        crop: int | tuple[int, int] | None = None,
        zoom: tuple[float, float] = (1.0, 1.0),
        flip: float = 0.0,
        flip_vertical: float = 0.0,
        jitter: float = 0.0,
        val: float = 0.1,
        test: float = 0.2,
        split_seed: int = 0,
        keep: Literal["auto", "memory", "disk"] = "auto",
        difficult: bool = False,
        degenerate: Policy = "refuse",
        unknown: Policy = "refuse",
        faulty: Policy = "refuse",
        standard: Literal["imagenet", "half"] = "imagenet",
    ) -> None:
        if not (0 <= val < 1 and 0 < test < 1):
            raise ConfigError(f"val={val}, test={test}: shares from 0 up to, but not, 1, and test above 0")
        if overfit and join:
            raise ConfigError("overfit and join exclude each other: with overfit, all parts are the same images.")
        self.problems = Problems({"degenerate": degenerate, "unknown": unknown, "faulty": faulty})
        drawn = path == "shapes"
        self.listing = shapes() if drawn else list_objects(path, layout, classes, difficult, self.problems)
        require_once("classes", self.listing.classes)
        if drawn and classes:
            raise ConfigError(f"classes={classes}: the drawn set has its own, {self.listing.classes}; leave it out.")
        self.masks, self.faulty = masks, faulty
        self._check_masks()
        taken = self._taken(only)
        same: dict[str, Rows] = dict.fromkeys(("train", "val", "test"), taken)
        self.rows = same if overfit else self._split(taken, val, test, split_seed)
        if join:
            self.rows["train"] = np.sort(np.concatenate([self.rows["train"], self.rows["val"]]))
            self.rows["val"] = self.rows["val"][:0]
        self._require_objects()
        self._readable: dict[str, Rows] = {}
        self._checked: set[str] = set()
        size = (crop, crop) if isinstance(crop, int) else crop
        self.augment = ObjectAugment(size, zoom, flip, flip_vertical, jitter)
        self.mean_std = tuple(
            torch.tensor(IMAGENET[name] if standard == "imagenet" else (0.5,) * 3) for name in ("mean", "std")
        )
        first = self._first()
        self.first_size = (first.shape[1], first.shape[2])
        # With masks an image is as many pictures as it has objects.
        each = 1 + 2 * masks
        self.in_memory = keep == "memory" or (
            keep == "auto" and each * first.numel() * len(self.listing.entries) <= MOST_HELD
        )

    def _check_masks(self) -> None:
        """Look at the masks; where annotations do not say an image's size, they are checked when it is read."""
        for entry in self.listing.entries if self.masks else ():
            if entry.size is not None:
                check_masks(entry, entry.size)

    def _require_objects(self) -> None:
        """Refuse a training part without an object that counts."""
        entries = [self.listing.entries[int(row)] for row in self.rows["train"]]
        if not any(not (mark.crowd or mark.ignored) for entry in entries for mark in entry.marks):
            annotated = sum(len(entry.marks) for entry in self.listing.entries)
            raise DataError(
                f"none of the {len(entries):,} training images of '{self.listing.where}' has an object that counts, so "
                f"there is nothing to learn; all {len(self.listing.entries):,} images together have {annotated:,} "
                f"objects of {list(self.listing.classes)}."
            )

    def _taken(self, only: tuple[str, ...]) -> Rows:
        """The numbers of the images that are wanted."""
        stems = [entry.file.rpartition("/")[2].rpartition(".")[0] or entry.file for entry in self.listing.entries]
        absent = next((name for name in only if name not in stems), None)
        if absent is not None:
            raise DataError(f"data.only names '{absent}', and '{self.listing.where}' has no such image."
                            f"{nearest(absent, stems)}")  # fmt: skip
        wanted = set(only)
        return np.array([i for i, stem in enumerate(stems) if not only or stem in wanted], np.int64)

    def _split(self, taken: Rows, val: float, test: float, seed: int) -> dict[str, Rows]:
        listed = [entry.part for entry in self.listing.entries]
        if "test" not in listed:
            listed = ["test" if part == "val" else part for part in listed]
        split = all(part is not None for part in listed) and len(set(listed)) > 1
        rows = split_rows(_Parted(self.listing, listed if split else None), val, test, seed)  # pyright: ignore[reportArgumentType]
        kept = {part: np.intersect1d(numbers, taken) for part, numbers in rows.items()}
        if len(kept["train"]) == 0:
            raise DataError(f"'{self.listing.where}' has no images for training among those that are wanted.")
        return kept

    def _first(self) -> UInt8[Tensor, "c h w"]:
        rows = self.readable("train")
        if len(rows) == 0:
            raise DataError(f"'{self.listing.where}' has no training image that can be read.")
        return self.read(int(rows[0]))[0]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of labels."""
        return self.listing.classes

    @property
    def facts(self) -> dict[str, Any]:
        """What models are built from; the size is that of the crops, or of the first training image."""
        size = self.augment.crop or self.first_size
        return {
            "n_classes": len(self.classes),
            "in_channels": self.in_channels,
            "img_size": size[0] if size[0] == size[1] else size,
        }

    def read(self, row: int) -> tuple[UInt8[Tensor, "c h w"], Truth]:
        """An image and its objects.

        Raises:
            FaultyError: It cannot be read, or is of another size than annotated.
            DataError: Its masks are damaged or not there.
        """
        entry = self.listing.entries[row]
        pixels = decoded(self.listing.images.read(row), entry.file, "RGB", entry.size)
        size = (pixels.shape[0], pixels.shape[1])
        if entry.size is not None and entry.size != size:
            raise FaultyError(
                f"{entry.said} is {size[1]} x {size[0]} pixels, and its annotations are of one of {entry.size[1]} x "
                f"{entry.size[0]}: replace one of them, or leave such images out with data.faulty=skip."
            )
        if self.masks and entry.size is None:
            check_masks(entry, size)
        return torch.from_numpy(pixels).permute(2, 0, 1), truth_of(entry, row, size, self.masks)

    def readable(self, part: str) -> Rows:
        """The numbers of a part's images; with faulty="skip" every image is tried once, and bad ones are left out."""
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

    def windows(self, part: str) -> ObjectViews:
        """A part, in batches by lists of numbers; the training part with augmentation."""
        if part not in self.rows:
            raise ConfigError(f"there is no part '{part}'; there are {sorted(self.rows)}.")
        if self.faulty == "refuse" and part not in self._checked:
            require_whole(self.rows[part], self._looks_odd, self.read, [entry.file for entry in self.listing.entries])
            self._checked.add(part)
        return ObjectViews(self, self.readable(part), self.augment if part == "train" else None)

    def _looks_odd(self, row: int) -> bool:
        return looks_wrong(self.listing.images, row, self.listing.entries[row].size)

    def summary(self) -> list[str]:
        """The set in a few lines."""
        counts = ", ".join(f"{part} {len(self.rows[part]):,}" for part in ("train", "val", "test"))
        place = "in memory" if self.in_memory else "read from disk"
        objects = sum(len(entry.marks) for entry in self.listing.entries)
        lines = [f"{self.listing.where}: {len(self.classes)} classes, {objects:,} objects ({place}); images: {counts}"]
        if self.listing.alone:
            lines.append(f"{self.listing.alone} pictures without annotations are not used.")
        left_out = {
            "boxes without area or outside": self.problems.counts["degenerate"],
            "annotations of unknown classes": self.problems.counts["unknown"],
            "annotations of what is not there": self.problems.counts["faulty"],
            "faulty images of the training and validation parts": sum(
                len(self.rows[part]) - len(self.readable(part)) for part in ("train", "val")
            ),
        }
        lines += [f"{count} {what} are left out." for what, count in left_out.items() if count]
        return lines

    def describe(self) -> dict[str, Any]:
        """What identifies the data, and what using a trained model on new images needs, in JSON's types."""
        rows = hashlib.sha256(b"".join(self.rows[part].tobytes() for part in ("train", "val", "test")))
        mean, std = (each.tolist() for each in self.mean_std)
        size = self.augment.crop or self.first_size
        return {
            "fingerprint": f"{self.listing.digest}-{rows.hexdigest()[:8]}",
            "images": len(self.listing.entries),
            "classes": list(self.classes),
            "colours": [list(colour) for colour in distinct_colours(len(self.classes))],
            "img_size": list(size),
            "in_channels": self.in_channels,
            "mean": mean,
            "std": std,
        }


class _Parted:
    """A listing as `split_rows` reads it."""

    def __init__(self, listing: ObjectListing, parts: list[str | None] | None) -> None:
        self.where, self.names = listing.where, [entry.file for entry in listing.entries]
        self.parts = None if parts is None else np.array(parts, str)
