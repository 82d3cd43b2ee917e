"""From raw input to tokens."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError


class PatchEmbedSeries(nn.Module):
    """Cut each series into overlapping patches and embed them, all series alike; a position is learned and added.

    Patches end at the last value. Where the first would begin before the window, it is padded as unobserved. Each
    patch is embedded from its values and, beside them, from which of them are missing; so a gap is no value.

    Args:
        seq_len: Length of the window.
        d_model: Width of a token.
        patch_len: Values in a patch.
        stride: Values from one patch's start to the next.
    """

    def __init__(self, seq_len: int, d_model: int, patch_len: int = 16, stride: int = 8) -> None:
        super().__init__()
        for name, value in (("seq_len", seq_len), ("patch_len", patch_len), ("stride", stride)):
            if value < 1:
                raise ConfigError(f"{name}={value}: needs at least 1")
        if stride > patch_len:
            raise ConfigError(f"stride={stride} is longer than patch_len={patch_len}: values between would be lost")
        self.patch_len, self.stride = patch_len, stride
        self.n_patches = 1 + max(0, -(-(seq_len - patch_len) // stride))
        self.pad = (self.n_patches - 1) * stride + patch_len - seq_len
        self.proj = nn.Linear(2 * patch_len, d_model)
        self.position = nn.Parameter(torch.randn(self.n_patches, d_model) * 0.02)

    def forward(
        self, x: Float[Tensor, "b l s"], observed: Bool[Tensor, "b l s"] | None = None
    ) -> Float[Tensor, "b s p d_model"]:
        """Tokens of each series; `x` holds 0 where unobserved."""
        missing = torch.zeros_like(x) if observed is None else (~observed).to(x.dtype)
        both = torch.stack([F.pad(x, (0, 0, self.pad, 0)), F.pad(missing, (0, 0, self.pad, 0), value=1.0)], dim=-1)
        patches = both.unfold(1, self.patch_len, self.stride)  # (b, p, s, 2, patch_len)
        return self.proj(patches.transpose(1, 2).flatten(3)) + self.position


class VariateEmbed(nn.Module):
    """A token for each series, made from its whole window; covariates of the past become further tokens behind them.

    Liu et al. 2024 (iTransformer), arXiv:2310.06625: `DataEmbedding_inverted` of its code.

    Args:
        seq_len: Length of the window.
        d_model: Width of a token.
        dropout: Rate after the map.
    """

    def __init__(self, seq_len: int, d_model: int, dropout: float = 0.0) -> None:
        super().__init__()
        if seq_len < 1:
            raise ConfigError(f"seq_len={seq_len}: needs at least 1")
        self.proj = nn.Linear(seq_len, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "b l s"], past: Float[Tensor, "b l c"] | None = None
    ) -> Float[Tensor, "b tokens d_model"]:
        """Tokens of the series, then of the covariates."""
        rows = x if past is None else torch.cat([x, past.to(x.dtype)], dim=2)
        return self.dropout(self.proj(rows.transpose(1, 2)))
