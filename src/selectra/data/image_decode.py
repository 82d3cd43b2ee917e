"""From a file's bytes to pixels `(c, h, w)` of one size; what cannot be read is named."""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from selectra.data.image_listing import Listing
from selectra.errors import DataError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
GREY = ("1", "L", "LA")
DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")
# How Pillow, NumPy and zip files say that bytes are damaged or no image.
UNREADABLE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class CorruptError(DataError):
    """An image that cannot be decoded."""


def decode(listing: Listing, i: int, channels: int | None) -> UInt8[Tensor, "c h w"]:
    """One image with so many channels, or with as many as it has (1 or 3 for pictures).

    Raises:
        CorruptError: It is damaged or no image.
        DataError: It has other channels, or more than 8 bits for each.
    """
    name = listing.names[i]
    try:
        return pixels_of(listing.source.read(i), channels, name)
    except DataError:
        # Of errors in values, those that say what is wrong with a whole image.
        raise
    except UNREADABLE as error:
        raise CorruptError(
            f"'{name}' in '{listing.where}' cannot be read as an image: {reason_of(error)}. "
            "Remove or replace it, or leave such files out with data.corrupt=skip."
        ) from error


def pixels_of(content: bytes | np.ndarray[Any, Any], channels: int | None, name: str) -> UInt8[Tensor, "c h w"]:
    """A picture, turned as its camera says, or an array, such as a .npy file holds.

    Args:
        content: A file's bytes, or pixels (h, w) or (h, w, c).
        channels: How many are wanted: pictures become grey or coloured. None leaves them.
        name: Of the image, for messages.

    Raises:
        DataError: It has other channels, or more than 8 bits for each.
        Exception: One of `UNREADABLE`: it is damaged or no image.
    """
    if isinstance(content, bytes) and not content.startswith(b"\x93NUMPY"):
        with Image.open(io.BytesIO(content)) as image:
            return _picture(image, channels, name)
    pixels = content if isinstance(content, np.ndarray) else np.load(io.BytesIO(content), allow_pickle=False)
    return _array(pixels, channels, name)


def reason_of(error: BaseException) -> str:
    """What a library says of bytes that are damaged, in a line and without their place in memory."""
    return str(error).partition("\n")[0].partition(" <_io.")[0]


def require_bytes(image: Image.Image, name: str) -> None:
    """Refuse pictures that Pillow would cut off at 255.

    Raises:
        DataError: It has more than 8 bits a channel.
    """
    if image.mode in DEEP:
        raise DataError(
            f"'{name}' has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits, by a range that is "
            "the same for all images."
        )


def _picture(image: Image.Image, channels: int | None, name: str) -> Tensor:
    require_bytes(image, name)
    wanted = channels or (1 if image.mode in GREY else 3)
    if wanted not in MODES:
        raise DataError(
            f"'{name}' is a picture, which gives 1, 3 or 4 channels, and in_channels is {wanted}; give arrays "
            f"(h, w, {wanted}) of uint8 in .npy files."
        )
    return _planes(np.asarray(ImageOps.exif_transpose(image).convert(MODES[wanted])))


def _array(pixels: Any, channels: int | None, name: str) -> Tensor:
    if pixels.ndim not in (2, 3) or pixels.dtype != np.uint8:
        raise DataError(
            f"'{name}' is an array of {pixels.dtype} of shape {pixels.shape}; "
            "it must be of uint8, and (h, w, c) or (h, w)."
        )
    planes = _planes(pixels)
    if channels == 3 and len(planes) == 1:
        return planes.expand(3, -1, -1)
    if channels == 1 and len(planes) == 3:
        return _planes(np.asarray(Image.fromarray(pixels).convert("L")))
    if channels not in (None, len(planes)):
        raise DataError(f"'{name}' has {len(planes)} channels, and in_channels is {channels}.")
    return planes


def _planes(pixels: np.ndarray[Any, Any]) -> Tensor:
    tensor = torch.from_numpy(np.array(pixels, np.uint8))
    return tensor[None] if tensor.dim() == 2 else tensor.permute(2, 0, 1)


def fitted(image: UInt8[Tensor, "c h w"], size: tuple[int, int], crop: float = 1.0) -> UInt8[Tensor, "c h2 w2"]:
    """The middle of an image, made to cover what is cut; the same where it has that size.

    Args:
        image: Of any size.
        size: Height and width that are wanted.
        crop: Share of the sides that is kept when the image just covers what is cut.
    """
    height, width = image.shape[1:]
    if (height, width) == size and crop == 1:
        return image
    wanted = [round(side / crop) for side in size]
    ratio = max(wanted[0] / height, wanted[1] / width)
    covering = (max(wanted[0], round(height * ratio)), max(wanted[1], round(width * ratio)))
    # In whole numbers, as torchvision does it.
    resized = functional.interpolate(image[None], covering, mode="bicubic", antialias=True)[0]
    top, left = (round((a - b) / 2) for a, b in zip(covering, size, strict=True))
    return resized[:, top : top + size[0], left : left + size[1]]
