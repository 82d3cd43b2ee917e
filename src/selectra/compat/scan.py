"""`mamba_ssm.ops.selective_scan_interface`'s scan: its names, arguments and layout over our operator."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from selectra.compat.layout import as_wide_as, positions, refuse_complex, same_groups, swapped
from selectra.ops import selective_scan
from selectra.ops.selective_scan.call import prepare
from selectra.ops.selective_scan.reference import run as run_reference


def selective_scan_fn(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d n"],
    B: Tensor,
    C: Tensor,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d l"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool | None = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan, as `mamba_ssm.ops.selective_scan_interface.selective_scan_fn`.

    Args:
        u: Input.
        delta: Step size.
        A: Decay; real.
        B: (d, n), (b, n, l) or (b, g, n, l).
        C: As B.
        D: Weight of the skip connection.
        z: Gate, before SiLU.
        delta_bias: Added to `delta`.
        delta_softplus: Whether softplus is applied to `delta`.
        return_last_state: Also return the state after the last position, (b, d, n).

    Returns:
        y (b, d, l) in u's type, or y and the state. Here the state has a gradient too, which theirs has not.
    """
    flags: dict[str, Any] = {"delta_softplus": bool(delta_softplus), "return_final_state": bool(return_last_state)}
    found: Any = selective_scan(*arguments(u, delta, A, B, C, D, z, delta_bias), **flags)
    return (swapped(found[0]), found[1]) if return_last_state else swapped(found)


def selective_scan_ref(
    u: Float[Tensor, "b d l"],
    delta: Float[Tensor, "b d l"],
    A: Float[Tensor, "d n"],
    B: Tensor,
    C: Tensor,
    D: Float[Tensor, " d"] | None = None,
    z: Float[Tensor, "b d l"] | None = None,
    delta_bias: Float[Tensor, " d"] | None = None,
    delta_softplus: bool | None = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `selective_scan_fn`, by our reference: a loop in plain PyTorch, in float64 where u is."""
    flags: dict[str, Any] = {"delta_softplus": bool(delta_softplus), "return_final_state": bool(return_last_state)}
    found: Any = run_reference(prepare(*arguments(u, delta, A, B, C, D, z, delta_bias), **flags))
    return (swapped(found[0]), found[1]) if return_last_state else swapped(found)


def arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> tuple[Any, Any, Any, Any, Any, Any, Any, Any]:
    """The first eight arguments of our scan from theirs: views, and parameters in float64 where u is.

    Raises:
        ConfigError: A, B or C is complex, or B or C has a shape that there is not.
    """
    refuse_complex(A=A, B=B, C=C)
    batch, _, length = u.shape
    B, C = same_groups(positions(B, batch, length), positions(C, batch, length))
    return (
        swapped(u),
        as_wide_as(u, swapped(delta)),
        as_wide_as(u, A),
        as_wide_as(u, B),
        as_wide_as(u, C),
        as_wide_as(u, D),
        None if z is None else as_wide_as(u, swapped(z)),
        as_wide_as(u, delta_bias),
    )
