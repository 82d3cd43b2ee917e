"""Clips of moving shapes, drawn as they are asked for: what moves, and how, is the class, and no frame tells it.

A shape moves on a torus (what leaves at one border comes in at the other) from a start that is uniform over it, beside
others that stay. Wherever a motion has led after some frames, that place is uniform over the torus, too, and everything
else in a frame (shapes, sizes, colours, ground, noise) is drawn alike for all classes: single frames have the same
distribution in every class, so that one frame alone cannot exceed chance. Places are whole numbers of 1/256 pixel, so
that this holds to the bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from selectra.data.clip_batches import ClipBatch
from selectra.data.image_draws import keys, uniforms
from selectra.data.images import HeldImages
from selectra.errors import ConfigError
from selectra.registry import datasets

CLASSES = ("right", "left", "down", "up", "clockwise", "anticlockwise")
# Rightwards and downwards, and the direction of turning, of each class.
MOVES = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))
# Parts of a pixel.
FINE = 256
# Of the side of a frame: least and greatest radius of shapes and of orbits, and steps from frame to frame.
RADIUS, ORBIT, STEP = (0.12, 0.22), (0.14, 0.24), (0.07, 0.13)
# Parts of a full turn from frame to frame.
TURN = (1 / 10, 1 / 6)
GROUND, COLOUR, NOISE = (0.0, 0.4), (0.55, 1.0), 0.08
# Draws of a clip's motion, and of each shape: its place, kind, radius and colour.
N_MOTION, N_SHAPE = 6, 7
PART_SEEDS = {"train": 0, "val": 1, "test": 2}
MEAN, STD = 0.5, 0.5


@dataclass(frozen=True)
class MadeClips:
    """A part's clips, drawn in batches on the device that asks.

    Args:
        labels: Their classes.
        n_frames: Frames of a clip.
        side: Pixels of a frame's sides.
        n_still: Shapes that do not move.
        still: Show one frame, drawn for each clip, in the place of all.
        seed: Of the part.
    """

    labels: Int64[Tensor, " n"]
    n_frames: int
    side: int
    n_still: int
    still: bool
    seed: int

    @property
    def pixels(self) -> Tensor:
        """There are none; the labels lie where clips are drawn."""
        return self.labels

    def to(self, device: torch.device | str) -> MadeClips:
        """The same on another device."""
        return replace(self, labels=self.labels.to(device))

    def with_tables(self, augment: object) -> MadeClips:
        """The same: nothing is drawn from tables here."""
        return self

    def batch(
        self, index: Int64[Tensor, " b"], augment: object | None, seed: int, epoch: Int64[Tensor, " b"] | int
    ) -> ClipBatch:
        """Clips; those of training are others in every pass, and the same for all trainings."""
        return ClipBatch(self._drawn(index, 0 if augment is None else epoch), self.labels.index_select(0, index))

    def plain(self, index: Int64[Tensor, " b"]) -> Float[Tensor, "b c t h w"]:
        """Clips of the first pass."""
        return self._drawn(index, 0)

    def _drawn(self, index: Int64[Tensor, " b"], epoch: Int64[Tensor, " b"] | int) -> Float[Tensor, "b c t h w"]:
        key = keys(self.seed, epoch, index)
        u = uniforms(key, N_MOTION + N_SHAPE * (1 + self.n_still) + 1)
        frames = draw_clips(u, self.labels.index_select(0, index), self.n_frames, self.side, self.n_still)
        noise = uniforms(key + 1, frames[0].numel()).view_as(frames)
        frames = (frames + NOISE * (2 * noise - 1)).clamp(0, 1)
        if self.still:
            chosen = (u[:, -1] * self.n_frames).long()[:, None, None, None, None]
            frames = frames.gather(2, chosen.expand(-1, 3, -1, self.side, self.side)).expand_as(frames)
        return (frames - MEAN) / STD


def draw_clips(
    u: Float[Tensor, "b n"], labels: Int64[Tensor, " b"], n_frames: int, side: int, n_still: int
) -> Float[Tensor, "b 3 t h w"]:
    """Clips without noise, from 0 to 1.

    Args:
        u: For each clip six draws for its motion, of which the first two are the start, across and down, and seven for
            each shape, the moving one first.
        labels: The classes.
        n_frames: Frames.
        side: Pixels of a frame's sides.
        n_still: Shapes that do not move.
    """
    motion, shapes = u[:, :N_MOTION], u[:, N_MOTION : N_MOTION + N_SHAPE * (1 + n_still)].unflatten(1, (-1, N_SHAPE))
    ground = _between(GROUND, motion[:, 5])
    canvas = ground[:, None, None, None, None].expand(-1, 3, n_frames, side, side)
    for i in reversed(range(1 + n_still)):
        own = shapes[:, i]
        start = (motion if i == 0 else own)[:, :2]
        # The start that is not taken from the shape's own draws leaves these without effect.
        place = (start * (side * FINE)).long()[:, None].expand(-1, n_frames, -1)
        if i == 0:
            place = place + offsets(motion, labels, n_frames, side)
        inside = _inside(place, (own[:, 2] * 4).long(), _between(RADIUS, own[:, 3]) * side, side)
        colour = _between(COLOUR, own[:, 4:7])[:, :, None, None, None]
        canvas = torch.where(inside[:, None], colour, canvas)
    return canvas


def offsets(
    motion: Float[Tensor, "b 6"], labels: Int64[Tensor, " b"], n_frames: int, side: int
) -> Int64[Tensor, "b t 2"]:
    """How far a shape has moved in each frame, across and down, in 1/256 pixel.

    Args:
        motion: The third draw is the speed, the fourth the phase of an orbit, the fifth its radius.
        labels: The classes.
        n_frames: Frames.
        side: Pixels of a frame's sides.
    """
    # Made on the device, so that a CUDA graph can hold it.
    frame = torch.arange(n_frames, device=labels.device, dtype=torch.float32)
    right, down, turn = _of_class(labels)
    travelled = _between(STEP, motion[:, 2])[:, None] * side * frame
    angle = 2 * math.pi * (motion[:, 3, None] + turn[:, None] * _between(TURN, motion[:, 2])[:, None] * frame)
    radius = (_between(ORBIT, motion[:, 4]) * side * turn.abs())[:, None]
    across = right[:, None] * travelled + radius * angle.cos()
    below = down[:, None] * travelled + radius * angle.sin()
    return (torch.stack([across, below], -1) * FINE).round().long()


def _of_class(labels: Int64[Tensor, " b"]) -> tuple[Tensor, Tensor, Tensor]:
    """Rightwards, downwards and turning."""
    right, down, turn = (torch.zeros_like(labels, dtype=torch.float32) for _ in range(3))
    for number, move in enumerate(MOVES):
        own = (labels == number).float()
        right, down, turn = right + move[0] * own, down + move[1] * own, turn + move[2] * own
    return right, down, turn


def _between(limits: tuple[float, float], u: Tensor) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * u


def _inside(
    place: Int64[Tensor, "b t 2"], kind: Int64[Tensor, " b"], radius: Float[Tensor, " b"], side: int
) -> Bool[Tensor, "b t h w"]:
    """Where a disc, a ring, a square or a cross is on the torus."""
    pixel, around = torch.arange(side, device=place.device) * FINE, side * FINE
    gaps = (pixel - place[..., None]) % around
    gaps = torch.minimum(gaps, around - gaps).float() / FINE
    right, down = gaps[:, :, 0, None, :], gaps[:, :, 1, :, None]
    radius = radius[:, None, None, None]
    distance, box = torch.hypot(right, down), torch.maximum(right, down)
    disc, square = distance < radius, box < radius
    found = (disc, disc & (distance > 0.6 * radius), square, square & (torch.minimum(right, down) < 0.3 * radius))
    inside = torch.zeros_like(disc)
    for number, each in enumerate(found):
        inside = inside | (each & (kind == number)[:, None, None, None])
    return inside


@dataclass(frozen=True)
class EveryPass:
    """Training sees other clips in every pass."""

    mixes: bool = False


@datasets.register("moving_shapes", kind="video")
class MovingShapes:
    """Drawn clips of a shape that moves right, left, down, up, clockwise or anticlockwise among others that stay.

    Needs no file. One frame alone says nothing of the class: `selectra.data.moving_shapes`.

    Args:
        n_frames: Frames of a clip.
        img_size: Pixels of a frame's sides.
        n_still: Shapes beside the moving one that do not move.
        train: Clips of a pass of training; every pass draws others.
        val: Clips that validate; 0 for none.
        test: Clips that test.
        still: The control: every clip shows one of its frames, drawn at random, in the place of all.
        seed: Of all draws.
    """

    in_channels = 3
    classes = CLASSES

    def __init__(
        self,
        *,
        n_frames: int = 8,
        img_size: int = 32,
        n_still: int = 1,
        train: int = 12_288,
        val: int = 768,
        test: int = 3_072,
        still: bool = False,
        seed: int = 0,
    ) -> None:
        least = {"n_frames": 1 if still else 2, "img_size": 16, "n_still": 0, "train": 1, "val": 0, "test": 1}
        given = {"n_frames": n_frames, "img_size": img_size, "n_still": n_still}
        given |= {"train": train, "val": val, "test": test}
        low = [f"{name}={given[name]} (from {bound})" for name, bound in least.items() if given[name] < bound]
        if low:
            raise ConfigError(f"too low: {', '.join(low)}; two frames are the least that show a motion.")
        self.n_frames, self.side, self.n_still, self.still, self.seed = n_frames, img_size, n_still, still, seed
        self.counts = {"train": int(train), "val": int(val), "test": int(test)}
        self.augment = EveryPass()

    @property
    def facts(self) -> dict[str, Any]:
        """What models are built from."""
        return {
            "n_classes": len(CLASSES), "in_channels": self.in_channels, "img_size": self.side, "n_frames": self.n_frames
        }  # fmt: skip

    def made(self, part: str) -> MadeClips:
        """A part's clips."""
        labels = torch.arange(self.counts[part]) % len(CLASSES)
        seed = self.seed * len(PART_SEEDS) + PART_SEEDS[part]
        return MadeClips(labels, self.n_frames, self.side, self.n_still, self.still, seed)

    def windows(self, part: str) -> HeldImages:
        """A part, in batches by lists of numbers."""
        if part not in self.counts:
            raise ConfigError(f"there is no part '{part}'; there are {sorted(self.counts)}.")
        held: Any = self.made(part)
        return HeldImages(held, self.augment if part == "train" else None)  # pyright: ignore[reportArgumentType]

    def summary(self) -> list[str]:
        """The set in a few lines."""
        counts = ", ".join(f"{part} {count:,}" for part, count in self.counts.items())
        shown = "one frame in the place of all" if self.still else f"{self.n_frames} frames"
        return [
            f"moving shapes: {len(CLASSES)} classes, {shown} of {self.side} x {self.side} pixels (drawn when asked "
            f"for); clips: {counts}"
        ]

    def describe(self) -> dict[str, Any]:
        """What identifies the data, and what using a trained model on new clips needs, in JSON's types."""
        return {
            "fingerprint": f"moving-shapes-1-{self.seed}-{self.n_still}-{int(self.still)}",
            "clips": sum(self.counts.values()),
            "classes": list(CLASSES),
            "n_frames": self.n_frames,
            "sampling": "uniform",
            "stride": 1,
            "views": 1,
            "crops": 1,
            "short_clips": "refuse",
            "img_size": [self.side, self.side],
            "in_channels": self.in_channels,
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
        }
