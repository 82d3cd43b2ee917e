"""Between the field's layout, (b, d, l), and ours, (b, l, d): views only, in both directions."""

from typing import overload

import torch
from jaxtyping import Float
from torch import Tensor

from selectra.errors import ConfigError


def swapped(x: Tensor) -> Tensor:
    """(b, d, l) as (b, l, d), or back; a view."""
    return x.transpose(1, 2)


def refuse_complex(**tensors: Tensor | None) -> None:
    """Raise if one is complex: mamba_ssm's kernels take complex A, ours do not.

    Raises:
        ConfigError: One is.
    """
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_complex():
            raise ConfigError(
                f"{name} is {tensor.dtype}; selectra.compat covers real A, B and C alone (every released model of the "
                "field has real ones). Pass a real tensor, or install mamba_ssm with its CUDA kernel for complex ones."
            )


@overload
def as_wide_as(u: Tensor, x: Tensor) -> Tensor: ...
@overload
def as_wide_as(u: Tensor, x: Tensor | None) -> Tensor | None: ...
def as_wide_as(u: Tensor, x: Tensor | None) -> Tensor | None:
    """`x` in float64 where u is, and in u's type where u is not and `x` is: the operators take no mixture of these."""
    mixed = x is not None and (x.dtype == torch.float64) != (u.dtype == torch.float64)
    return x.to(u.dtype) if mixed and x is not None else x


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def positions(x: Tensor, batch: int, length: int) -> Float[Tensor, "b l g n"]:
    """B or C of the field by position: (d, n), constant in time, (b, n, l) or (b, g, n, l); a view.

    Raises:
        ConfigError: It has another number of axes.
    """
    if x.dim() == 2:
        # A group for each channel, and no copy for a position.
        return x.expand(batch, length, *x.shape)
    if x.dim() == 3:
        return x.transpose(1, 2).unsqueeze(2)
    if x.dim() == 4:
        return x.permute(0, 3, 1, 2)
    raise ConfigError(f"B or C has shape {tuple(x.shape)}; it must be (d, n), (b, n, l) or (b, g, n, l).")


def same_groups(
    B: Float[Tensor, "b l g n"], C: Float[Tensor, "b l h n"]
) -> tuple[Float[Tensor, "b l k n"], Float[Tensor, "b l k n"]]:
    """Both with the groups of the one that has more; a single group is repeated by stride."""
    groups = max(B.shape[2], C.shape[2])
    return _in_groups(B, groups), _in_groups(C, groups)


def _in_groups(x: Float[Tensor, "b l g n"], groups: int) -> Float[Tensor, "b l k n"]:
    batch, length, own, n = x.shape
    if own == groups:
        return x
    if own == 1:
        return x.expand(batch, length, groups, n)
    if groups % own:
        raise ConfigError(f"B and C have {own} and {groups} groups; one number must divide the other.")
    return x.repeat_interleave(groups // own, 2)


def back_to(source: Tensor, grad: Float[Tensor, "b l k n"]) -> Tensor:
    """The gradient of `source`, B or C as it came, from that of what `positions` and `same_groups` made of it."""
    if source.dim() == 2:
        return grad.sum((0, 1))
    own = source.shape[1] if source.dim() == 4 else 1
    if grad.shape[2] != own:
        grad = grad.unflatten(2, (own, -1)).sum(3)
    return grad.permute(0, 2, 3, 1) if source.dim() == 4 else swapped(grad.squeeze(2))
