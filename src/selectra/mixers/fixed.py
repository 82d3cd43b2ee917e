"""Numbers that look random and depend on their count and a seed alone: on every device alike, in a graph as outside."""

import math

import torch
from jaxtyping import Float, Int64
from torch import Tensor

MASK = 0xFFFFFFFF


def fixed_numbers(count: int, seed: int, device: torch.device) -> Int64[Tensor, " count"]:
    """Whole numbers from 0 to 2^32 - 1, as if drawn evenly."""
    keys = torch.arange(count, device=device) + (seed + 1) * 0x9E3779B1 % MASK
    # Murmur's last steps; products stay below 2^63.
    for _ in range(2):
        keys = ((keys ^ (keys >> 16)) & MASK) * 0x45D9F3B & MASK
    return keys ^ (keys >> 16)


def fixed_order(length: int, seed: int, device: torch.device) -> Int64[Tensor, " length"]:
    """A permutation."""
    return torch.argsort(fixed_numbers(length, seed, device), stable=True)


def fixed_normal(rows: int, columns: int, seed: int, device: torch.device) -> Float[Tensor, "rows columns"]:
    """Values as of a normal distribution (Box and Muller's transform), in float32."""
    even = (fixed_numbers(2 * rows * columns, seed, device).double() + 0.5) / (MASK + 1)
    radius, angle = even.view(2, rows, columns).unbind()
    return ((-2 * radius.log()).sqrt() * (2 * math.pi * angle).cos()).float()
