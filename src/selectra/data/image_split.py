"""Which images are for training, validation and test: by the set's own parts, and by seeded draws within each class."""

from __future__ import annotations

from typing import Any

import numpy as np

from selectra.data.image_listing import Listing
from selectra.errors import DataError

Rows = np.ndarray[Any, np.dtype[np.int64]]
STREAMS = {"test": 1, "val": 2, "train": 3}


def split_images(listing: Listing, val: float, test: float, per_class: int | None, seed: int) -> dict[str, Rows]:
    """The numbers of each part's images, rising.

    Args:
        val: Share of the training images of each class that validate, where the set has no validation part.
        test: Share of all images of each class that test, where the set has no test part.
        per_class: Training images of each class that are kept, after validation is cut off; None keeps all.
        seed: Of the draws, which are the same for every model and every training.

    Raises:
        DataError: A part or a class is left without images.
    """
    parts = _official(listing)
    if "test" not in parts:
        parts["test"], parts["train"] = _draw(listing, parts["train"], test, seed, "test")
    if "val" not in parts:
        parts["val"], parts["train"] = _draw(listing, parts["train"], val, seed, "val")
    counts = np.bincount(listing.labels[parts["train"]], minlength=len(listing.classes))
    least = per_class or 1
    if counts.min(initial=least) < least:
        short = int(np.argmin(counts))
        raise DataError(
            f"class '{listing.classes[short]}' of '{listing.where}' has {counts[short]} images for training, and at "
            f"least {least} are needed; lower data.per_class, data.val or data.test."
        )
    if per_class is not None:
        kept = [_shuffled(rows, seed, "train")[:per_class] for rows in _by_class(listing, parts["train"])]
        parts["train"] = np.sort(np.concatenate(kept))
    return parts


def _official(listing: Listing) -> dict[str, Rows]:
    if listing.parts is None:
        return {"train": np.arange(len(listing.labels))}
    found = {str(part): np.flatnonzero(listing.parts == part) for part in np.unique(listing.parts)}
    if "train" not in found:
        raise DataError(f"'{listing.where}' has the parts {sorted(found)} and no training part.")
    return found


def _by_class(listing: Listing, rows: Rows) -> list[Rows]:
    return [rows[listing.labels[rows] == label] for label in range(len(listing.classes))]


def _shuffled(rows: Rows, seed: int, stream: str) -> Rows:
    return np.random.default_rng([seed, STREAMS[stream]]).permutation(rows)


def _draw(listing: Listing, rows: Rows, share: float, seed: int, stream: str) -> tuple[Rows, Rows]:
    """A share of each class, and the rest."""
    taken = [_shuffled(own, seed, stream)[: min(len(own), round(share * len(own)))] for own in _by_class(listing, rows)]
    drawn = np.sort(np.concatenate(taken))
    return drawn, np.setdiff1d(rows, drawn)
