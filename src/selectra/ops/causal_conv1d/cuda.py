"""The `cuda` backend of `causal_conv1d`: kernels compiled for the call's sizes at its first use.

Tensors are read through their strides, without copies; the kernels compute in float32. They are fastest where channels
lie side by side and rows begin on 16 bytes.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectra.errors import BackendError
from selectra.ops import cuda

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FORWARD, BACKWARD, SUM = (f"causal_conv1d/conv_{name}.cu" for name in ("forward", "backward", "sum"))
# Longer filters do not fit into a thread's registers.
MOST_TAPS = 64
# Of a block, as in conv_call.cuh; of a block of conv_sum, and the columns that it sums.
THREADS, SUM_THREADS, SUM_COLUMNS = 128, 512, 32
# Neighbouring threads along the channels at most; what a row in shared memory has beyond them.
WARP, PADDING = 32, 8
VECTOR_BYTES, FLOAT_BYTES = 16, 4
# A chunk of the length is short enough that a multiprocessor gets so many threads, within these limits.
THREADS_FOR_ALL, FEWEST_STEPS, MOST_STEPS = 1024, 8, 64
NOTHING = (0, 0, 0, 0)


class Shape(NamedTuple):
    """What a kernel is compiled for and how often it is laid over the tensors."""

    dtype: torch.dtype
    device_index: int
    batch: int
    length: int
    channels: int
    n_states: int
    taps: int
    vector: int
    """Neighbouring channels of a thread."""
    x_along_time: bool
    dy_along_time: bool
    silu: bool
    masked: bool
    packed: bool
    states: bool
    """Whether further blocks work on the states."""


class Launch(NamedTuple):
    """A kernel, its grid, and the words that say how threads lie over the tensors."""

    kernel: Any
    grid: tuple[int, int, int]
    words: tuple[int, ...]
    n_rows: int
    """Rows of blocks, along batch and length."""


class Tuning(NamedTuple):
    """How a kernel is cut to the size of the filters."""

    most_channels: int
    """Of a thread."""
    group: int
    """Steps whose inputs are loaded before the first of them is used."""
    resident: int
    """Blocks of a multiprocessor that the registers must suffice for."""


def refuse(call: Any) -> str | None:
    """Why these kernels do not take `call`, or None."""
    x = call.x
    if x.device.type != "cuda":
        return f"tensors are on {x.device.type}, it needs cuda"
    if x.dtype not in TYPES:
        return f"it takes float32, bfloat16 and float16, not {x.dtype}"
    if call.weight.shape[1] > MOST_TAPS:
        return f"it takes filters of up to {MOST_TAPS} taps, not {call.weight.shape[1]}"
    return cuda.refusal(x.device.index)


def require_cuda(tensors: Iterable[Tensor | None]) -> None:
    """Raise before a kernel on a device's pointers meets a tensor that is not in the device's memory."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            raise BackendError(
                f"causal_conv1d: backend 'cuda' is written into this program and a tensor is on {tensor.device}, "
                "it needs cuda; move the tensors and the module to the GPU, or compile or export on this device."
            )


