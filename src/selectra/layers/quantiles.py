"""Quantiles for every series model, whether it forecasts them itself or not."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError

# Residuals that are kept to read quantiles from; every second, fourth, ... window where there are more.
MAX_RESIDUALS = 2**25


class WithQuantiles(nn.Module):
    """Gives any series model quantiles that never cross.

    A model with quantiles of its own (`native`) keeps them; to one of points an offset for every step, series and level
    is added. The offsets are learned with the pinball loss where the model learns by gradient; a model that is solved,
    or has nothing to learn, gets the quantiles of its residuals on the training windows. In both cases the levels of
    one value are sorted, which can only lower the pinball loss.

    Source: the sorting is the rearrangement of Chernozhukov, Fernandez-Val and Galichon 2010, Econometrica 78(3).

    Args:
        model: The series model.
        quantiles: Levels, rising, each above 0 and below 1.
        native: Whether the model was built with these quantiles, and its forecast has their axis.
        horizon: Values forecast.
        n_series: Number of series.
    """

    def __init__(
        self, model: nn.Module, quantiles: Sequence[float], *, native: bool, horizon: int, n_series: int
    ) -> None:
        super().__init__()
        require_quantiles(quantiles)
        self.model, self.quantiles, self.native = model, tuple(quantiles), native
        if not native:
            learns = any(p.requires_grad for p in model.parameters()) and not hasattr(model, "solve")
            # Where training starts: apart, in order, and around the point forecast.
            start = torch.special.ndtri(torch.tensor(self.quantiles, dtype=torch.float64)).float()
            self.offsets = nn.Parameter(start.expand(horizon, n_series, -1).clone())
            if not learns:
                # Only then: the loop asks for this method to decide whether there is anything to learn by gradient.
                self.solve = self._solve

    def forward(self, x: Float[Tensor, "b l s"], **inputs: Tensor | None) -> Float[Tensor, "b h s q"]:
        """The quantiles in rising order; inputs as the model takes them."""
        y = self.model(x, **inputs)
        return (y if self.native else y[..., None] + self.offsets).sort(-1).values

    @torch.no_grad()
    def _solve(self, batches: Iterable[Any]) -> None:
        """The model's own closed form if it has one, and then the residuals' quantiles."""
        solve = getattr(self.model, "solve", None)
        if solve is not None:
            solve(batches)
        kept, stride, count = [], 1, 0
        for batch in batches:
            y = self.model(batch.x, observed=batch.observed, past=batch.past, future=batch.future, static=batch.static)
            # What was not observed has no quantile.
            residuals = torch.where(batch.y_observed, batch.y - y, torch.nan)
            kept.append(residuals[(-count) % stride :: stride])
            count += len(residuals)
            if sum(each.numel() for each in kept) > MAX_RESIDUALS:
                kept, stride = [torch.cat(kept)[::2]], 2 * stride
        levels = torch.tensor(self.quantiles, dtype=self.offsets.dtype, device=self.offsets.device)
        for step in range(self.offsets.shape[0]):
            residuals = torch.cat([each[:, step] for each in kept])
            found = residuals.nanquantile(levels, 0).T  # s q
            self.offsets[step] = torch.where(found.isnan(), self.offsets[step], found)


def require_quantiles(quantiles: Sequence[float]) -> None:
    """Raise unless the levels rise from above 0 to below 1."""
    rising = all(a < b for a, b in pairwise(quantiles))
    if not rising or any(not 0 < level < 1 for level in quantiles):
        raise ConfigError(f"quantiles={tuple(quantiles)}: they must rise, each above 0 and below 1, as (0.1, 0.5, 0.9)")
