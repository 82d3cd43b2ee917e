"""Covariates and missing values for series models that do not take them themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.missing import carry_forward

KINDS = ("observed", "past", "future", "static")
# Of the normal equations of all series; beyond it a solved model's covariates are left out.
MAX_GRAM = 2**22
RIDGE = 1e-6


class WithCovariates(nn.Module):
    """Gives any series model past, future and static covariates and missing values, by the contract of all.

    What the model declares in `takes` goes to it untouched. Of the others, covariates are encoded and a residual head
    adds what they say to the forecast; the head starts at 0, so the whole starts as the model alone. For a model that
    is solved in closed form the head is solved as well, as a ridge regression of the model's residuals. Missing inputs
    are filled with the last observed value of the window. `notes` says in words which of these happens.

    Args:
        model: The series model.
        takes: Which of observed, past, future and static it handles itself.
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        n_past: Number of covariates known up to now.
        n_future: Number of covariates known over the horizon too.
        n_static: Number of covariates of a series that are constant in time.
        d_hidden: Width of the encoder.
        name: What `notes` calls the model.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        takes: Collection[str],
        seq_len: int,
        horizon: int,
        n_series: int,
        n_past: int = 0,
        n_future: int = 0,
        n_static: int = 0,
        d_hidden: int = 32,
        name: str | None = None,
    ) -> None:
        super().__init__()
        unknown = sorted(set(takes) - set(KINDS))
        if unknown:
            raise ConfigError(f"takes names {', '.join(map(repr, unknown))}; a series model takes {', '.join(KINDS)}")
        self.model, self.takes = model, frozenset(takes)
        self.name = name or type(model).__name__
        counts = {"past": n_past, "future": n_future, "static": n_static}
        self.encoded = {kind: n for kind, n in counts.items() if n and kind not in self.takes}
        self.in_closed_form = hasattr(model, "solve")
        self.encoder: _Encoder | _Regression | None = None
        if self.encoded and self.in_closed_form:
            self.encoder = _Regression(seq_len, n_series, **self.encoded)
        elif self.encoded:
            self.encoder = _Encoder(seq_len, horizon, n_series, d_hidden, **self.encoded)
        if self.in_closed_form:
            # Only then: the loop asks for this method to decide whether there is anything to learn by gradient.
            self.solve = self._solve

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b h s *q"]:
        """The model's forecast, and what the covariates add to it."""
        given = {"observed": observed, "past": past, "future": future, "static": static}
        if "observed" not in self.takes:
            x = carry_forward(x, observed)
        y = self.model(x, **{kind: given[kind] for kind in KINDS if kind in self.takes})
        for kind in ("past", "future", "static"):
            if given[kind] is not None and kind not in self.takes and kind not in self.encoded:
                raise ConfigError(f"{kind} covariates were given, but {self.name} was built with n_{kind}=0")
        if self.encoder is None:
            return y
        residual = self.encoder(**{kind: given[kind] for kind in self.encoded})
        # All quantiles move together, so they stay in order.
        return y + (residual[..., None] if y.dim() == 4 else residual)

    @property
    def notes(self) -> tuple[str, ...]:
        """What this wrapper does for the model, one sentence each, for a report."""
        notes = []
        if "observed" not in self.takes:
            notes.append(
                f"{self.name} cannot use missing values as such: they are filled with the last observed value of the "
                "window (the first where none came before, the training mean where the window has none)."
            )
        if self.encoded:
            kinds = " and ".join(self.encoded)
            added = "an encoder and a residual head add them"
            if isinstance(self.encoder, _Regression):
                added = "a regression of its residuals adds them"
                if self.encoder.too_large:
                    added = "there are too many for a regression of its residuals, and they are left out"
            notes.append(f"{self.name} takes no {kinds} covariates itself: {added}.")
        return tuple(notes)

    def _solve(self, batches: Iterable[Any]) -> None:
        """The model's own closed form, on inputs filled as in `forward`, and then that of the covariates.

        Args:
            batches: All training windows, once for each pass over them.
        """
        filled = batches
        if "observed" not in self.takes:
            filled = (dataclasses.replace(b, x=carry_forward(b.x, b.observed)) for b in batches)
        self.model.solve(filled)  # pyright: ignore[reportCallIssue]
        if isinstance(self.encoder, _Regression) and not self.encoder.too_large:
            self.encoder.solve(self, batches)


