"""Packed sequences as a padded batch, for mixers that have no other notion of a border."""

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import checks


def by_sequence(
    mix: Callable[[Float[Tensor, "n m d"], Bool[Tensor, "n m"]], Float[Tensor, "n m d"]],
    x: Float[Tensor, "1 l d"],
    cu_seqlens: Int32[Tensor, " borders"],
) -> Float[Tensor, "1 l d"]:
    """Run a mixer on packed sequences, each one a row that is padded on the right.

    Raises:
        ConfigError: The borders do not fit x.
    """
    checks.count_states(x, None, cu_seqlens)
    borders = checks.sequence_borders(cu_seqlens, x.shape[1])
    lengths = [end - start for start, end in pairwise(borders)]
    if not any(lengths):
        return torch.zeros_like(x)
    n, longest = len(lengths), max(lengths)
    mask = torch.arange(longest, device=x.device) < cu_seqlens.diff()[:, None]
    rows = x.new_zeros(n, longest, x.shape[2]).masked_scatter(mask[..., None], x)
    return mix(rows, mask)[mask][None]


def sequence_of(cu_seqlens: Int32[Tensor, " borders"], length: int) -> Int32[Tensor, "1 l"]:
    """Which packed sequence every position belongs to.

    Raises:
        ConfigError: The borders are not those of `length` positions.
    """
    if cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise ConfigError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it must be (n_seqs + 1,).")
    checks.sequence_borders(cu_seqlens, length)
    positions = torch.arange(length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:], positions, right=True, out_int32=True)[None]
