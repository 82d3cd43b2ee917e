"""Fixed positions of a grid: sines and cosines of both coordinates."""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError

BASE = 10_000


@torch.compiler.assume_constant_result
def sincos_grid(d_model: int, height: int, width: int) -> Float[Tensor, "height width d_model"]:
    """A table in float32: the first half of the channels tells the column, the second the row.

    Each half has the sines of all frequencies, then the cosines (He et al. 2022, arXiv:2111.06377: the official code).
    The table is NumPy's, to the last digit, since official models have it so in any precision.

    Args:
        d_model: Channels, a multiple of 4.
        height: Rows.
        width: Columns.

    Raises:
        ConfigError: The channels cannot be divided so.
    """
    _require_quarters(d_model)
    rows, columns = _waves(d_model // 2, height), _waves(d_model // 2, width)
    table = np.concatenate(
        [
            np.broadcast_to(columns[None], (height, *columns.shape)),
            np.broadcast_to(rows[:, None], (height, width, d_model // 2)),
        ],
        axis=2,
    )
    return torch.from_numpy(table)


def _require_quarters(d_model: int) -> None:
    if d_model % 4:
        raise ConfigError(f"d_model={d_model}: positions by sines and cosines need a multiple of 4")


class GridPositions(nn.Module):
    """`sincos_grid` on any device: what was copied there once stays, so that a CUDA graph can hold the rest.

    Args:
        d_model: Channels, a multiple of 4.

    Raises:
        ConfigError: The channels cannot be divided so.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        _require_quarters(d_model)
        self.d_model = d_model
        # As long as the module lives, as a graph that reads them may.
        self.kept: dict[tuple[int, torch.device], Tensor] = {}

    def forward(self, height: int, width: int, device: torch.device) -> Float[Tensor, "height width d_model"]:
        """The table, in float32."""
        if torch.compiler.is_compiling():
            return sincos_grid(self.d_model, height, width).to(device)
        half = self.d_model // 2
        rows, columns = self._waves(height, device), self._waves(width, device)
        across, down = columns[None].expand(height, width, half), rows[:, None].expand(height, width, half)
        return torch.cat([across, down], -1)

    def _waves(self, count: int, device: torch.device) -> Tensor:
        if (count, device) not in self.kept:
            # Used in training, too, wherever it is made first.
            with torch.inference_mode(False):
                self.kept[count, device] = torch.from_numpy(_waves(self.d_model // 2, count)).to(device)
        return self.kept[count, device]


@lru_cache(maxsize=64)
def _waves(d: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    frequencies = np.arange(d // 2, dtype=np.float32)
    frequencies /= d / 2.0
    angles = np.einsum("m,d->md", np.arange(count, dtype=np.float32), 1.0 / BASE**frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