class _Regression(nn.Module):
    """Covariates to a residual by one linear map for each series, the same for all steps, solved in closed form.

    It sees the future at the step and at the window's last row, the past at that row, and a constant, which says all
    that static covariates could of a series.
    """

    def __init__(self, seq_len: int, n_series: int, *, past: int = 0, future: int = 0, static: int = 0) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.weight = nn.Parameter(torch.zeros(1 + 2 * future + past, n_series))
        self.too_large = len(self.weight) ** 2 * n_series > MAX_GRAM
        self.kinds = [kind for kind, n in (("past", past), ("future", future)) if n]

    def forward(
        self,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b h s"] | Float[Tensor, " s"]:
        """The residual; the same at every step where only static covariates are there."""
        features = self._features(past, future)
        return self.weight[0] if features is None else features @ self.weight

    def _features(self, past: Tensor | None, future: Tensor | None) -> Float[Tensor, "b h p"] | None:
        parts: list[Tensor] = []
        if "future" in self.kinds:
            future = _given("future", future)
            ahead = future[:, self.seq_len :]
            parts += [ahead, future[:, self.seq_len - 1 : self.seq_len].expand_as(ahead)]
        if "past" in self.kinds:
            # Without a future there is nothing that differs between steps.
            last = _given("past", past)[:, -1:]
            parts.append(last.expand(-1, parts[0].shape[1], -1) if parts else last)
        return torch.cat([torch.ones_like(parts[0][..., :1]), *parts], -1) if parts else None

    @torch.no_grad()
    def solve(self, whole: WithCovariates, batches: Iterable[Any]) -> None:
        """Ridge regression of what the model, whose head is still 0, leaves over; hidden targets do not count."""
        p, s = self.weight.shape
        gram = torch.zeros(s, p, p, dtype=torch.float64, device=self.weight.device)
        cross = torch.zeros(s, p, dtype=torch.float64, device=self.weight.device)
        self.weight.zero_()
        for b in batches:
            forecast = whole(b.x, observed=b.observed, past=b.past, future=b.future, static=b.static)
            residuals = torch.where(b.y_observed, b.y - forecast, 0.0).double()
            features = self._features(b.past, b.future)
            ones = residuals.new_ones(*residuals.shape[:2], 1)
            features = ones if features is None else features.double().expand(-1, residuals.shape[1], -1)
            rows = features.flatten(0, 1)
            for i in range(s):
                seen = b.y_observed[..., i].flatten()
                chosen = rows[seen]
                gram[i] += chosen.T @ chosen
                cross[i] += chosen.T @ residuals[..., i].flatten()[seen]
        diagonal = gram.diagonal(dim1=1, dim2=2)
        mean = diagonal.mean(1, keepdim=True)
        diagonal += torch.where(mean > 0, RIDGE * mean, 1.0)
        self.weight.copy_(torch.linalg.solve(gram, cross).T)


class _Encoder(nn.Module):
    """Covariates to a residual for every step and series.

    The past speaks through one map over its whole length, the future step by step and through the same kind of map,
    static covariates once for each series; a learned vector lets each series answer in its own way.
    """

    def __init__(
        self,
        seq_len: int,
        horizon: int,
        n_series: int,
        d_hidden: int,
        *,
        past: int = 0,
        future: int = 0,
        static: int = 0,
    ) -> None:
        super().__init__()
        self.horizon = horizon
        self.past = _OverTime(past, seq_len, horizon, d_hidden) if past else None
        self.future = _OverTime(future, seq_len + horizon, horizon, d_hidden) if future else None
        self.future_step = nn.Linear(future, d_hidden) if future else None
        self.static = nn.Linear(static, d_hidden) if static else None
        self.series = nn.Parameter(torch.randn(n_series, d_hidden) * d_hidden**-0.5)
        self.hidden = nn.Linear(d_hidden, d_hidden)
        self.head = nn.Linear(d_hidden, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b h s"]:
        hidden = self.series[None, None]  # 1 1 s d
        if self.past is not None:
            hidden = hidden + self.past(_given("past", past))[:, :, None]  # b h 1 d
        if self.future is not None and self.future_step is not None:
            future = _given("future", future)
            over_horizon = self.future(future) + self.future_step(future[:, -self.horizon :])
            hidden = hidden + over_horizon[:, :, None]
        if self.static is not None:
            hidden = hidden + self.static(_given("static", static))[:, None]  # b 1 s d
        residual = self.head(F.gelu(self.hidden(F.gelu(hidden)))).squeeze(-1)
        return residual.expand(-1, self.horizon, -1)


class _OverTime(nn.Module):
    """`(b, l, c)` to `(b, h, d)`: features first, then one map along time."""

    def __init__(self, n_covariates: int, length: int, horizon: int, d_hidden: int) -> None:
        super().__init__()
        self.features = nn.Linear(n_covariates, d_hidden)
        self.time = nn.Linear(length, horizon)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b h d"]:
        return self.time(self.features(x).transpose(1, 2)).transpose(1, 2)


def refuse_covariates(model: nn.Module, **given: Tensor | None) -> None:
    """Raise where a model was given covariates that it would not use."""
    for kind, covariates in given.items():
        if covariates is not None:
            raise ConfigError(
                f"{type(model).__name__} takes no {kind} covariates itself; "
                "selectra.layers.covariates.WithCovariates gives them to any model."
            )


def _given(kind: str, covariates: Tensor | None) -> Tensor:
    if covariates is None:
        raise ConfigError(f"{kind} covariates are missing; the model was built with them")
    return covariates
