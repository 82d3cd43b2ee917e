"""Monarch matrices: dense linear maps from two block-diagonal ones (Dao et al. 2022, arXiv:2204.00595)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.ops.spectral import block_product


class Monarch(nn.Module):
    """A linear map as two block-diagonal ones with a transposition after each; every output hears every input.

    Args:
        d_in: Features in.
        d_out: Features out.
        n_blocks: Blocks of both factors; its square divides both widths.
    """

    def __init__(self, d_in: int, d_out: int, n_blocks: int) -> None:
        super().__init__()
        if min(d_in, d_out) % n_blocks**2 or max(d_in, d_out) % n_blocks:
            raise ConfigError(f"widths {d_in} and {d_out} must be multiples of n_blocks^2 = {n_blocks**2}")
        between = min(d_in, d_out) // n_blocks
        self.first = nn.Parameter(_start(n_blocks, d_in // n_blocks, between))
        self.second = nn.Parameter(_start(n_blocks, between, d_out // n_blocks))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l e"]:
        k = len(self.first)
        y = block_product(x.unflatten(2, (k, -1)), self.first)
        y = block_product(y.transpose(2, 3).reshape(y.shape), self.second)
        return y.transpose(2, 3).flatten(2) + self.bias


class MonarchMLP(nn.Sequential):
    """Two Monarch maps around a GELU."""

    def __init__(self, d_model: int, d_hidden: int, n_blocks: int) -> None:
        super().__init__(Monarch(d_model, d_hidden, n_blocks), nn.GELU(), Monarch(d_hidden, d_model, n_blocks))


def _start(n_blocks: int, d_in: int, d_out: int) -> Float[Tensor, "k d e"]:
    """As a linear layer of a block's width starts."""
    return (2 * torch.rand(n_blocks, d_in, d_out) - 1) / math.sqrt(d_in)
