"""OLS-NLinear: the linear forecaster with the last value subtracted, solved in closed form.

The deterministic reference of the long-horizon benchmarks: no seed, no epochs, seconds on one core. Other window norms
than the last value are there for comparison; whatever is removed, the squared error of the forecast itself is least.

Source: NLinear of LTSF-Linear (Zeng et al. 2023, arXiv:2205.13504), in closed form as Toner & Darlow 2024
(arXiv:2403.14587).
Departures: window norms other than "last"; a ridge of 1e-6 of the mean diagonal of the Gram matrix; every fourth
window where the look-back is over 96 rows and there are over 20,000 windows.
"""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.missing import carry_forward
from selectra.layers.revin import RevIN, WindowNorm
from selectra.registry import models

RIDGE = 1e-6
STRIDE = 4
STRIDE_ABOVE_WINDOWS = 20_000
STRIDE_ABOVE_LENGTH = 96
GATHERED_ROWS = 4096


@runtime_checkable
class Batch(Protocol):
    """What `solve` reads of a batch of training windows."""

    @property
    def x(self) -> Tensor: ...
    @property
    def observed(self) -> Tensor | None: ...
    @property
    def y(self) -> Tensor | None: ...
    @property
    def y_observed(self) -> Tensor | None: ...


class Normal:
    """Normal equations of all horizon steps, in float64.

    The steps share one Gram matrix. A target that was not observed leaves the equations of its own step alone:
    the share of such rows is kept for each step that has any, in `(seq_len + 1)^2` numbers.
    """

    def __init__(self, n_inputs: int, horizon: int, device: torch.device) -> None:
        self.gram = torch.zeros(n_inputs, n_inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(n_inputs, horizon, dtype=torch.float64, device=device)
        self.absent: dict[int, Tensor] = {}

    def add(self, inputs: Float[Tensor, "r p"], targets: Float[Tensor, "r h"], seen: Bool[Tensor, "r h"]) -> None:
        """Add rows; `targets` are 0 where not seen."""
        self.gram += inputs.T @ inputs
        self.cross += inputs.T @ targets
        partial = ~seen.all(1)
        if not partial.any():
            return
        rows, missing = inputs[partial], (~seen[partial]).double()
        for step in missing.any(0).nonzero().flatten().tolist():
            chosen = rows[missing[:, step] > 0]
            share = chosen.T @ chosen
            self.absent[step] = self.absent[step].add_(share) if step in self.absent else share

    def merge(self, other: "Normal") -> None:
        """Add another set of rows, and empty it: the shares are large, and never there twice."""
        self.gram += other.gram
        self.cross += other.cross
        for step in list(other.absent):
            share = other.absent.pop(step)
            self.absent[step] = self.absent[step].add_(share) if step in self.absent else share

    def solution(self) -> Float[Tensor, "p h"]:
        """Ridge solution of every step."""
        found = torch.empty_like(self.cross)
        whole = [step for step in range(found.shape[1]) if step not in self.absent]
        if whole:
            found[:, whole] = torch.linalg.solve(_ridged(self.gram.clone()), self.cross[:, whole])
        for step, share in self.absent.items():
            found[:, step] = torch.linalg.solve(_ridged(self.gram - share), self.cross[:, step])
        return found


def _ridged(gram: Float[Tensor, "p p"]) -> Float[Tensor, "p p"]:
    """The ridge added in place; without any row it alone decides, and the solution is 0."""
    diagonal = gram.diagonal()
    mean = diagonal.mean()
    diagonal += torch.where(mean > 0, RIDGE * mean, 1.0)
    return gram


@models.register(
    "linear", kind="series", source="arXiv:2205.13504, arXiv:2403.14587", takes=("observed",), smoke={}, base={}
)
class Linear(nn.Module):
    """One linear map from look-back to horizon, shared by all series, on values less the last one.

    Missing inputs carry the last observed value of the window forward; missing targets are left out of the equations.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        window_norm: What is removed from each window and given back to its forecast. "revin" is refused: its gain
            cancels in a linear map, and its bias is learned by gradient; `rlinear` has both.
    """

    def __init__(self, *, seq_len: int, horizon: int, window_norm: WindowNorm = "last") -> None:
        super().__init__()
        if window_norm == "revin":
            raise ConfigError(
                "linear has no window_norm 'revin': it is solved in closed form, without anything learned by gradient. "
                "Take 'instance', or the model rlinear"
            )
        self.seq_len, self.horizon = seq_len, horizon
        # Without a gain and a bias it holds nothing for each series, whose number may be any.
        self.revin = RevIN(1, window_norm)
        self.proj = nn.Linear(seq_len, horizon)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b h s"]:
        """The forecast."""
        refuse_covariates(self, past=past, future=future, static=static)
        x, statistics = self.revin(x, observed)
        x = carry_forward(x, observed)
        return self.revin.inverse(self.proj(x.transpose(1, 2)).transpose(1, 2), statistics)

    @torch.no_grad()
    def solve(self, batches: Iterable[Batch]) -> None:
        """Fit on a stream of batches of training windows, in one pass and constant memory.

        Args:
            batches: All training windows once; their order decides which are "every fourth".
        """
        device = self.proj.weight.device
        kept = Normal(self.seq_len + 1, self.horizon, device)
        others: Normal | None = Normal(self.seq_len + 1, self.horizon, device)
        count = 0
        for x, observed, y, y_observed in _gathered(batches):
            inputs, targets, seen = self._rows(x, observed, y, y_observed)
            number = torch.arange(count, count + len(inputs), device=device)
            count += len(inputs)
            fourth = number % STRIDE == 0
            kept.add(*(t[fourth].flatten(0, 1) for t in (inputs, targets, seen)))
            if self.seq_len > STRIDE_ABOVE_LENGTH and count > STRIDE_ABOVE_WINDOWS:
                others = None
            if others is not None:
                others.add(*(t[~fourth].flatten(0, 1) for t in (inputs, targets, seen)))
        if others is not None:
            kept.merge(others)
        solution = kept.solution().to(self.proj.weight.dtype)
        self.proj.weight.copy_(solution[:-1].T)
        self.proj.bias.copy_(solution[-1])

    def _rows(self, x: Tensor, observed: Tensor, y: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One row of the regression for each window and series, `(b, s, ...)`: inputs with a 1, targets, seen."""
        x, (shift, scale) = self.revin(x.double(), observed)
        # Times its scale a row's error is that of the forecast, so that flat windows do not count for more.
        inputs = torch.cat([carry_forward(x, observed), torch.ones_like(shift)], 1) * scale
        seen = seen.transpose(1, 2)
        targets = (y.double() - shift).transpose(1, 2).masked_fill(~seen, 0.0)
        return inputs.transpose(1, 2), targets, seen


def _gathered(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The batches as `x, observed, y, y_observed`, drawn together into large ones: a product of many rows is faster."""
    waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for batch in batches:
        assert batch.y is not None
        everything = torch.ones((), dtype=torch.bool, device=batch.x.device)
        observed = everything.expand_as(batch.x) if batch.observed is None else batch.observed
        seen = everything.expand_as(batch.y) if batch.y_observed is None else batch.y_observed
        waiting.append((batch.x, observed, batch.y, seen))
        if sum(x.shape[0] * x.shape[2] for x, *_ in waiting) >= GATHERED_ROWS:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(waiting: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, observed, y, seen = (torch.cat(parts) for parts in zip(*waiting, strict=True))
    return x, observed, y, seen
