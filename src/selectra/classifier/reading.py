"""From an image file to what a model takes: pixels of its size and channels, standardised."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

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


def standardised(
    images: UInt8[Tensor, "b c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b c h w"]:
    """Pixels in shares of 255, less the mean and over the deviation of each channel."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
