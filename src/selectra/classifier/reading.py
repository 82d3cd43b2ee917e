"""From an image file to what a model takes: pixels of its size and channels, standardised."""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from selectra.data.image_decode import UNREADABLE, pixels_of, reason_of
from selectra.errors import DataError


class UnreadableError(DataError):
    """A file that is damaged, no image, or none that the model can take."""


def leave_out(error: UnreadableError, skipped: list[str] | None) -> None:
    """Note a file that is left out.

    Args:
        skipped: Where it is noted; None leaves none out.

    Raises:
        UnreadableError: None may be left out.
    """
    if skipped is None:
        reason = str(error).rstrip(".")
        raise UnreadableError(f"{reason}; leave it out, or go on without such files: --skip-corrupt.") from error
    skipped.append(str(error))


def read_image(path: Path, channels: int) -> UInt8[Tensor, "c h w"]:
    """A picture, or an array (h, w, c) in a .npy file, which may have any number of channels, as in training.

    Pictures become grey or coloured as the model wants them, and are turned as their camera says.

    Raises:
        UnreadableError: The file is damaged or no image, or has other channels than the model takes, or more than 8
            bits for each.
        DataError: There is no such file.
    """
    if path.is_dir():
        raise DataError(f"'{path}' is a folder; name images in it, such as {path}/*.jpg.")
    if not path.is_file():
        raise DataError(f"there is no file '{path}'.")
    try:
        return pixels_of(path.read_bytes(), channels, str(path))
    except DataError as error:
        # A whole image of another kind.
        raise UnreadableError(str(error)) from error
    except UNREADABLE as error:
        raise UnreadableError(f"'{path}' cannot be read as an image: {reason_of(error)}") from error


def standardised(
    images: UInt8[Tensor, "b c h w"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "b c h w"]:
    """Pixels in shares of 255, less the mean and over the deviation of each channel."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
