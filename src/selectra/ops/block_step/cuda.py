"""Whole Mamba blocks for one position on a GPU: norm, projections, convolution, recurrence and gate in one launch.

Reading the weights is what a step costs; separate kernels add the start and the end of each, some twenty a block. Here
one thread block on every multiprocessor stays for all blocks of the model, and weights stream through its shared memory
while thread blocks wait for each other (`step.cu`).
"""

import struct
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from selectra.ops import cuda
from selectra.ops.native.step import PLAIN, BlockWeights

SOURCE = "block_step/step.cu"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NONE = -1
# The four parts of a block, between which thread blocks meet.
PARTS = 4
# Rows of a batch: with more of them products are no longer bound by the reading of the weights.
MOST_ROWS = 4
# A launch takes its arguments by value, in 32,764 bytes at most.
MOST_BLOCKS = 256
WARPS, PIECES, MOST_TILES, BATCH = 8, 8, 12, 64
# Channels whose recurrence a warp steps at once.
MOST_TOGETHER = 4
WARP, PIECE_BYTES, FLOAT_BYTES = 32, 16, 4


class Sizes(NamedTuple):
    """What the kernel of a block is compiled for, beside the call's."""

    dtype: torch.dtype
    rate: torch.dtype
    """Of A_log."""
    skip: torch.dtype
    """Of D."""
    model: int
    inner: int
    states: int
    width: int
    rank: int


class Shape(NamedTuple):
    """What a launch is compiled for."""

    device_index: int
    sizes: Sizes
    rows: int
    depth: int
    residual: torch.dtype | None
    stream: torch.dtype


class Launch(NamedTuple):
    """A kernel and how it is laid over the device."""

    kernel: Any
    blocks: int
    threads: int
    cooperative: bool


class CudaStepPlan:
    """A block's weights as the kernel reads them.

    Args:
        weights: The parameters, on a GPU.
        key: Theirs, from `selectra.ops.native.step.key_of`.
        eps: The norm's.
    """

    def __init__(self, weights: BlockWeights, key: list[object], eps: float) -> None:
        self.key, self.eps = key, eps
        d_inner, states = weights.A_log.shape
        model, dtype = weights.in_weight.shape[1], weights.in_weight.dtype
        wide = (weights.A_log.dtype, dtype if weights.D is None else weights.D.dtype)
        width, rank = weights.conv_weight.shape[2], weights.dt_weight.shape[1]
        self.sizes = Sizes(dtype, *wide, model, d_inner, states, width, rank)
        self.words = tuple(0 if weight is None else weight.data_ptr() for weight in weights)
        device = weights.in_weight.device
        # Every row of weights is read in pieces of 16 bytes.
        vector = PIECE_BYTES // dtype.itemsize
        self.usable = (
            device.type == "cuda"
            and TYPES.keys() >= {dtype, *wide}
            and weights.norm_weight is not None
            and model % vector == 0
            and d_inner % vector == 0
            # A thread's pieces of a row make a tile at most.
            and max(model, d_inner) <= PIECES * vector * WARPS * WARP
            and all(w is None or _fits(w, device) for w in weights)
            and all(w is None or w.dtype == dtype for w in weights._replace(A_log=None, D=None))  # pyright: ignore
        )

    def takes_state(self, batch: int, conv: Tensor, ssm: Tensor) -> bool:
        """Whether the kernel takes this state."""
        sizes = self.sizes
        return (
            conv.shape == (batch, sizes.inner, sizes.width)
            and ssm.shape == (batch, sizes.inner, sizes.states)
            and conv.dtype == sizes.dtype
            and ssm.dtype == torch.float32
            and conv.is_contiguous()
            and ssm.is_contiguous()
            and conv.is_cuda
            and ssm.is_cuda
            # Memory that a graph of gradients may still need has a version, which an inference tensor lacks.
            and not (conv.is_inference() or ssm.is_inference())
        )


def _fits(weight: Tensor, device: torch.device) -> bool:
    return (
        type(weight) in PLAIN
        and weight.device == device
        and weight.is_contiguous()
        and weight.data_ptr() % PIECE_BYTES == 0
    )