def forward(
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    initial_state: Float[Tensor, "s d k"] | None,
    mask: Bool[Tensor, "b l"] | None,
    cu_seqlens: Int[Tensor, " n_seqs_plus_1"] | None,
    silu: bool,
    reverse: bool,
    return_final_state: bool = True,
    out: Float[Tensor, "b l d"] | None = None,
) -> tuple[Float[Tensor, "b l d"], Float[Tensor, "s d k"] | None]:
    """Run the convolution.

    Borders are not brought to the host: where they are none (not rising from 0 to l), every result is NaN.

    Args:
        out: Where the output goes, contiguous, in the type of `x`; by default a new tensor.

    Returns:
        The output in the type of `x`, and, where asked for, the final state in float32: the last k inputs of the run.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    n_states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    device = x.device
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    y = torch.empty((batch, length, channels), dtype=x.dtype, device=device) if out is None else out
    final_state = None
    if return_final_state:
        final_state = torch.empty((n_states, channels, taps), dtype=torch.float32, device=device)
    vector, along_time = _layout(x, forward_tuning(taps).most_channels)
    launch = forward_launch(
        Shape(
            x.dtype, device.index, batch, length, channels, n_states, taps, vector, along_time, False, silu,
            mask is not None, cu_seqlens is not None, return_final_state,
        )
    )  # fmt: skip
    if launch is not None:
        words = _words(launch, n_states, reverse, x, weight, bias, initial_state, mask, cu_seqlens)
        final_pointer = 0 if final_state is None else final_state.data_ptr()
        launch.kernel.launch(launch.grid, THREADS, (*words, y.data_ptr(), final_pointer))
    return y, final_state


def backward(
    dy: Float[Tensor, "b l d"],
    dfinal: Float[Tensor, "s d k"] | None,
    x: Float[Tensor, "b l d"],
    weight: Float[Tensor, "d k"],
    bias: Float[Tensor, " d"] | None,
    initial_state: Float[Tensor, "s d k"] | None,
    mask: Bool[Tensor, "b l"] | None,
    cu_seqlens: Int[Tensor, " n_seqs_plus_1"] | None,
    silu: bool,
    reverse: bool,
    out: Float[Tensor, "b l d"] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and initial_state; None for an input that is None. Equal bits in every run.

    Args:
        dy: Gradient of the output.
        dfinal: Gradient of the final state; None is zero.
        out: Where the gradient of x goes, contiguous, in its type; by default a new tensor.
    """
    batch, length, channels = x.shape
    taps = weight.shape[1]
    n_states = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    device = x.device
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
    dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
    most = backward_tuning(taps).most_channels
    (x_vector, x_along_time), (dy_vector, dy_along_time) = _layout(x, most), _layout(dy, most)
    vector = min(x_vector, dy_vector)
    launch = backward_launch(
        Shape(
            x.dtype, device.index, batch, length, channels, n_states, taps, vector, x_along_time, dy_along_time, silu,
            mask is not None, cu_seqlens is not None, initial_state is not None,
        )
    )  # fmt: skip
    n_rows = 0 if launch is None else launch.n_rows
    # Without a position nothing is summed.
    make = torch.empty if n_rows else torch.zeros
    dx = torch.empty((batch, length, channels), dtype=x.dtype, device=device) if out is None else out
    dweight = make((channels, taps), dtype=torch.float32, device=device)
    dbias = None if bias is None else make((channels,), dtype=torch.float32, device=device)
    dinitial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    if launch is None:
        return dx, dweight, dbias, dinitial
    words = _words(launch, n_states, reverse, x, weight, bias, initial_state, mask, cu_seqlens)
    words += (dy.data_ptr(), *dy.stride(), *_pointer(dfinal), dx.data_ptr())
    words += (0 if dinitial is None else dinitial.data_ptr(),)
    _launch_with_sums(launch, words, dweight, 0 if dbias is None else dbias.data_ptr())
    return dx, dweight, dbias, dinitial


