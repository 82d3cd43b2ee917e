"""Batches of images and masks, from memory or from disk."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from selectra.data.image_draws import keys, uniforms
from selectra.data.images import HeldImages
from selectra.data.mask_views import N_DRAWS, HeldPairs, MaskAugment, MaskBatch, MaskPiece, viewed

Rows = np.ndarray[Any, np.dtype[np.int64]]


class ReadablePairs(Protocol):
    """What is read from."""

    mean_std: Any
    short_side: int | None

    def read(self, row: int) -> tuple[UInt8[Tensor, "c h w"], UInt8[Tensor, "h w"]]: ...


class HeldMasks(HeldImages):
    """A part whose images and masks lie in memory, and after the first batch on the device that trains.

    Args:
        held: The pairs.
        augment: How training sees them; None shows them as they are.
    """

    held: Any

    def __init__(self, held: HeldPairs, augment: MaskAugment | None) -> None:
        super().__init__(held, augment)  # pyright: ignore[reportArgumentType]


class ReadMasks:
    """A part that is read from disk every time.

    Args:
        masks: Where from.
        rows: The part's pairs.
        augment: How training sees them; None shows them as they are, in the size that evaluation asks for.
    """

    def __init__(self, masks: ReadablePairs, rows: Rows, augment: MaskAugment | None) -> None:
        self.masks, self.rows, self.augment = masks, rows, augment
        self.epoch, self.seed = 0, 0

    def __len__(self) -> int:
        return len(self.rows)

    def at_pass(self, number: int, seed: int) -> None:
        """Views of pass `number` of a training with this seed come next."""
        self.epoch, self.seed = number, seed

    def __getitem__(self, indices: list[int]) -> MaskBatch:
        mean, std = self.masks.mean_std
        groups: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        for i in indices:
            image, mask = self.masks.read(int(self.rows[i]))
            if self.augment is None:
                x = (resized(image, self.masks.short_side).float() / 255 - mean[:, None, None]) / std[:, None, None]
                y = mask.long()
            else:
                u = uniforms(keys(self.seed, self.epoch, torch.tensor([i])), N_DRAWS)
                x, y = (each[0] for each in viewed(image[None], mask[None], u, self.augment, mean, std))
            groups.setdefault((x.shape, y.shape), []).append((x, y))
        pieces = [MaskPiece(*map(torch.stack, zip(*group, strict=True))) for group in groups.values()]
        return MaskBatch(tuple(pieces))


def resized(image: UInt8[Tensor, "c h w"], short_side: int | None) -> UInt8[Tensor, "c h2 w2"]:
    """An image whose shorter side has so many pixels; the same without a number."""
    if short_side is None or min(image.shape[1:]) == short_side:
        return image
    ratio = short_side / min(image.shape[1:])
    size = [max(1, round(side * ratio)) for side in image.shape[1:]]
    return torch.nn.functional.interpolate(image[None], size, mode="bilinear", antialias=True)[0]
