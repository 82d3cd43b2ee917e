"""Rotary positions: pairs of channels turn by an angle that grows with the position."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_angles(width: int, base: float = 10_000.0, device: torch.device | None = None) -> Float[Tensor, " pairs"]:
    """Radians that each of `width / 2` pairs turns by from one position to the next.

    Su et al. 2021, "RoFormer", arXiv:2104.09864, Eq. 15.
    """
    return base ** -(torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)


def rotate(
    x: Float[Tensor, "b l h p"],
    positions: Int[Tensor, "b l"],
    angles: Float[Tensor, " pairs"],
    interleaved: bool = False,
) -> Float[Tensor, "b l h p"]:
    """Turn every pair of channels by its angle times the position.

    Args:
        x: Queries or keys.
        positions: Of every token.
        angles: Radians a position.
        interleaved: Pairs are neighbours (0, 1), (2, 3), ..., else halves (0, p / 2), (1, p / 2 + 1), ...
    """
    # Angles of far positions need more digits than a half-precision activation has.
    dtype = torch.promote_types(x.dtype, torch.float32)
    turned = (positions[..., None] * angles.to(dtype))[:, :, None]
    cos, sin = turned.cos().to(x.dtype), turned.sin().to(x.dtype)
    if interleaved:
        first, second = x[..., ::2], x[..., 1::2]
        return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
