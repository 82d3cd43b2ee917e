"""torchvision's sets as images by number."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from selectra.data.image_listing import Listing
from selectra.data.public import folders
from selectra.data.vision import vision
from selectra.errors import DataError
from selectra.spec import nearest

TORCHVISION = "torchvision:"
# Seconds without a byte after which its download is given up.
PATIENCE = 60.0


class Pairs:
    """One or two sets of torchvision, one behind the other: pairs of a picture and a label."""

    def __init__(self, sets: Sequence[Any]) -> None:
        self.sets = sets

    def read(self, i: int) -> np.ndarray[Any, Any]:
        for each in self.sets:
            if i < len(each):
                return np.asarray(each[i][0])
            i -= len(each)
        raise IndexError(i)


def torchvision_set(name: str, download: bool) -> Listing:
    """A set of torchvision's by its class name, in SELECTRA_DATA."""
    sets = vision("torchvision.datasets")
    kinds = [each for each in sets.__all__ if isinstance(getattr(sets, each), type)]
    if name not in kinds:
        raise DataError(f"torchvision has no set '{name}'.{nearest(name, kinds)}")
    build = _Builder(getattr(sets, name), name, folders()[0], download)
    both = build.parts()
    labels = np.concatenate([_labels_of(each) for each in both.values()])
    first = next(iter(both.values()))
    classes = getattr(first, "classes", None) or getattr(first, "categories", None)
    classes = [str(each) for each in classes] if classes is not None else [str(i) for i in range(labels.max() + 1)]
    counts = [len(each) for each in both.values()]
    digest = hashlib.sha256(f"{name} {counts}".encode() + labels.tobytes())
    return Listing(
        f"{TORCHVISION}{name}", tuple(classes), [f"image {i}" for i in range(len(labels))], labels,
        np.repeat(np.array(list(both)), counts) if len(both) > 1 else None,
        Pairs(list(both.values())), digest.hexdigest()[:16],
    )  # fmt: skip


class _Builder:
    """Calls torchvision's constructors, which say "train" in two ways or not at all."""

    def __init__(self, kind: Any, name: str, root: Path, download: bool) -> None:
        self.kind, self.name, self.root = kind, name, root
        self.takes = inspect.signature(kind).parameters
        self.options = {"download": download} if "download" in self.takes else {}

    def parts(self) -> dict[str, Any]:
        """The official parts, or everything under one name."""
        if "train" in self.takes:
            return {"train": self._build(train=True), "test": self._build(train=False)}
        if "split" in self.takes:
            return {"train": self._build(split="train"), "test": self._build(split="test")}
        return {"all": self._build()}

    def _build(self, **part: Any) -> Any:
        where = {"root": str(self.root)} if "root" in self.takes else {}
        try:
            with _patience():
                return self.kind(**where, **part, **self.options)
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(
                f"torchvision's {self.name} cannot be read in '{self.root}': {reason} "
                "data.download=true lets torchvision load it."
            ) from error


def _labels_of(part: Any) -> np.ndarray[Any, Any]:
    """The labels, without decoding pictures where the set holds them."""
    for name in ("targets", "labels", "_labels", "y"):
        found = getattr(part, name, None)
        if found is not None and len(found) == len(part):
            return np.asarray(found, np.int64)
    return np.array([int(part[i][1]) for i in range(len(part))], np.int64)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Inside the block connections have a time limit: torchvision's downloads set none, and would wait for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
