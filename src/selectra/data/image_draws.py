"""Random numbers that depend on a seed, a pass and an image alone: on any device, in any batch, resumed or not.

No generator has a state here: each number is a hash of what it is for (Steele, Lea and Flood 2014, "Fast Splittable
Pseudorandom Number Generators": SplitMix64's last steps), so that a CUDA graph draws anew from the numbers it is given.
"""

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.special import betaincinv
from torch import Tensor

GOLDEN, FIRST, SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685
BETA_POINTS = 1025


def _shift(x: Tensor, places: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def mixed(x: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Every bit of the result depends on every bit of x."""
    x = (x ^ _shift(x, 30)) * FIRST
    x = (x ^ _shift(x, 27)) * SECOND
    return x ^ _shift(x, 31)


def keys(seed: int, epoch: Int64[Tensor, "..."] | int, index: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """A number for each image of a pass."""
    # Filled in place: a copy from the host could not be part of a CUDA graph.
    start = mixed(torch.full((), seed, dtype=torch.long, device=index.device))
    passed = epoch if isinstance(epoch, Tensor) else torch.full_like(start, epoch)
    return mixed(mixed(start + passed * GOLDEN) + index * GOLDEN)


def uniforms(key: Int64[Tensor, " b"], count: int) -> Float[Tensor, "b count"]:
    """Numbers from 0 up to, but not, 1, in steps of 2^-24."""
    steps = torch.arange(1, count + 1, device=key.device) * GOLDEN
    return _shift(mixed(key[:, None] + steps), 40).float() / 2**24


def beta_table(alpha: float) -> Float[Tensor, " n"]:
    """Quantiles of the Beta(alpha, alpha) distribution at equal steps, for `beta`."""
    return torch.from_numpy(betaincinv(alpha, alpha, np.linspace(0, 1, BETA_POINTS)).astype(np.float32))


def beta(u: Float[Tensor, " b"], table: Float[Tensor, " n"]) -> Float[Tensor, " b"]:
    """Beta-distributed numbers from uniform ones."""
    place = u * (len(table) - 1)
    below = place.long()
    low, high = table[below], table[below + 1]
    return low + (high - low) * (place - below)
