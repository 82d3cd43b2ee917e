"""The `cpu` backend of `causal_conv1d`: compiled kernels on data pointers.

Tensors are read through their strides, without copies, bfloat16 too; float16 is turned into float32 first. The kernels
compute in float32, or in float64 where `x` is float64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectra.ops import native
from selectra.ops.native.library import is_readable, library, n_sequences, operand, readable, refusal, threads

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Known once and for all, so that `refuse` can be traced: no file is looked for while a graph is captured.
_native = native.status()


def refuse(call: Any) -> str | None:
    """Why these kernels do not take `call`, or None.

    Raises:
        BackendError: SELECTRA_CPU_ISA asks for an instruction set that there is not.
    """
    if call.x.device.type != "cpu":
        return f"tensors are on {call.x.device.type}, it needs cpu"
    if call.x.dtype not in DTYPES:
        return f"it takes float32, float64, bfloat16 and float16, not {call.x.dtype}"
    return refusal(_native)


def forward(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    initial_state: Float[Tensor, "s d k"] | None,
    mask: Bool[Tensor, "b l"] | None,
    cu_seqlens: Int[Tensor, " n_seqs_plus_1"] | None,
    silu: bool,
    reverse: bool,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "s d k"]]:
    """Run the convolution.

    Returns:
        The output in the type of `x`, and the final state in the compute type: the last k inputs of the run.
    """
    dtype = _compute_dtype(x)
    inputs = _inputs(dtype, x, weight, bias, initial_state, mask, cu_seqlens)
    final_state = torch.empty((n_sequences(x.shape[0], cu_seqlens), *weight.shape), dtype=dtype)
    y = _new_like(x, dtype)
    words = _words(inputs, silu, reverse)
    library().call("conv_forward", dtype, [*words, *operand(final_state), *operand(y)])
    return y.to(x.dtype), final_state


def backward(
    dy: Float[Tensor, "b l d"],
    dfinal: Float[Tensor, "s d k"],
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    initial_state: Float[Tensor, "s d k"] | None,
    mask: Bool[Tensor, "b l"] | None,
    cu_seqlens: Int[Tensor, " n_seqs_plus_1"] | None,
    silu: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weight, bias and initial_state, in the types of these.

    Args:
        dy: Gradient of the output.
        dfinal: Gradient of the final state.

    Returns:
        One gradient each; an empty tensor for an input that is None.
    """
    dtype = _compute_dtype(x)
    inputs = _inputs(dtype, x, weight, bias, initial_state, mask, cu_seqlens)
    dy, dfinal = readable(dy, dtype), dfinal.to(dtype)
    dx = _new_like(x, dtype)
    dweight = torch.zeros(weight.shape, dtype=dtype)
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=dtype)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=dtype)
    words = _words(inputs, silu, reverse)
    for tensor in (None, None, dy, dfinal, dx, dweight, dbias, dinitial):
        words += operand(tensor)
    library().call("conv_backward", dtype, words)
    absent = torch.empty(0, dtype=dtype)
    return (
        dx.to(x.dtype),
        dweight.to(weight.dtype),
        absent if dbias is None or bias is None else dbias.to(bias.dtype),
        absent if dinitial is None or initial_state is None else dinitial.to(initial_state.dtype),
    )


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _new_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a result, in the type of `x` if the kernels write it."""
    return library().room(x.shape, x.dtype if is_readable(x.dtype, dtype) else dtype)


def _inputs(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """The six inputs as the kernels read them: `x` as it is stored, borders as contiguous int32."""
    x, weight, bias, initial_state, mask, cu_seqlens = tensors
    assert x is not None
    weight, bias, initial_state = (
        None if tensor is None else tensor.to(dtype) for tensor in (weight, bias, initial_state)
    )
    borders = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    return [readable(x, dtype), weight, bias, initial_state, mask, borders]


def _words(inputs: Sequence[Tensor | None], silu: bool, reverse: bool) -> list[int]:
    """The first words of a call, up to and with the inputs, in the order of `ConvCall` in call.h."""
    x, weight, _, _, _, cu_seqlens = inputs
    assert x is not None
    assert weight is not None
    batch, length, channels = x.shape
    words = [n_sequences(batch, cu_seqlens), length, channels, weight.shape[1], int(silu), int(reverse), threads()]
    for tensor in inputs:
        words += operand(tensor)
    return words