def takes(plans: Sequence[CudaStepPlan], x: Tensor, residual: Tensor | None) -> bool:
    """Whether one launch takes these blocks and this input."""
    first = plans[0]
    if len(plans) > MOST_BLOCKS or any(p.sizes != first.sizes or p.eps != first.eps or not p.usable for p in plans):
        return False
    if x.dim() != 3 or not 1 <= x.shape[0] <= MOST_ROWS or x.shape[1:] != (1, first.sizes.model):
        return False
    if x.dtype != first.sizes.dtype or not x.is_cuda or cuda.refusal(x.device.index) is not None:
        return False
    return residual is None or (residual.shape == x.shape and residual.dtype in TYPES and residual.is_cuda)


def run(
    plans: Sequence[CudaStepPlan],
    states: Sequence[tuple[Tensor, Tensor]],
    x: Float[Tensor, "b 1 m"],
    residual: Float[Tensor, "b 1 m"] | None,
    stream: Float[Tensor, "b 1 m"],
) -> Float[Tensor, "b 1 m"]:
    """What blocks in a row make of x; `stream` and the states are written. Inside there is float32 alone.

    Args:
        plans: Of all blocks, which `takes`.
        states: Of all blocks.
        x: What is added to the stream first.
        residual: The stream so far.
        stream: Where the new stream goes.
    """
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, rows, sizes = torch.empty_like(x), x.shape[0], plans[0].sizes
    types = (None if residual is None else residual.dtype, stream.dtype)
    launch = step_launch(Shape(x.device.index, sizes, rows, len(plans), *types))
    selected = rows * (sizes.rank + 2 * sizes.states)
    numbers = rows * (3 * sizes.model + 3 * sizes.inner) + selected + -selected % 4
    work = torch.empty(numbers, dtype=torch.float32, device=x.device)
    met = torch.zeros(launch.blocks, dtype=torch.int32, device=x.device)
    tensors = (x, residual, y, stream, work, met)
    pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    blocks = [(*plan.words, conv.data_ptr(), ssm.data_ptr()) for plan, (conv, ssm) in zip(plans, states, strict=True)]
    words = [*pointers, struct.unpack("q", struct.pack("d", plans[0].eps))[0], *chain.from_iterable(blocks)]
    parts = PARTS * len(plans)
    # Where thread blocks cannot wait for each other, what lies between two meetings is a launch of its own.
    for first in (0,) if launch.cooperative else range(parts):
        last = parts if launch.cooperative else first + 1
        launch.kernel.launch((launch.blocks, 1, 1), launch.threads, (first, last, *words))
    # As PyTorch's own writes do: a gradient that needs what stood there before is refused.
    torch.autograd.graph.increment_version(list(chain.from_iterable(states)))
    return y


@lru_cache(256)
def step_launch(shape: Shape) -> Launch:
    """The kernel, with one thread block on every multiprocessor."""
    sizes, cooperative = shape.sizes, cuda.is_cooperative(shape.device_index)
    blocks = cuda.multiprocessors(shape.device_index)
    # The sums of warps; the rest of the shared memory holds weights on their way.
    room = shape.rows * WARPS * BATCH * FLOAT_BYTES
    tile = WARP * PIECES * PIECE_BYTES
    tiles = min(MOST_TILES, (cuda.shared_limit(shape.device_index) - room) // (WARPS * tile))
    defines = (
        ("TYPE", TYPES[sizes.dtype]),
        ("RATE", TYPES[sizes.rate]),
        ("SKIP", TYPES[sizes.skip]),
        ("RESIDUAL", NONE if shape.residual is None else TYPES[shape.residual]),
        ("STREAM", TYPES[shape.stream]),
        ("ROWS", shape.rows),
        ("MODEL", sizes.model),
        ("INNER", sizes.inner),
        ("STATES", sizes.states),
        ("WIDTH", sizes.width),
        ("RANK", sizes.rank),
        ("DEPTH", shape.depth),
        ("WARPS", WARPS),
        ("PIECES", PIECES),
        ("TILES", max(tiles, 1)),
        ("TOGETHER", min(MOST_TOGETHER, -(-sizes.inner // (blocks * WARPS)))),
    )
    shared_bytes = room + WARPS * max(tiles, 1) * tile
    kernel = cuda.kernel(SOURCE, "step_blocks", defines, shape.device_index, shared_bytes, cooperative)
    return Launch(kernel, blocks, (WARPS + 1) * WARP, cooperative)
