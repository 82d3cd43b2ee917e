"""The package `causal_conv1d`: its names, arguments and layout over our operator."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from selectra.compat.layout import as_wide_as, swapped
from selectra.errors import ConfigError
from selectra.ops import causal_conv1d

ACTIVATIONS = (None, "silu", "swish")


def causal_conv1d_fn(
    x: Float[Tensor, "b d l"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    seq_idx: Int[Tensor, "b l"] | str | None = None,
    initial_states: Float[Tensor, "b d k_1"] | None = None,
    return_final_states: bool = False,
    final_states_out: Float[Tensor, "b d k_1"] | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The short causal convolution, as `causal_conv1d.causal_conv1d_fn`.

    Args:
        x: Input.
        weight: One filter of k taps a channel.
        bias: Added before the activation.
        seq_idx: Which packed sequence a position belongs to; nothing crosses from one to another, and a negative one
            gives 0. In the package of 2024 the activation stood here, and may still.
        initial_states: The k - 1 inputs before the first, oldest first.
        return_final_states: Also return the last k - 1 inputs.
        final_states_out: Where to write them.
        activation: "silu", "swish" (the same) or None.

    Returns:
        y (b, d, l), or y and the final states.

    Raises:
        ConfigError: The activation is unknown, or states were asked for together with `seq_idx`.
    """
    if isinstance(seq_idx, str):
        seq_idx, activation = None, seq_idx
    act = _activation(activation)
    weight, bias = as_wide_as(x, weight), as_wide_as(x, bias)
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ConfigError("causal_conv1d_fn: seq_idx goes with neither initial_states nor return_final_states.")
        return _packed(x, weight, bias, seq_idx, act)
    initial = None if initial_states is None else F.pad(initial_states, (weight.shape[1] - initial_states.shape[2], 0))
    initial = as_wide_as(x, initial)
    if not return_final_states:
        return swapped(causal_conv1d(swapped(x), weight, bias, act, initial_state=initial))
    y, state = causal_conv1d(swapped(x), weight, bias, act, initial_state=initial, return_final_state=True)
    final = state[..., 1:].to(x.dtype)
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return swapped(y), final


def causal_conv1d_ref(
    x: Float[Tensor, "b d l"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    initial_states: Float[Tensor, "b d k_1"] | None = None,
    return_final_states: bool = False,
    final_states_out: Float[Tensor, "b d k_1"] | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """As `causal_conv1d_fn`, with the arguments of the package's reference."""
    return causal_conv1d_fn(x, weight, bias, None, initial_states, return_final_states, final_states_out, activation)


def causal_conv1d_update(
    x: Tensor,
    conv_state: Float[Tensor, "b d s"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    activation: str | None = None,
    cache_seqlens: Int[Tensor, " b"] | None = None,
    conv_state_indices: Int[Tensor, " b"] | None = None,
) -> Tensor:
    """The next positions of a running convolution, as `causal_conv1d.causal_conv1d_update`.

    Args:
        x: (b, d) or (b, d, l).
        conv_state: The last inputs, at least k - 1, oldest first; overwritten with those after x.
        weight: One filter of k taps a channel.
        bias: Added before the activation.
        activation: "silu", "swish" (the same) or None.
        cache_seqlens: If given, `conv_state` is a ring in which position t stands at t mod s, and these many positions
            have been.
        conv_state_indices: If given, the rows of a larger `conv_state` that belong to x's rows.

    Returns:
        y, in x's shape.
    """
    act = _activation(activation)
    weight, bias = as_wide_as(x, weight), as_wide_as(x, bias)
    new = x.unsqueeze(-1) if x.dim() == 2 else x
    rows = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
    before, after = _ring(rows, new, weight.shape[1], cache_seqlens)
    initial = as_wide_as(x, F.pad(before, (1, 0)))
    y = swapped(causal_conv1d(swapped(new), weight, bias, act, initial_state=initial))
    with torch.no_grad():
        if conv_state_indices is None:
            conv_state.copy_(after)
        else:
            conv_state[conv_state_indices.long()] = after
    return y.squeeze(-1) if x.dim() == 2 else y


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Float[Tensor, "b d s"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    activation: str | None = None,
    cache_seqlens: Int[Tensor, " b"] | None = None,
) -> Tensor:
    """As `causal_conv1d_update`, with the arguments of the package's reference."""
    return causal_conv1d_update(x, conv_state, weight, bias, activation, cache_seqlens)


@torch.no_grad()
def causal_conv1d_varlen_states(
    x: Float[Tensor, "t d"], cu_seqlens: Int[Tensor, " n_seqs_plus_1"], state_len: int
) -> Float[Tensor, "n_seqs d state_len"]:
    """The last inputs of every packed sequence, zeros before short ones; without a gradient, as theirs.

    Args:
        x: Sequences one after the other.
        cu_seqlens: Their borders.
        state_len: How many inputs of each.
    """
    ends, starts = cu_seqlens[1:].long(), cu_seqlens[:-1].long()
    place = ends[:, None] + torch.arange(-state_len, 0, device=x.device)
    there = place >= starts[:, None]
    # Read row by row and laid out as theirs: channels last.
    states = x.index_select(0, torch.where(there, place, 0).flatten()).view(*place.shape, -1)
    return swapped(states.masked_fill(~there[..., None], 0))


def _activation(activation: str | None) -> Any:
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation is {activation!r}; allowed are None, 'silu' and 'swish'.")
    return None if activation is None else "silu"


def _packed(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, activation: Any) -> Tensor:
    """Every run of one index as a packed sequence of its own."""
    batch, d, length = x.shape
    starts = torch.ones_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    end = torch.tensor([batch * length], device=x.device)
    borders = torch.cat([starts.flatten().nonzero().flatten(), end]).to(torch.int32)
    absent = (seq_idx < 0).unsqueeze(-1)
    rows = swapped(x).masked_fill(absent, 0).reshape(1, batch * length, d)
    y = causal_conv1d(rows, weight, bias, activation, cu_seqlens=borders).view(batch, length, d)
    return swapped(y.masked_fill(absent, 0))


def _ring(
    state: Float[Tensor, "b d s"], x: Float[Tensor, "b d l"], k: int, seen: Tensor | None
) -> tuple[Float[Tensor, "b d k_1"], Float[Tensor, "b d s"]]:
    """The k - 1 inputs before x, and the state after x."""
    size, length = state.shape[2], x.shape[2]
    # A copy: the state is overwritten while a backward may still need it.
    if seen is None:
        return state[..., size - k + 1 :].clone(), torch.cat([state, x.to(state.dtype)], -1)[..., -size:]
    before = torch.arange(1 - k, 0, device=x.device) + seen.long()[:, None]
    taken = state.gather(2, (before % size)[:, None].expand(-1, state.shape[1], -1))
    # The newest inputs alone, where there are more than the ring holds.
    kept = min(length, size)
    places = torch.arange(length - kept, length, device=x.device) + seen.long()[:, None]
    places = (places % size)[:, None].expand(-1, state.shape[1], -1)
    return taken, state.scatter(2, places, x[..., length - kept :].to(state.dtype))
