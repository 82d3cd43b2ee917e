"""From an image file to what a model takes: pixels of its size and channels, standardised."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import DataError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class UnreadableError(DataError):
    """A file that is damaged or no image."""


def read_image(path: Path, channels: int) -> UInt8[Tensor, "c h w"]:
    """A picture, or an array (h, w, c) in a .npy file, which may have any number of channels.

    Pictures become grey or coloured as the model wants them, and are turned as their camera says.

    Raises:
        UnreadableError: The file is damaged or no image.
        DataError: There is no such file, or it has other channels than the model takes.
    """
    if path.is_dir():
        raise DataError(f"'{path}' is a folder; name images in it, such as {path}/*.jpg.")
    if not path.is_file():
        raise DataError(f"there is no file '{path}'.")
    try:
        if path.suffix == ".npy":
            pixels: Any = np.load(path, allow_pickle=False)
        else:
            with Image.open(path) as image:
                if channels not in MODES:
                    raise DataError(
                        f"'{path}' is a picture, and the model takes {channels} channels; give an array "
                        f"(h, w, {channels}) of uint8 in a .npy file."
                    )
                pixels = np.asarray(ImageOps.exif_transpose(image).convert(MODES[channels]))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).partition("\n")[0]
        raise UnreadableError(f"'{path}' cannot be read as an image: {reason}") from error
    return _planes(pixels, channels, path)


def _planes(pixels: Any, channels: int, path: Path) -> UInt8[Tensor, "c h w"]:
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.ndim != 3 or pixels.dtype != np.uint8 or pixels.shape[2] != channels:
        raise DataError(
            f"'{path}' holds {pixels.dtype} of shape {pixels.shape}; the model takes uint8 of shape (h, w, {channels})."
        )
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)


def fitted(image: UInt8[Tensor, "c h w"], size: tuple[int, int], crop: float = 1.0) -> UInt8[Tensor, "c h2 w2"]:
    """The middle of an image, in `size`.

    Args:
        image: Of any size.
        size: Height and width that the model wants.
        crop: Share of the sides that is kept when the image just covers what is cut.
    """
    height, width = image.shape[1:]
    if (height, width) == size and crop == 1:
        return image
    wanted = [round(side / crop) for side in size]
    ratio = max(wanted[0] / height, wanted[1] / width)
    covering = (max(wanted[0], round(height * ratio)), max(wanted[1], round(width * ratio)))
    # In whole numbers, as torchvision does it where images are brought to size for training.
    resized = F.interpolate(image[None], covering, mode="bicubic", antialias=True)[0]
    top, left = (round((a - b) / 2) for a, b in zip(covering, size, strict=True))
    return resized[:, top : top + size[0], left : left + size[1]]


def standardised(
    images: UInt8[Tensor, "b c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b c h w"]:
    """Pixels in shares of 255, less the mean and over the deviation of each channel."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
