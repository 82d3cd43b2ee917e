"""The sizes that mixers take, checked before anything is built."""

import difflib
import math
from numbers import Integral, Real
from typing import Any, NamedTuple

from selectra.errors import ConfigError


class Sizes(NamedTuple):
    """What follows from a mixer's arguments."""

    d_inner: int
    """Width between the projections."""
    dt_rank: int
    """Rank of the step's projection."""


def mixer_sizes(d_model: int, d_state: int, d_conv: int, expand: int | float, dt_rank: Any) -> Sizes:
    """Check a mixer's sizes, and work out those that depend on others.

    Raises:
        ConfigError: One that cannot be; the message names it.
    """
    require_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv)
    d_inner = inner_width(expand, d_model)
    if isinstance(dt_rank, str) and dt_rank != "auto":
        hint = " Did you mean 'auto'?" if difflib.get_close_matches(dt_rank, ["auto"]) else ""
        raise ConfigError(f"dt_rank={dt_rank!r}: takes 'auto' or a whole number of at least 1.{hint}")
    rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
    require_sizes(dt_rank=rank)
    return Sizes(d_inner, rank)


def inner_width(expand: int | float, d_model: int) -> int:
    """The width between the projections.

    Raises:
        ConfigError: There is no such width.
    """
    if not isinstance(expand, Real) or isinstance(expand, bool) or not 0 < expand < math.inf:
        raise ConfigError(f"expand={expand!r}: needs a finite number above 0")
    d_inner = int(expand * d_model)
    if d_inner < 1:
        raise ConfigError(f"expand={expand} gives d_inner={d_inner} for d_model={d_model}: needs at least 1")
    return d_inner


def require_sizes(**sizes: Any) -> None:
    """Raise unless each is a whole number of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise ConfigError(f"{name}={size!r}: needs a whole number")
        if size < 1:
            raise ConfigError(f"{name}={size}: needs at least 1")
