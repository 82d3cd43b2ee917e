"""iTransformer: attention among series, each a token, Liu et al. 2024, arXiv:2310.06625.

A token is a series' whole window under one linear map; attention mixes series, the feed-forward network mixes time.

Source: github.com/thuml/iTransformer, c2426e6: `model/iTransformer.py`, `layers/Transformer_EncDec.py`, scripts.
Glossary: T seq_len, S horizon, N n_series, D d_model, L depth.

The forecast follows the series through any change of their order.

Departures:
  covariates    the official loader always adds time stamps as further tokens (not for PEMS and Solar); here whatever is
                given as covariates of the past is, and nothing else
  missing       missing values take no part in the statistics and are then filled with the last observed value
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.layers.attention import Attention
from selectra.layers.covariates import refuse_covariates
from selectra.layers.embed import VariateEmbed
from selectra.layers.encoder import EncoderLayer
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.missing import carry_forward
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers.sizes import require_sizes
from selectra.registry import models


def size(d_model: int, depth: int) -> dict[str, Any]:
    return {"d_model": d_model, "depth": depth}


# From the official scripts; a horizon in the name where sizes differ by it.
SIZES: dict[str, dict[str, Any]] = {
    **{f"etth1_{horizon}": size(256 if horizon < 336 else 512, 2) for horizon in (96, 192, 336, 720)},
    **{data: size(128, 2) for data in ("etth2", "ettm1", "ettm2", "exchange")},
    "weather": size(512, 3),
    "solar": size(512, 2),
    "electricity": size(512, 3),
    "traffic": size(512, 4),
}


@models.register(
    "itransformer",
    kind="series",
    source="arXiv:2310.06625",
    takes=("observed", "past"),
    smoke={"d_model": 8, "depth": 1, "n_heads": 2},
    base={},
    **SIZES,
)
class ITransformer(nn.Module):
    """Attention among series; the published sizes are named after data set (and horizon).

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        d_model: Width of a token.
        depth: Number of layers.
        n_heads: Heads of attention.
        d_ff: Width of the feed-forward networks; `None` is `d_model`.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate after the embedding, on attention weights, after attention, and in the feed-forward networks.
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
        n_heads: int = 8,
        d_ff: int | None = None,
        window_norm: WindowNorm = "instance",
        dropout: float = 0.1,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        d_ff = d_model if d_ff is None else d_ff
        require_sizes(n_series=n_series, d_model=d_model, depth=depth, d_ff=d_ff)
        require_rate(dropout=dropout)
        self.revin = RevIN(n_series, window_norm, scale_gradient=window_norm == "instance")
        self.embed = VariateEmbed(seq_len, d_model, dropout)
        rates: dict[str, Any] = {"dropout": dropout, "mixer_dropout": dropout}
        self.layers = nn.Sequential(
            *(EncoderLayer(Attention(d_model, n_heads, dropout), d_model, d_ff, **rates) for _ in range(depth))
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
