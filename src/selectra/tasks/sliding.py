"""Scores of images that are larger than what fits into memory: windows over them, overlapping, and their mean."""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from selectra.errors import ConfigError

Scores = Callable[[Tensor], Tensor]


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: by strides, the last one at the border; one where a window covers all."""
    last = max(size - window, 0)
    return sorted({*range(0, last, stride), last})


def sliding_scores(
    scores: Scores,
    x: Float[Tensor, "b c h w"],
    window: tuple[int, int],
    stride: tuple[int, int],
    device: torch.device | str | None = None,
    batch_size: int = 4,
) -> Float[Tensor, "b k h w"]:
    """The mean score of all windows that see a pixel.

    Args:
        scores: Of images (b, c, h, w), scores (b, k, h, w).
        x: Images; they may lie on another device, as may the result, which is where they are.
        window: Height and width of what is seen at once.
        stride: Pixels from one window to the next.
        device: Where scores are made; by default where the images are.
        batch_size: Windows at once.

    Raises:
        ConfigError: Strides leave pixels out.
    """
    if not all(0 < step <= side for step, side in zip(stride, window, strict=True)):
        raise ConfigError(f"window={window}, stride={stride}: strides are at least 1 and not longer than the window")
    height, width = x.shape[2:]
    tall, wide = min(window[0], height), min(window[1], width)
    spots = [(i, top, left) for i in range(len(x)) for top in window_starts(height, tall, stride[0])
             for left in window_starts(width, wide, stride[1])]  # fmt: skip
    total: Tensor | None = None
    count = x.new_zeros(len(x), 1, height, width)
    for group in _groups(spots, batch_size):
        crops = torch.stack([x[i, :, top : top + tall, left : left + wide] for i, top, left in group])
        found = scores(crops if device is None else crops.to(device)).to(x.device)
        if total is None:
            total = found.new_zeros(len(x), found.shape[1], height, width)
        for each, (i, top, left) in zip(found, group, strict=True):
            total[i, :, top : top + tall, left : left + wide] += each
            count[i, :, top : top + tall, left : left + wide] += 1
    assert total is not None
    return total / count


def _groups(spots: list[tuple[int, int, int]], size: int) -> Iterator[list[tuple[int, int, int]]]:
    for start in range(0, len(spots), size):
        yield spots[start : start + size]
