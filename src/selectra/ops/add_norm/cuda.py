"""The `cuda` backend of `add_norm`: kernels compiled for the call's types and sizes at its first use.

A row stays in registers from its first read to its last write; arithmetic is float32. Rows that do not lie one after
another are copied first. They are fastest where the width is a multiple of 8.
"""

import functools
import struct
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from selectra.errors import BackendError
from selectra.ops import cuda
from selectra.ops.add_norm.call import NormCall

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NONE = -1
FORWARD, BACKWARD = (f"add_norm/norm_{name}.cu" for name in ("forward", "backward"))
WARP, THREADS, MOST_THREADS = 32, 128, 512
VECTOR, VECTOR_BYTES, FLOAT_BYTES = 8, 16, 4
# Numbers of a row that a thread holds, where the row has threads enough; twice and four times as many where not.
NUMBERS, MOST_NUMBERS = 8, 32
MOST_WIDTH = MOST_THREADS * MOST_NUMBERS
# Threads of a multiprocessor, and the numbers that all of them hold, which its registers suffice for.
RESIDENT_THREADS, RESIDENT_NUMBERS = 1024, 12288


class Shape(NamedTuple):
    """What the kernels are compiled for and how often they are laid over the rows."""

    device_index: int
    rows: int
    width: int
    aligned: bool
    x: torch.dtype
    residual: torch.dtype | None
    stream: torch.dtype
    """Of the outgoing residual; in the backward, of what was normalised."""
    weight: torch.dtype | None
    bias: torch.dtype | None
    centred: bool
    keep: bool = False
    """Forward: whether the outgoing residual is written."""
    dsum: bool = False
    dresidual: bool = False


class Launch(NamedTuple):
    """A kernel, its blocks and the threads of one."""

    kernel: Any
    blocks: int
    threads: int


def refuse(call: NormCall) -> str | None:
    """Why these kernels do not take `call`, or None."""
    x = call.x
    if x.device.type != "cuda":
        return f"tensors are on {x.device.type}, it needs cuda"
    for tensor in call.tensors:
        if tensor is not None and tensor.dtype not in TYPES:
            return f"it takes float32, bfloat16 and float16, not {tensor.dtype}"
    if x.shape[-1] > MOST_WIDTH:
        return f"it takes rows of up to {MOST_WIDTH} numbers, not {x.shape[-1]}"
    return cuda.refusal(x.device.index)


def require_cuda(tensors: Iterable[Tensor | None]) -> None:
    """Raise before a kernel on a device's pointers meets a tensor that is not in the device's memory."""
    for tensor in tensors:
        if tensor is not None and not tensor.is_cuda:
            raise BackendError(
                f"add_norm: backend 'cuda' is written into this program and a tensor is on {tensor.device}, "
                "it needs cuda; move the tensors and the module to the GPU, or compile or export on this device."
            )


def keeps(call: NormCall) -> bool:
    """Whether the outgoing residual is a tensor of its own; without a residual, x serves where its type does."""
    return call.residual is not None or call.residual_dtype != call.x.dtype


def forward(call: NormCall) -> tuple[Tensor, Tensor, Tensor]:
    """Run the sum and the norm.

    Returns:
        The normalised sum; the sum, empty where that is x; and one over the root of the mean square of each row,
        with "layer" the mean too, (2, rows).
    """
    x, residual = call.x.contiguous(), None if call.residual is None else call.residual.contiguous()
    weight, bias = _contiguous(call.weight), _contiguous(call.bias)
    width = x.shape[-1]
    rows, keep = x.numel() // width, keeps(call)
    y = torch.empty_like(x)
    total = torch.empty_like(x, dtype=call.residual_dtype) if keep else x.new_empty(0, dtype=call.residual_dtype)
    stats = torch.empty((1 + call.centred, rows), dtype=torch.float32, device=x.device)
    if not rows:
        return y, total, stats
    pointers = tuple(0 if t is None else t.data_ptr() for t in (x, residual, weight, bias, y, total if keep else None))
    launch = forward_launch(
        Shape(
            x.device.index, rows, width, _aligned(width, pointers), x.dtype, _type(residual), call.residual_dtype,
            _type(weight), _type(bias), call.centred, keep,
        )
    )  # fmt: skip
    words = (rows, width, *pointers, *_stats(stats, rows, call.centred), _double(call.eps))
    launch.kernel.launch((launch.blocks, 1, 1), launch.threads, words)
    return y, total, stats


