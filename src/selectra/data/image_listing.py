"""Images by number: what there is, of which class and official part, without a picture being decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Source(Protocol):
    """What gives image number i: the bytes of a file, or pixels `(h, w, c)` or `(h, w)` as they are."""

    def read(self, i: int) -> bytes | np.ndarray[Any, Any]: ...


@dataclass(frozen=True)
class Listing:
    """Images by number.

    Args:
        where: What was listed, for messages.
        classes: Names of the classes, in the order of labels.
        names: A name for every image, for messages.
        labels: The class of every image.
        parts: "train", "val" or "test" for every image; None where nobody has split them.
        source: Reads them.
        digest: Changes when an image is added, renamed or replaced.
        ignored: Files that are no images.
    """

    where: str
    classes: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray[Any, Any]
    parts: np.ndarray[Any, Any] | None
    source: Source
    digest: str
    ignored: int = 0
