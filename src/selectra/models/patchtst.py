"""PatchTST: a Transformer encoder on the patches of each series, Nie et al. 2023, arXiv:2211.14730.

Source: github.com/yuqinie98/PatchTST, 204c21e: `layers/PatchTST_backbone.py`, `scripts/PatchTST/*.sh` (supervised).
Glossary: L seq_len, T horizon, M n_series, P patch_len, S stride, D d_model, F d_ff, H n_heads.

Departures:
  attention   each layer of the code adds the attention scores of the layer before to its own (RealFormer), which the
              paper does not say; here attention is PyTorch's plain one
  patches     the code repeats the last value `stride` times for one more patch; here patches end at the last value, and
              a first one that begins before the window is padded there, marked as missing
  missing     missing values enter as marked gaps: each patch is embedded from its values and from which are missing
"""

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor, nn

from selectra.layers.attention import Attention
from selectra.layers.covariates import refuse_covariates
from selectra.layers.embed import PatchEmbedSeries
from selectra.layers.encoder import EncoderLayer
from selectra.layers.head import ForecastHead, require_rate
from selectra.layers.revin import RevIN, WindowNorm
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

# The scripts' sizes: small for the hourly ETT and illness, the same larger one for all others.
SMALL: dict[str, Any] = {"d_model": 16, "n_heads": 4, "d_ff": 128, "dropout": 0.3}
SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("etth1", "etth2"), SMALL),
    "illness": {**SMALL, "patch_len": 24, "stride": 2},
    **{data: {} for data in ("ettm1", "ettm2", "weather", "electricity", "traffic")},
}


@models.register(
    "patchtst",
    kind="series",
    source="arXiv:2211.14730",
    takes=("observed",),
    smoke={"d_model": 8, "depth": 1, "n_heads": 2, "d_ff": 16, "patch_len": 8, "stride": 4, "norm": "layer"},
    base={},
    **SIZES,
)
class PatchTST(nn.Module):
    """Attention among the patches of each series alone; the published sizes are named after data set.

    Args:
        seq_len: Values seen of each series.
        horizon: Values forecast.
        n_series: Number of series.
        d_model: Width of a token.
        depth: Number of layers.
        n_heads: Heads of attention.
        d_ff: Width of the feed-forward networks.
        patch_len: Values in a patch.
        stride: Values from one patch's start to the next.
        norm: Of tokens: over the batch for each feature, as published, or over each token's features.
        window_norm: What is removed from each window and given back to its forecast.
        dropout: Rate after the embedding, after attention, and in the feed-forward networks.
        head_dropout: Rate before the head.
        quantiles: Levels to forecast in place of one value; adds a last axis.
    """

    def __init__(
        self,
        *,
        seq_len: int,
        horizon: int,
        n_series: int,
        d_model: int = 128,
        depth: int = 3,
        n_heads: int = 16,
        d_ff: int = 256,
        patch_len: int = 16,
        stride: int = 8,
        norm: Literal["batch", "layer"] = "batch",
        window_norm: WindowNorm = "instance",
        dropout: float = 0.2,
        head_dropout: float = 0.0,
        quantiles: tuple[float, ...] = (),
    ) -> None:
        super().__init__()
        require_sizes(n_series=n_series, d_model=d_model, depth=depth, d_ff=d_ff)
        require_rate(dropout=dropout, head_dropout=head_dropout)
        self.revin = RevIN(n_series, window_norm)
        self.embed = PatchEmbedSeries(seq_len, d_model, patch_len, stride)
        # The code drops twice after attention, once in it and once behind it.
        rates: dict[str, Any] = {"dropout": dropout, "mixer_dropout": 1 - (1 - dropout) ** 2}
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            *(EncoderLayer(Attention(d_model, n_heads), d_model, d_ff, norm=norm, **rates) for _ in range(depth)),
        )
        self.dropout = nn.Dropout(head_dropout)
        self.head = ForecastHead(self.embed.n_patches * d_model, horizon, quantiles)

    def forward(
        self,
        x: Float[Tensor, "b l s"],
        *,
        observed: Bool[Tensor, "b l s"] | None = None,
        past: Float[Tensor, "b l c"] | None = None,
        future: Float[Tensor, "b t f"] | None = None,
        static: Float[Tensor, "b s e"] | None = None,
    ) -> Float[Tensor, "b horizon s *q"]:
        """The forecast."""
        refuse_covariates(self, past=past, future=future, static=static)
        x, statistics = self.revin(x, observed)
        tokens = self.embed(x, observed)  # b s p d
        y = self.layers(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])
        return self.revin.inverse(self.head(self.dropout(y.flatten(2))), statistics)
