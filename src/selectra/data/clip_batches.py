"""Batches of clips, and which frames of a video they are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from selectra.errors import ConfigError

SamplingKind = Literal["uniform", "dense"]


@dataclass(frozen=True)
class ClipBatch:
    """Clips, standardised by channel, and the classes of their videos.

    Args:
        x: The clips; those of one video behind each other.
        y: The classes of the videos.
        target: Shares of the classes; None, since clips are not mixed.
    """

    x: Float[Tensor, "bv c t h w"]
    y: Int64[Tensor, " b"]
    target: None = None

    def to(self, device: torch.device | str) -> ClipBatch:
        """The same batch on another device."""
        return ClipBatch(self.x.to(device), self.y.to(device))

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video a clip is made of.

    Uniform clips see the whole video: it is cut into as many parts as the clip has frames, and each part gives one
    (Wang et al. 2016, arXiv:1608.00859). Dense clips see frames at a fixed distance, from somewhere in it
    (Feichtenhofer et al. 2019, arXiv:1812.03982).

    Args:
        kind: "uniform" or "dense".
        n_frames: Frames of a clip.
        stride: Frames of the video from one of a dense clip to the next.
        views: Clips of each video at test time; their probabilities are averaged.
    """

    kind: SamplingKind
    n_frames: int
    stride: int = 4
    views: int = 1

    def __post_init__(self) -> None:
        for name in ("n_frames", "stride", "views"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: needs at least 1")

    @property
    def least(self) -> int:
        """Frames that a video must have."""
        return self.n_frames if self.kind == "uniform" else (self.n_frames - 1) * self.stride + 1

    def training(self, length: int, u: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[int]:
        """Frames of a training clip, in their order.

        Args:
            length: Frames of the video, `least` or more.
            u: As many draws from 0 up to, but not, 1 as the clip has frames; a dense clip takes the first.
        """
        assert length >= self.least
        if self.kind == "dense":
            return self._dense(int(u[0] * (length - self.least + 1)))
        return self._uniform(length, u)

    def views_of(self, length: int) -> list[list[int]]:
        """Frames of every clip of a video at test time: the middles of the parts, or of what is left, where one is."""
        assert length >= self.least
        places = (np.arange(self.views) + 0.5) / self.views
        if self.kind == "uniform":
            return [self._uniform(length, np.full(self.n_frames, place)) for place in places]
        # The first clip begins with the video and the last one ends with it, where there are several.
        ends = np.linspace(0, 1, self.views) if self.views > 1 else places
        return [self._dense(round(end * (length - self.least))) for end in ends]

    def _dense(self, first: int) -> list[int]:
        return [first + i * self.stride for i in range(self.n_frames)]

    def _uniform(self, length: int, u: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[int]:
        frames = np.floor((np.arange(self.n_frames) + u) * length / self.n_frames).astype(int)
        return np.minimum(frames, length - 1).tolist()
