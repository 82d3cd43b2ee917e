"""One query a row against keys and values in a cache, of which each row uses as many positions as it has.

PyTorch's attention with a mask reads the whole cache whatever is in it, and repeats keys for the queries that share
them; here the number of positions is read on the device, so that a CUDA graph serves every length.
"""

import struct
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from selectra.ops import cuda
from selectra.ops.transforms import needs_dispatcher

SOURCE = "cached_attention/attend.cu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WARP, WARPS, FLOAT_BYTES, HEAD_BYTES = 32, 4, 4, 128
# Numbers of a lane: those of its part of a head, an eighth, for all queries that share a key.
MOST_NUMBERS, KEY_LANES = 64, 8
# Thread blocks that a multiprocessor has registers for.
RESIDENT = 2
# Rows, and heads with keys of their own: dimensions of the grid.
MOST_ROWS = 65_535


class Shape(NamedTuple):
    """What the kernels are compiled for."""

    device_index: int
    dtype: torch.dtype
    group: int
    d_head: int


def takes(q: Tensor, keys: Tensor, values: Tensor, n: Tensor) -> bool:
    """Whether the kernels take this call; queries (b, h, p), keys and values (b, m, g, p), n (b,)."""
    if not q.is_cuda or q.dtype not in TYPES or keys.dtype != q.dtype or values.dtype != q.dtype:
        return False
    group, d_head = q.shape[1] // keys.shape[2], q.shape[2]
    fits = d_head * q.element_size() % HEAD_BYTES == 0 and group * d_head <= MOST_NUMBERS * KEY_LANES
    plain = keys.is_contiguous() and values.is_contiguous() and n.is_contiguous() and n.dtype == torch.int64
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys, values))
    fits = fits and max(keys.shape[0], keys.shape[2]) <= MOST_ROWS
    if not (fits and plain and keys.shape[1]) or grad or needs_dispatcher((q, keys, values, n)):
        return False
    return cuda.refusal(q.device.index) is None


def attend(
    q: Float[Tensor, "b h p"], keys: Float[Tensor, "b m g p"], values: Float[Tensor, "b m g p"], n: Int64[Tensor, " b"]
) -> Float[Tensor, "b h p"]:
    """The softmax over the first n positions of each row, times their values; scores are over sqrt(p).

    Args:
        q: Queries; those of h / g neighbouring heads share keys and values.
        keys: The cache.
        values: The cache.
        n: Positions of each row, at least 1.
    """
    q = q.contiguous()
    (batch, heads, d_head), (room, shared) = q.shape, keys.shape[1:3]
    shape = Shape(q.device.index, q.dtype, heads // shared, d_head)
    first, second = kernels(shape)
    parts = max(1, RESIDENT * cuda.multiprocessors(shape.device_index) // (shared * batch))
    joined = torch.empty(batch * heads * parts * (d_head + 2), dtype=torch.float32, device=q.device)
    y = torch.empty_like(q)
    pointers = tuple(tensor.data_ptr() for tensor in (q, keys, values, n, joined, y))
    words = (*pointers, room, shared, parts, struct.unpack("q", struct.pack("d", d_head**-0.5))[0])
    first.launch((parts, shared, batch), WARPS * WARP, words)
    second.launch((batch * heads, 1, 1), WARPS * WARP, words)
    return y


@lru_cache(64)
def kernels(shape: Shape) -> tuple[Any, Any]:
    """Both kernels."""
    defines = (("TYPE", TYPES[shape.dtype]), ("GROUP", shape.group), ("HEAD", shape.d_head), ("WARPS", WARPS))
    room = WARPS * shape.group * (shape.d_head + 2) * FLOAT_BYTES
    return (
        cuda.kernel(SOURCE, "attend", defines, shape.device_index, room),
        cuda.kernel(SOURCE, "join_parts", defines, shape.device_index),
    )
