"""The `cpu` backend of `selective_scan`: compiled kernels on data pointers.

Tensors are read through their strides, without copies, bfloat16 too; float16 is turned into float32 first. The kernels
compute in float32, or in float64 where `u` is float64.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectra.ops import native
from selectra.ops.native.library import ABSENT, is_readable, library, n_sequences, operand, readable, refusal, threads

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Known once and for all, so that `refuse` can be traced: no file is looked for while a graph is captured.
_native = native.status()


def refuse(call: Any) -> str | None:
    """Why these kernels do not take `call`, or None.

    Raises:
        BackendError: SELECTRA_CPU_ISA asks for an instruction set that there is not.
    """
    if call.u.device.type != "cpu":
        return f"tensors are on {call.u.device.type}, it needs cpu"
    if call.u.dtype not in DTYPES:
        return f"it takes float32, float64, bfloat16 and float16, not {call.u.dtype}"
    return refusal(_native)


def compute_dtype(u: Tensor) -> torch.dtype:
    """The type that the kernels compute in, and that states and checkpoints have."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def checkpoint_shape(u: Tensor, A: Tensor, groups: int, n_seqs: int | None, gated: bool = False) -> tuple[int, ...]:
    """Numbers of the compute dtype that hold the state before every chunk: an upper bound, from the shapes alone.

    Args:
        groups: Groups of channels that share B and C.
        n_seqs: Packed sequences, or None where the batch holds one in each row.
        gated: Whether there is a gate, which makes no difference here.
    """
    batch, length, channels = u.shape
    native_library = library()
    chunk, lanes = native_library.chunk, native_library.lanes(compute_dtype(u))
    chunks = batch * -(-length // chunk) if n_seqs is None else length // chunk + n_seqs
    blocks = groups * -(-(channels // groups) // lanes)
    return (chunks * blocks * lanes * A.shape[1],)


def forward(
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b l d"] | None,
    delta_bias: Float[Tensor, " d"] | None,
    initial_state: Float[Tensor, "s d n"] | None,
    mask: Bool[Tensor, "b l"] | None,
    cu_seqlens: Int[Tensor, " n_seqs_plus_1"] | None,
    delta_softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype,
    save: bool,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "s d n"], Float[Tensor, " checkpoints"]]:
    """Run the scan.

    Args:
        save: Keep what `backward` needs in the third result, which is empty otherwise.

    Returns:
        The output, the final state and the checkpoints.
    """
    dtype = compute_dtype(u)
    inputs = _inputs(dtype, u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens)
    n_seqs = None if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final_state = u.new_empty((n_sequences(u.shape[0], cu_seqlens), *A.shape), dtype=dtype)
    # Packed sequences leave a part of the upper bound unused.
    checkpoints = library().room(
        checkpoint_shape(u, A, B.shape[2], n_seqs) if save else (0,), dtype, zeros=n_seqs is not None
    )
    y = _new(u, out_dtype, dtype, inputs)
    words = _words(inputs, B.shape[2], delta_softplus, reverse)
    words += (*operand(final_state), *operand(checkpoints if save else None), *operand(y), *ABSENT)
    library().call("scan_forward", dtype, words)
    return y.to(out_dtype), final_state, checkpoints


def backward(
    dy: Float[Tensor, "b l d"],
    dfinal: Float[Tensor, "s d n"],
    checkpoints: Float[Tensor, " checkpoints"],
    u: Float[Tensor, "b l d"],
    delta: Float[Tensor, "b l d"],
    A: Float[Tensor, "d n"],
    B: Float[Tensor, "b l g n"],
    C: Float[Tensor, "b l g n"],
    D: Float[Tensor, " d"] | None,
    z: Float[Tensor, "b l d"] | None,
    delta_bias: Float[Tensor, " d"] | None,
    initial_state: Float[Tensor, "s d n"] | None,
    mask: Bool[Tensor, "b l"] | None,
    cu_seqlens: Int[Tensor, " n_seqs_plus_1"] | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, ...]:
    """The gradients of u, delta, A, B, C, D, z, delta_bias and initial_state, in the types of these.

    Args:
        dy: Gradient of the output.
        dfinal: Gradient of the final state.
        checkpoints: As `forward` kept them.

    Returns:
        One gradient each; an empty tensor for an input that is None.
    """
    dtype = compute_dtype(u)
    inputs = _inputs(dtype, u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens)
    dy, dfinal = readable(dy, dtype), dfinal.to(dtype)
    du, ddelta, dB, dC = (_new(tensor, tensor.dtype, dtype, inputs) for tensor in (u, delta, B, C))
    dz = None if z is None else _new(z, z.dtype, dtype, inputs)
    dA = torch.zeros(A.shape, dtype=dtype)
    dD = None if D is None else torch.zeros(D.shape, dtype=dtype)
    dbias = None if delta_bias is None else torch.zeros(delta_bias.shape, dtype=dtype)
    dinitial = None if initial_state is None else torch.empty(initial_state.shape, dtype=dtype)
    words = _words(inputs, B.shape[2], delta_softplus, reverse)
    results = (du, ddelta, dA, dB, dC, dD, dz, dbias, dinitial)
    for tensor in (None, checkpoints, None, None, dy, dfinal, *results, None, None):
        words += operand(tensor)
    library().call("scan_backward", dtype, words)
    sources = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(
        u.new_empty(0, dtype=dtype) if gradient is None or source is None else gradient.to(source.dtype)
        for gradient, source in zip(results, sources, strict=True)
    )


def _inputs(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """The eleven inputs as the kernels read them: what grows with the length as it is stored, borders as int32."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens = tensors
    u, delta, B, C, z = (None if tensor is None else readable(tensor, dtype) for tensor in (u, delta, B, C, z))
    A, D, delta_bias, initial_state = (
        None if tensor is None else tensor.to(dtype) for tensor in (A, D, delta_bias, initial_state)
    )
    borders = None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()
    return [u, delta, A, B, C, D, z, delta_bias, initial_state, mask, borders]


def _new(shape_of: Tensor, wanted: torch.dtype, dtype: torch.dtype, inputs: Sequence[Tensor | None]) -> Tensor:
    """Room for a result, in the type that is wanted if the kernels write it; zeros where they leave positions out."""
    mask = inputs[-2]
    return library().room(shape_of.shape, wanted if is_readable(wanted, dtype) else dtype, zeros=mask is not None)


def _words(inputs: Sequence[Tensor | None], groups: int, delta_softplus: bool, reverse: bool) -> list[int]:
    """The first words of a call, up to and with the inputs, in the order of `ScanCall` in call.h."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens = inputs
    assert u is not None
    assert A is not None
    batch, length, channels = u.shape
    words = [
        n_sequences(batch, cu_seqlens),
        length,
        channels,
        A.shape[1],
        groups,
        int(delta_softplus),
        int(reverse),
        threads(),
        # Pieces of time: as the kernels see fit.
        0,
        # No grid.
        0,
        0,
    ]
    for tensor in (u, delta, A, B, C, D, z, delta_bias, initial_state, mask, cu_seqlens):
        words += operand(tensor)
    return words
