"""S-Mamba (Simple-Mamba): the series scanned as tokens in both directions, Wang et al. 2024, arXiv:2403.11144.

A token is a series' whole window under one linear map. Each layer scans the tokens by two Mambas, one from the first
series to the last and one back, and reads each token by a feed-forward network, which is where time is mixed.

Source: github.com/wzhwzhwzh0921/S-D-Mamba, e7e8bf0: `model/S_Mamba.py`, `layers/Mamba_EncDec.py`, scripts.
Glossary: L seq_len, T horizon, V n_series, D d_model, d_ff the feed-forward width, e_layers depth.

The result depends on the order of the series.

Departures:
  covariates    the official loader always adds time stamps as further tokens (not for PEMS and Solar); here whatever is
                given as covariates of the past is, and nothing else
  missing       missing values take no part in the statistics and are then filled with the last observed value
  unused parts  two Mambas and an attention that each official layer holds and never calls are left out
"""

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.covariates import refuse_covariates
from selectra.layers.embed import VariateEmbed
from selectra.layers.encoder import EncoderLayer
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.missing import carry_forward
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers import S6
from selectra.mixers.sizes import require_sizes
from selectra.registry import models


def size(d_model: int, depth: int, d_state: int = 32, **others: Any) -> dict[str, Any]:
    """A published size: the feed-forward network is as wide as the tokens in all; 32 states unless a script says."""
    return {"d_model": d_model, "depth": depth, "d_state": d_state, **others}


# From the official scripts; a horizon in the name where sizes differ by it.
SIZES: dict[str, dict[str, Any]] = {
    "etth1": size(256, 2, 2),
    "etth2": size(256, 2, 2),
    **{
        f"ettm{i}_{horizon}": size(256 if horizon == 96 else 128, 2, 2)
        for i in (1, 2)
        for horizon in (96, 192, 336, 720)
    },
    "exchange": size(128, 2),
    "weather": size(512, 3, 2),
    "solar": size(512, 2),
    "electricity_96": size(512, 3, 16),
    **{f"electricity_{horizon}": size(512, 3) for horizon in (192, 336, 720)},
    "traffic": size(512, 4),
    **{f"pems03_{horizon}": size(512, 5 if horizon == 48 else 4) for horizon in (12, 24, 48, 96)},
    "pems04": size(1024, 4, window_norm="none"),
    **{f"pems07_{horizon}": size(512, 2 if horizon < 48 else 4, window_norm="none") for horizon in (12, 24, 48, 96)},
    **{f"pems08_{horizon}": size(512, 2) if horizon < 48 else size(256, 4) for horizon in (12, 24, 48, 96)},
}


class BothWays(nn.Module):
    """Two whole Mambas, one of which scans from the last token to the first; their outputs are summed."""

    def __init__(self, d_model: int, **mixer: Any) -> None:
        super().__init__()
        self.ahead, self.back = S6(d_model, **mixer), S6(d_model, **mixer)

    def forward(self, x: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        return self.ahead(x) + self.back(x, reverse=True)


@models.register(
    "s_mamba",
    kind="series",
    source="arXiv:2403.11144",
    takes=("observed", "past"),
    smoke={"d_model": 8, "depth": 1},
    base={},
    **SIZES,
)
class SMamba(nn.Module):
    """Mambas both ways across the series, each a token; the published sizes are named after data set (and horizon).

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        d_model: Width of a token.
        depth: Number of layers.
        d_ff: Width of the feed-forward networks; `None` is `d_model`.
        d_state: State size per channel of the Mambas.
        d_conv: Width of their short convolutions.
        expand: Their inner width over `d_model`.
        directions: Scan the series both ways, as published, or from the first to the last alone.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate after the embedding and in the feed-forward networks.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        d_model: int = 256,
        depth: int = 2,
        d_ff: int | None = None,
        d_state: int = 2,
        d_conv: int = 2,
        expand: int | float = 1,
        directions: Literal["both", "ahead"] = "both",
        window_norm: WindowNorm = "instance",
        dropout: float = 0.1,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        d_ff = d_model if d_ff is None else d_ff
        require_sizes(n_series=n_series, depth=depth, d_ff=d_ff)
        require_rate(dropout=dropout)
        self.revin = RevIN(n_series, window_norm, scale_gradient=window_norm == "instance")
        self.embed = VariateEmbed(seq_len, d_model, dropout)
        if directions not in ("both", "ahead"):
            raise ConfigError(f"directions={directions!r}: takes 'both' or 'ahead'")
        mixer, mixed = (
            {"d_state": d_state, "d_conv": d_conv, "expand": expand},
            BothWays if directions == "both" else S6,
        )
        self.layers = nn.Sequential(
            *(EncoderLayer(mixed(d_model, **mixer), d_model, d_ff, dropout=dropout) for _ in range(depth))
        )
        self.norm_f = nn.LayerNorm(d_model)
        self.head = ForecastHead(d_model, horizon, quantiles)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b horizon s *q"]:
        """The forecast; covariates of the past are further tokens."""
        refuse_covariates(self, future=future, static=static)
        x, statistics = self.revin(x, observed)
        tokens = self.layers(self.embed(carry_forward(x, observed), past))
        y = self.head(self.norm_f(tokens)[:, : x.shape[2]])
        return self.revin.inverse(y, statistics)
