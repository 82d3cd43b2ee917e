"""Which images on disk a training would stop at: told by their headers, checksums and ends, before it begins.

To decode every image would take as long as a pass of the training. A header takes a small part of that, more with the
checksums that PNG files hold; a JPEG that was cut off lacks its end. What looks wrong is decoded to be sure. Damage in
the middle of a JPEG shows when a training reaches it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from selectra.data.image_decode import DEEP, UNREADABLE
from selectra.data.image_files import Files, Mixed, Table, Zipped
from selectra.errors import DataError

# A set of more images is not looked through: minutes of reading before a training.
MOST_CHECKED = 100_000
# Orientations of a camera on its side.
SIDEWAYS = range(5, 9)
JPEG_END = b"\xff\xd9"
# Damaged files that are named.
SHOWN = 5


def require_whole(
    rows: Sequence[int] | np.ndarray[Any, Any], looks_odd: Callable[[int], bool], read: Callable[[int], Any],
    names: Sequence[str],
) -> None:  # fmt: skip
    """Name the files of a part that cannot be used, as far as that can be seen without decoding them all.

    Args:
        rows: The part's images; of more than `MOST_CHECKED` none is looked at.
        looks_odd: Whether an image must be decoded to know.
        read: Reads one as training does, for those that do.
        names: Of all images.

    Raises:
        DataError: There are such files; what the first one has, and the names of more.
    """
    if len(rows) > MOST_CHECKED:
        return
    problems: list[tuple[str, DataError]] = []
    for row in map(int, rows):
        try:
            odd = looks_odd(row)
        except UNREADABLE:
            odd = True
        if odd:
            try:
                read(row)
            except DataError as error:
                problems.append((names[row], error))
    if not problems:
        return
    first, others = problems[0][1], [f"'{name}'" for name, _ in problems[1:]]
    more = f" and {len(others) - SHOWN} others" if len(others) > SHOWN else ""
    besides = f" {len(others)} more cannot be used: {', '.join(others[:SHOWN])}{more}." if others else ""
    raise type(first)(f"{first}{besides}") from first


def looks_wrong(source: Any, row: int, size: tuple[int, int] | None = None) -> bool:
    """Whether an image must be decoded to know that it is whole: by its header, checksums and end.

    Args:
        source: Where it is read from; what is no source of files holds arrays, or decodes whatever is read of it.
        row: Its number there.
        size: Height and width that it must have; None for any.

    Raises:
        Exception: One of `UNREADABLE`: so it seems.
    """
    if not isinstance(source, (Files, Zipped, Mixed, Table)):
        return False
    content = source.read(row)
    with Image.open(io.BytesIO(content)) as image:
        shape, is_deep, is_jpeg = (image.height, image.width), image.mode in DEEP, image.format == "JPEG"
        if is_jpeg and image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS:
            shape = shape[::-1]
        image.verify()
    is_cut = is_jpeg and not content.rstrip(b"\0\r\n ").endswith(JPEG_END)
    return is_deep or is_cut or (size is not None and shape != size)
