"""The causal convolution's arguments: checked, and brought to one form that every backend takes."""

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, ParamSpec, overload

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from selectra.errors import ConfigError
from selectra.ops import checks
from selectra.ops.dispatch import Op

P = ParamSpec("P")


class ConvCall(NamedTuple):
    """One checked call; weight, bias and state have the compute type."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None
    mask: Tensor | None
    cu_seqlens: Tensor | None
    silu: bool
    reverse: bool
    return_final_state: bool

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Everything that may need a gradient."""
        return self[:4]


def prepare(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None = None,
    activation: Literal["silu"] | None = None,
    *,
    initial_state: Float[Tensor, "b d k"] | None = None,
    return_final_state: bool = False,
    reverse: bool = False,
    mask: Bool[Tensor, "b l"] | None = None,
    cu_seqlens: Int32[Tensor, " n_seqs_plus_1"] | None = None,
) -> ConvCall:
    """Convolve each channel with its own short causal filter, then apply SiLU where asked.

    `y_t = activation(bias + sum_j weight[:, j] x_{t - k + 1 + j})`. All of it is differentiable, the states too.
    Arithmetic is float32, or float64 when every tensor is float64; y has x's type.

    Source: the short convolution of Mamba (arXiv:2312.00752), Sec. 3.4, as `causal_conv1d` computes it.

    Args:
        x: Input, channels last.
        weight: One filter of k taps per channel; the last tap meets the current position.
        bias: Added before the activation.
        activation: "silu" or `None`.
        initial_state: The k inputs before the first position, newest last, as mamba_ssm keeps them; (b, d, k), or
            (n_seqs, d, k) with `cu_seqlens`. The oldest reaches no output.
        return_final_state: Also return the last k inputs in scan order, zeros where there were none.
        reverse: Run from the last position to the first; equals flip, convolve, flip.
        mask: True = present. An absent position counts as zero, its y is exactly 0 and it gets no gradient.
        cu_seqlens: Borders of sequences packed along the length, from 0 to l; needs b = 1, excludes `mask`.

    Returns:
        y (b, l, d), or the pair of y and the final state, (b, d, k) or (n_seqs, d, k), when `return_final_state`.

    Raises:
        ConfigError: An argument does not fit; the message says which, what it is and what is allowed.
        BackendError: The backend that was asked for refuses this call; the message is its reason.
    """
    if x.dim() != 3:
        raise ConfigError(f"x has shape {tuple(x.shape)}; it must be (b, l, d), channels last.")
    d = x.shape[2]
    if weight.dim() != 2 or weight.shape[0] != d or weight.shape[1] < 1:
        raise ConfigError(f"weight has shape {tuple(weight.shape)}; it must be (d, k) with d = {d} and k at least 1.")
    if activation not in (None, "silu"):
        raise ConfigError(f"activation is {activation!r}; allowed are 'silu' and None.")
    n_states = checks.count_states(x, mask, cu_seqlens)
    checks.require_fitting({"x": x, "weight": weight, "bias": bias, "initial_state": initial_state})
    checks.require_shapes({"bias": bias}, (d,), "(d,)")
    letters = "(b, d, k)" if cu_seqlens is None else "(n_seqs, d, k)"
    checks.require_shapes({"initial_state": initial_state}, (n_states, *weight.shape), letters)
    dtype = checks.compute_dtype(x.dtype == torch.float64)
    return ConvCall(
        x,
        weight.to(dtype),
        None if bias is None else bias.to(dtype),
        None if initial_state is None else initial_state.to(dtype),
        mask,
        cu_seqlens,
        activation == "silu",
        reverse,
        return_final_state,
    )


class CausalConv1d(Op[P, ConvCall, Any]):
    """The operator's type: as `prepare`, with the result that `return_final_state` asks for."""

    if TYPE_CHECKING:

        @overload
        def __call__(
            self,
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = ...,
            activation: Literal["silu"] | None = ...,
            *,
            initial_state: Tensor | None = ...,
            return_final_state: Literal[False] = ...,
            reverse: bool = ...,
            mask: Tensor | None = ...,
            cu_seqlens: Tensor | None = ...,
        ) -> Tensor: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = ...,
            activation: Literal["silu"] | None = ...,
            *,
            initial_state: Tensor | None = ...,
            return_final_state: Literal[True],
            reverse: bool = ...,
            mask: Tensor | None = ...,
            cu_seqlens: Tensor | None = ...,
        ) -> tuple[Tensor, Tensor]: ...

        @overload
        def __call__(
            self,
            x: Tensor,
            weight: Tensor,
            bias: Tensor | None = ...,
            activation: Literal["silu"] | None = ...,
            *,
            initial_state: Tensor | None = ...,
            return_final_state: bool,
            reverse: bool = ...,
            mask: Tensor | None = ...,
            cu_seqlens: Tensor | None = ...,
        ) -> Tensor | tuple[Tensor, Tensor]: ...

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