def backward(
    dy: Tensor,
    dsum: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centred: bool,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, residual, weight and bias, equal in every run; None for an input that is None.

    That of the residual is None too where it equals that of x in value and type.

    Args:
        dy: Gradient of the normalised sum.
        dsum: Gradient of the sum; None is zero.
        total: What was normalised.
        stats: As `forward` gave them.
        x_dtype: Type of x.
        residual_dtype: Type of the incoming residual; None where there is none.
    """
    total, dy, weight = total.contiguous(), dy.to(x_dtype).contiguous(), _contiguous(weight)
    dsum = None if dsum is None else dsum.to(total.dtype).contiguous()
    width = dy.shape[-1]
    rows = dy.numel() // width
    dx = torch.empty_like(dy)
    apart = residual_dtype not in (None, x_dtype)
    dresidual = torch.empty_like(dy, dtype=residual_dtype) if apart else None
    if not rows:
        return dx, dresidual, _zeros_like(weight), _zeros_like(bias)
    pointers = tuple(0 if t is None else t.data_ptr() for t in (total, weight, dy, dsum, dx, dresidual))
    launch = backward_launch(
        Shape(
            dy.device.index, rows, width, _aligned(width, pointers), x_dtype, residual_dtype, total.dtype,
            _type(weight), _type(bias), centred, dsum=dsum is not None, dresidual=apart,
        )
    )  # fmt: skip
    shares = [
        None if like is None else torch.empty((launch.blocks, width), dtype=torch.float32, device=dy.device)
        for like in (weight, bias)
    ]
    words = (rows, width, *pointers[:2], *_stats(stats, rows, centred), *pointers[2:])
    words += tuple(0 if share is None else share.data_ptr() for share in shares)
    launch.kernel.launch((launch.blocks, 1, 1), launch.threads, words)
    dweight, dbias = (
        None if share is None or like is None else share.sum(0).to(like.dtype)
        for share, like in zip(shares, (weight, bias), strict=True)
    )
    return dx, dresidual, dweight, dbias


@functools.lru_cache(1024)
def forward_launch(shape: Shape) -> Launch:
    """The kernel of such a forward, a block for every few rows."""
    defines, threads, rows, _ = _layout(shape)
    room = max(threads // WARP, 1) * FLOAT_BYTES
    kernel = cuda.kernel(FORWARD, "norm_forward", (*defines, ("KEEP", int(shape.keep))), shape.device_index, room)
    return Launch(kernel, -(-shape.rows // rows), threads)


@functools.lru_cache(1024)
def backward_launch(shape: Shape) -> Launch:
    """The kernel of such a backward, as many blocks as the device holds at once."""
    defines, threads, rows, resident = _layout(shape)
    defines += (("DSUM", int(shape.dsum)), ("DRESIDUAL", int(shape.dresidual)))
    chunks = dict(defines)["CHUNKS"]
    vector = dict(defines)["VECTOR"]
    # The sums over warps; one block's share of a gradient, row by row.
    room = max(threads // WARP, threads * int(chunks) * int(vector) if rows > 1 else 0) * FLOAT_BYTES
    kernel = cuda.kernel(BACKWARD, "norm_backward", defines, shape.device_index, room)
    blocks = min(-(-shape.rows // rows), resident * cuda.multiprocessors(shape.device_index))
    return Launch(kernel, blocks, threads)


def _layout(shape: Shape) -> tuple[tuple[tuple[str, str | int], ...], int, int, int]:
    """Constants of a compilation, threads and rows of a block, and blocks of a multiprocessor."""
    vector = VECTOR if shape.aligned else 1
    vectors = -(-shape.width // vector)
    row_threads = 1
    while row_threads < MOST_THREADS and row_threads * (NUMBERS // vector) < vectors:
        row_threads *= 2
    chunks = -(-vectors // row_threads)
    threads = max(THREADS, row_threads) if row_threads <= WARP else row_threads
    resident = min(RESIDENT_NUMBERS // (chunks * vector), RESIDENT_THREADS) // threads or 1
    defines = (
        ("TYPE", TYPES[shape.x]),
        ("RESIDUAL", _code(shape.residual)),
        ("SUM", TYPES[shape.stream]),
        ("WEIGHT", _code(shape.weight)),
        ("BIAS", _code(shape.bias)),
        ("CENTRED", int(shape.centred)),
        ("VECTOR", vector),
        ("CHUNKS", chunks),
        ("ROW_THREADS", row_threads),
        ("THREADS", threads),
        ("RESIDENT", resident),
    )
    return defines, threads, threads // row_threads, resident


def _code(dtype: torch.dtype | None) -> int:
    return NONE if dtype is None else TYPES[dtype]


def _type(tensor: Tensor | None) -> torch.dtype | None:
    return None if tensor is None else tensor.dtype


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _zeros_like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.zeros_like(tensor)


def _aligned(width: int, pointers: Iterable[int]) -> bool:
    """Whether every eight numbers of a row lie on 16 bytes."""
    return width % VECTOR == 0 and all(pointer % VECTOR_BYTES == 0 for pointer in pointers)


def _stats(stats: Tensor, rows: int, centred: bool) -> tuple[int, int]:
    """Pointers to scale and mean, the second null without one."""
    start = stats.data_ptr()
    return start, start + rows * FLOAT_BYTES if centred else 0


@functools.lru_cache(64)
def _double(x: float) -> int:
    """The bits of a double, as a word."""
    return struct.unpack("q", struct.pack("d", x))[0]