def _launch_with_sums(launch: Launch, words: tuple[int, ...], dweight: Float[Tensor, "d k"], dbias: int) -> None:
    """Launch the backward kernel, then add up what its rows of blocks summed, in a fixed order.

    Args:
        words: Of `BackwardCall`, up to the sums.
        dbias: A pointer, or 0.
    """
    channels, taps = dweight.shape
    if launch.n_rows <= 1:
        launch.kernel.launch(launch.grid, THREADS, (*words, dweight.data_ptr(), 0, taps, 1, dbias, 0))
        return
    row = (taps + 1) * channels
    partial = torch.empty(launch.n_rows * row, dtype=torch.float32, device=dweight.device)
    start = partial.data_ptr()
    sums = (start, row, 1, channels, start + taps * channels * FLOAT_BYTES, row)
    launch.kernel.launch(launch.grid, THREADS, (*words, *sums))
    kernel = cuda.kernel(SUM, "conv_sum", (), dweight.device.index, SUM_THREADS * FLOAT_BYTES)
    words = (start, launch.n_rows, channels, taps, dweight.data_ptr(), dbias)
    kernel.launch((-(-row // SUM_COLUMNS), 1, 1), SUM_THREADS, words)


def forward_tuning(taps: int) -> Tuning:
    """For the forward kernel."""
    if taps <= 4:
        return Tuning(8, 8, 4)
    return Tuning(4, 4, 3) if taps <= 8 else Tuning(1, 1, 2)


def backward_tuning(taps: int) -> Tuning:
    """For the backward kernel, whose threads carry twice as much and sum besides."""
    if taps <= 4:
        return Tuning(4, 8, 3)
    return Tuning(2, 4, 3) if taps <= 8 else Tuning(1, 1, 2)


def _layout(tensor: Tensor, most: int) -> tuple[int, bool]:
    """How a thread reads a (b, l, d) tensor, in 16 bytes or less.

    Args:
        most: Channels of a thread at most, a power of two.

    Returns:
        How many channels, a power of two, lie side by side and aligned at every position; and whether positions lie
        side by side instead, 16 bytes of them aligned in every channel.
    """
    batch, length, channels = tensor.shape
    batch_stride, time_stride, channel_stride = tensor.stride()
    size = tensor.element_size()
    whole = VECTOR_BYTES // size
    bits = tensor.data_ptr() // size | whole
    if batch > 1:
        bits |= batch_stride
    if channel_stride != 1:
        return 1, time_stride == 1 and (bits | channel_stride) % whole == 0
    bits |= channels
    if length > 1:
        bits |= time_stride
    return min(bits & -bits, most), False


@functools.lru_cache(1024)
def forward_launch(shape: Shape) -> Launch | None:
    tuning = forward_tuning(shape.taps)
    room = (shape.taps + 1) * (WARP * shape.vector + PADDING)
    return _launch(shape, FORWARD, "conv_forward", tuning, room)


@functools.lru_cache(1024)
def backward_launch(shape: Shape) -> Launch | None:
    tuning = backward_tuning(shape.taps)
    room = (shape.taps + 1) * max(WARP * shape.vector + PADDING, THREADS * shape.vector)
    return _launch(shape, BACKWARD, "conv_backward", tuning, room)


def _launch(shape: Shape, source: str, name: str, tuning: Tuning, room: int) -> Launch | None:
    """The kernel, and how its threads lie; None where there is nothing to do."""
    vectors = shape.channels // shape.vector
    channel_tiles = -(-vectors // WARP)
    lanes = -(-vectors // max(channel_tiles, 1)) or 1
    rows = THREADS // lanes
    processors = cuda.multiprocessors(shape.device_index)
    columns = shape.batch * vectors
    steps = shape.length * columns // (processors * THREADS_FOR_ALL)
    steps = min(max(FEWEST_STEPS, -(-steps // FEWEST_STEPS) * FEWEST_STEPS), MOST_STEPS)
    chunks = -(-shape.length // steps)
    n_rows = -(-shape.batch * chunks // rows) if shape.channels else 0
    tiles = n_rows * channel_tiles
    blocks = tiles + (-(-shape.n_states * shape.channels // THREADS) if shape.states else 0)
    if blocks == 0:
        return None
    defines = (
        ("TYPE", TYPES[shape.dtype]),
        ("TAPS", shape.taps),
        ("VECTOR", shape.vector),
        ("GROUP", tuning.group),
        ("SILU", int(shape.silu)),
        ("MASKED", int(shape.masked)),
        ("PACKED", int(shape.packed)),
        ("X_ALONG_TIME", int(shape.x_along_time)),
        ("DY_ALONG_TIME", int(shape.dy_along_time)),
        # Masks and borders take registers too.
        ("RESIDENT", tuning.resident - (shape.masked or shape.packed)),
    )
    kernel = cuda.kernel(source, name, defines, shape.device_index, room * FLOAT_BYTES)
    words = (steps, max(chunks, 1), shape.batch * chunks, lanes, rows, max(channel_tiles, 1), tiles)
    return Launch(kernel, (blocks, 1, 1), words, n_rows)


def _words(
    launch: Launch,
    n_states: int,
    reverse: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[int, ...]:
    """The words of `ConvCall`, in the order of conv_call.cuh."""
    _, length, channels = x.shape
    return (
        n_states,
        length,
        channels,
        -1 if reverse else 1,
        x.data_ptr(),
        *x.stride(),
        weight.data_ptr(),
        *weight.stride(),
        *((0, 0) if bias is None else (bias.data_ptr(), *bias.stride())),
        *_pointer(initial_state),
        *((0, 0, 0) if mask is None else (mask.data_ptr(), *mask.stride())),
        0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        *launch.words,
    )


def _pointer(tensor: Tensor | None) -> tuple[int, ...]:
    """Pointer and strides of an optional tensor of three dimensions."""
    return NOTHING if tensor is None else (tensor.data_ptr(), *tensor.stride())
