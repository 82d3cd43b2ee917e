"""The encoder layer that forecasting Transformers share."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError


class EncoderLayer(nn.Module):
    """A mixer and a feed-forward network, each added to its input and normalised after (Vaswani et al. 2017).

    Args:
        mixer: What mixes across tokens.
        d_model: Width of a token.
        d_ff: Width of the feed-forward network.
        dropout: Rate inside the feed-forward network and after it.
        mixer_dropout: Rate after the mixer.
        norm: Over each token's features, or over batch and tokens for each feature.
    """

    def __init__(
        self,
        mixer: nn.Module,
        d_model: int,
        d_ff: int,
        *,
        dropout: float = 0.0,
        mixer_dropout: float = 0.0,
        norm: Literal["layer", "batch"] = "layer",
    ) -> None:
        super().__init__()
        self.mixer, self.mixer_dropout = mixer, nn.Dropout(mixer_dropout)
        self.norm1, self.norm2 = _norm(norm, d_model), _norm(norm, d_model)
        self.feed_forward = nn.Sequential(
            nn.Linear(d_model, d_ff), nn.GELU(), nn.Dropout(dropout), nn.Linear(d_ff, d_model), nn.Dropout(dropout)
        )

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x = self.norm1(x + self.mixer_dropout(self.mixer(x)))
        return self.norm2(x + self.feed_forward(x))


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation of tokens, channels last."""

    def forward(self, input: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        return super().forward(input.flatten(0, 1)).view_as(input)


def _norm(kind: str, d_model: int) -> nn.Module:
    if kind not in ("layer", "batch"):
        raise ConfigError(f"norm={kind!r}: takes 'layer' or 'batch'")
    return nn.LayerNorm(d_model) if kind == "layer" else BatchNorm(d_model)
