"""The compiled module `causal_conv1d_cuda`, in its three generations, and `causal_conv1d.cpp_functions`.

Which generation a caller speaks is told by the number of its arguments: the package of 2023 and early 2024 knew no
states, that of 2024 and 2025 returned what it made, the one of 2026 writes into the tensors it is given.
"""

from typing import Any

import torch
from torch import Tensor

from selectra.compat.conv import causal_conv1d_fn
from selectra.compat.conv import causal_conv1d_update as update
from selectra.errors import ConfigError


@torch.no_grad()
def causal_conv1d_fwd(*args: Any) -> Tensor | None:
    """(x, weight, bias, silu) or (x, weight, bias, seq_idx, initial_states, final_states_out, silu) -> out, or
    (x, weight, bias, seq_idx, initial_states, out, final_states_out, silu), which writes into out."""
    if len(args) == 4:
        x, weight, bias, silu = args
        return causal_conv1d_fwd_function(x, weight, bias, None, None, None, silu)
    if len(args) == 7:
        return causal_conv1d_fwd_function(*args)
    _require("causal_conv1d_fwd", args, 8, "4, 7 or 8")
    x, weight, bias, seq_idx, initial, out, final, silu = args
    out.copy_(causal_conv1d_fwd_function(x, weight, bias, seq_idx, initial, final, silu))
    return None


def causal_conv1d_bwd(*args: Any) -> list[Tensor | None] | None:
    """(x, weight, bias, dout, dx, silu) -> [dx, dweight, dbias], or (x, weight, bias, dout, seq_idx, initial_states,
    dfinal_states, dx, return_dinitial_states, silu) -> those and dinitial_states, or (..., dfinal_states, dx, dweight,
    dbias, dinitial_states, silu), which writes into them."""
    if len(args) == 6:
        x, weight, bias, dout, dx, silu = args
        return list(causal_conv1d_bwd_function(x, weight, bias, dout, None, None, None, dx, False, silu))[:3]
    if len(args) == 10:
        return list(causal_conv1d_bwd_function(*args))
    _require("causal_conv1d_bwd", args, 12, "6, 10 or 12")
    *inputs, dx, dweight, dbias, dinitial, silu = args
    found = _gradients(inputs, dx, dinitial is not None, silu)
    for place, grad in zip((dweight, dbias, dinitial), found[1:], strict=True):
        if place is not None and grad is not None:
            place.copy_(grad)
    return None


@torch.no_grad()
def causal_conv1d_update(*args: Any) -> Tensor | None:
    """(x, conv_state, weight, bias, silu[, cache_seqlens[, conv_state_indices]]) -> out, or (x, conv_state, weight,
    bias, out, silu, cache_seqlens, conv_state_indices), which writes into out."""
    if len(args) == 8:
        x, conv_state, weight, bias, out, silu, seen, rows = args
        out.copy_(causal_conv1d_update_function(x, conv_state, weight, bias, silu, seen, rows))
        return None
    if len(args) not in (5, 6, 7):
        _require("causal_conv1d_update", args, 8, "5 to 8")
    x, conv_state, weight, bias, silu, *rest = args
    seen, rows = [*rest, None, None][:2]
    return causal_conv1d_update_function(x, conv_state, weight, bias, silu, seen, rows)


def _require(name: str, args: tuple[Any, ...], number: int, allowed: str) -> None:
    if len(args) != number:
        raise ConfigError(f"causal_conv1d_cuda.{name} got {len(args)} arguments; its generations take {allowed}.")


@torch.no_grad()
def causal_conv1d_fwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
) -> Tensor:
    """`causal_conv1d.cpp_functions.causal_conv1d_fwd_function`: y, and the final states into `final_states_out`."""
    activation, asked = _activation(silu_activation), final_states_out is not None
    found: Any = causal_conv1d_fn(
        x, weight, bias, seq_idx, initial_states, asked, final_states_out, activation=activation
    )
    return found[0] if asked else found


def causal_conv1d_bwd_function(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """`causal_conv1d.cpp_functions.causal_conv1d_bwd_function`: gradients of x (into `dx` if given), weight, bias and
    initial states (None unless asked for)."""
    inputs = [x, weight, bias, dout, seq_idx, initial_states, dfinal_states]
    return _gradients(inputs, dx, return_dinitial_states, silu_activation)


def _gradients(
    inputs: list[Any], dx: Tensor | None, return_dinitial_states: bool, silu: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """By autograd: the forward is run once more, which is little beside its backward."""
    x, weight, bias, dout, seq_idx, initial, dfinal = inputs
    with torch.enable_grad():
        leaves: Any = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, initial)]
        asked = dfinal is not None
        activation = _activation(silu)
        x, weight, bias, initial = leaves
        found: Any = causal_conv1d_fn(x, weight, bias, seq_idx, initial, asked, activation=activation)
        outputs, gradients = (found, (dout, dfinal)) if asked else ((found,), (dout,))
        grads = iter(torch.autograd.grad(outputs, [t for t in leaves if t is not None], gradients))
    dinput, dweight, dbias, dinitial = (None if t is None else next(grads) for t in leaves)
    assert dinput is not None
    dinput = dinput if dx is None else dx.copy_(dinput)
    return dinput, dweight, dbias, dinitial if return_dinitial_states else None


@torch.no_grad()
def causal_conv1d_update_function(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    conv_state_indices: Tensor | None,
) -> Tensor:
    """`causal_conv1d.cpp_functions.causal_conv1d_update_function`."""
    return update(x, conv_state, weight, bias, _activation(silu_activation), cache_seqlens, conv_state_indices)


def _activation(silu: bool) -> str | None:
    return "silu" if silu else None
