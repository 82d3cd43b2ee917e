"""Windows on standardised series, gathered a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True)
class SeriesBatch:
    """Windows of all series; values are standardised, and 0 where nothing was observed."""

    x: Float[Tensor, "b l s"]
    observed: Bool[Tensor, "b l s"]
    y: Float[Tensor, "b h s"] | None = None
    y_observed: Bool[Tensor, "b h s"] | None = None
    past: Float[Tensor, "b l c"] | None = None
    future: Float[Tensor, "b t c"] | None = None
    static: Float[Tensor, "b s c"] | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> SeriesBatch:
        """The same batch on another device."""
        present = {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}
        return replace(self, **{k: value.to(device, non_blocking=non_blocking) for k, value in present.items()})

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Scaler:
    """Mean and population standard deviation of each series, as scikit-learn's StandardScaler."""

    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def fit(cls, values: np.ndarray, observed: np.ndarray) -> Scaler:
        """From the observed values of `(rows, series)`; a constant series gets standard deviation 1."""
        count = observed.sum(0)
        clean = np.where(observed, values, 0.0)
        mean = clean.sum(0) / count
        variance = np.where(observed, clean - mean, 0.0)
        std = np.sqrt((variance**2).sum(0) / count)
        # Below rounding of the values themselves nothing varies.
        flat = std <= 1e-12 * np.maximum(np.abs(mean), 1.0)
        return cls(mean, np.where(flat, 1.0, std))

    def transform(self, values: np.ndarray) -> np.ndarray:
        """Units of the data to standard deviations; the last axis is the series."""
        return (values - self.mean) / self.std

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """Standard deviations to units of the data; the last axis is the series."""
        return values * self.std + self.mean


class Windows(Dataset[SeriesBatch]):
    """All windows at stride 1 whose inputs start in `[first, first + count)`; one copy of the series is shared."""

    def __init__(
        self,
        values: Float[np.ndarray, "n s"],
        observed: Bool[np.ndarray, "n s"],
        *,
        first: int,
        count: int,
        seq_len: int,
        horizon: int,
        past: Float[np.ndarray, "n c"] | None = None,
        future: Float[np.ndarray, "n f"] | None = None,
        static: Float[np.ndarray, "s e"] | None = None,
    ) -> None:
        self.values, self.observed = values, observed
        self.past, self.future, self.static = past, future, static
        self.first, self.count = first, count
        self.seq_len, self.horizon = seq_len, horizon

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: int | Sequence[int]) -> SeriesBatch:
        return self.__getitems__([indices] if isinstance(indices, int) else indices)

    def __getitems__(self, indices: Sequence[int]) -> SeriesBatch:
        """The windows with these numbers, in this order."""
        starts = np.asarray(indices, dtype=np.int64)
        if len(starts) and (starts.min() < -self.count or starts.max() >= self.count):
            raise IndexError(f"there are {self.count} windows; asked for {starts.min()} to {starts.max()}")
        starts = np.where(starts < 0, starts + self.count, starts) + self.first
        rows = starts[:, None] + np.arange(self.seq_len + self.horizon)
        # NumPy gathers in this thread; for so few rows PyTorch's thread pool costs more than the work.
        values, observed = torch.from_numpy(self.values[rows]), torch.from_numpy(self.observed[rows])
        return SeriesBatch(
            x=values[:, : self.seq_len],
            observed=observed[:, : self.seq_len],
            y=values[:, self.seq_len :],
            y_observed=observed[:, self.seq_len :],
            past=None if self.past is None else torch.from_numpy(self.past[rows[:, : self.seq_len]]),
            future=None if self.future is None else torch.from_numpy(self.future[rows]),
            static=None if self.static is None else torch.from_numpy(self.static).expand(len(rows), -1, -1),
        )
