"""Memory of all earlier positions: for mixers whose state grows with the length.

Row i of a buffer holds the positions present so far in slots 0 to n_i - 1, whatever padding stood between them; so
rows of unequal lengths need no mask of their own, and a slot is a position.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from selectra.errors import ConfigError


def slots_of(n: Int[Tensor, " b"] | None, x: Tensor, mask: Bool[Tensor, "b l"] | None) -> Int[Tensor, "b l"]:
    """The slot of every position of x (b, l, ...), behind the `n` that each row has; of absent ones, some slot."""
    length = x.shape[1]
    if mask is None:
        ranks = torch.arange(length, device=x.device).expand(x.shape[0], length)
    else:
        ranks = (mask.cumsum(1) - 1).clamp(min=0)
    return ranks if n is None else ranks + n[:, None]


def count(x: Tensor, mask: Bool[Tensor, "b l"] | None) -> Int[Tensor, " b"]:
    """How many positions each row of x (b, l, ...) has."""
    if mask is not None:
        return mask.sum(1)
    return torch.full((x.shape[0],), x.shape[1], device=x.device)


def room_for(buffer: Tensor, n: Int[Tensor, " b"]) -> Tensor:
    """The buffer (b, m, ...), or one with more slots where some row has more than m positions."""
    more = (int(n.max()) if len(n) else 0) - buffer.shape[1]
    return buffer if more <= 0 else F.pad(buffer, (0, 0) * (buffer.dim() - 2) + (0, more))


def require_room(capacity: int, n: Int[Tensor, " b"], length: int) -> None:
    """Raise unless `length` more positions fit. On a GPU the host does not wait to look; there the write itself stops.

    Raises:
        ConfigError: They do not.
    """
    if length > capacity or (n.device.type == "cpu" and len(n) and int(n.max()) + length > capacity):
        got = f"{int(n.max())} positions and {length} more" if n.device.type == "cpu" else f"{length} more positions"
        raise ConfigError(
            f"the state has room for {capacity} positions and was given {got}; "
            "make it with init_state(batch, capacity=...) for prompt and answer together."
        )


def write(
    buffer: Tensor, new: Tensor, slots: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"] | None, in_place: bool
) -> Tensor:
    """The buffer (b, m, ...) with `new` (b, l, ...) in its slots; absent positions are left out."""
    rows = torch.arange(len(slots), device=slots.device)[:, None].expand_as(slots)
    if mask is not None:
        rows, slots, new = rows[mask], slots[mask], new[mask]
    new = new.to(buffer.dtype)
    return buffer.index_put_((rows, slots), new) if in_place else buffer.index_put((rows, slots), new)
