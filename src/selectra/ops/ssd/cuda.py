"""The `cuda` backend of `ssd`: the products by PyTorch, the rest by kernels compiled at first use.

Factors of the products are bfloat16 where x, B and C are, and float32 otherwise; sums and states are float32.
"""

import torch
from torch import Tensor

from selectra.ops import cuda
from selectra.ops.ssd import chunks
from selectra.ops.ssd.call import SsdCall

TYPES = {torch.float32: 0, torch.bfloat16: 1}
SOURCE = "ssd/chunk_weights.cu"
THREADS, SIZE, WARP, FLOAT_BYTES, ALIGNMENT = 256, 4, 32, 4, 16
# Chunks of 16 to 128 positions: lanes of a row are a power of two.
SHORTEST = 16
MOST_OF_FEW_THREADS = 64
LANES_OF_DOT = 16
# With more numbers in a state, chunks are longer: fewer states are written and read.
WIDE_STATE = 64
# Blocks that a multiprocessor should have at the least.
BLOCKS_WANTED = 4


def refuse(call: SsdCall) -> str | None:
    """Why these kernels do not take `call`, or None."""
    x = call.x
    if not x.is_cuda:
        return f"tensors are on {x.device.type}, it needs cuda"
    if call.compute_dtype != torch.float32:
        return "it takes float32, bfloat16 and float16, not float64"
    if x.shape[3] * call.B.shape[3] % SIZE:
        return f"it takes heads and states of which the product is a multiple of {SIZE}"
    return cuda.refusal(x.device.index)


def forward(call: SsdCall) -> tuple[Tensor, Tensor]:
    """y and the final state."""
    return chunks.forward(call, chunk_length(call), factor_type(call), INNER)


def backward(call: SsdCall, dy: Tensor, dfinal: Tensor | None) -> tuple[Tensor, ...]:
    """The gradients of x, dt, A, B, C and the initial state, in float32."""
    return chunks.backward(call, dy, dfinal, chunk_length(call), factor_type(call), INNER)


def chunk_length(call: SsdCall) -> int:
    """Positions of a chunk."""
    longest = 64 if call.B.shape[3] <= WIDE_STATE else 128
    return max(SHORTEST, min(longest, 1 << (call.x.shape[1] - 1).bit_length()))


def factor_type(call: SsdCall) -> torch.dtype:
    """Type of the products' factors."""
    half = all(tensor.dtype == torch.bfloat16 for tensor in (call.x, call.B, call.C))
    return torch.bfloat16 if half else torch.float32


def pass_states(
    added: Tensor, across: Tensor, first: Tensor | None, reverse: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The states before all chunks, one after the other, and that after the last."""
    batch, c, heads, p, n = added.shape
    before = torch.empty_like(added, dtype=dtype)
    last = added.new_empty((batch, heads, p, n))
    across = across.contiguous()
    if first is not None:
        first = first.contiguous()
        first = first if first.data_ptr() % ALIGNMENT == 0 else first.clone()
    kernel = _kernel("pass_states", added, dtype, SHORTEST, False, reverse)
    words = (*_pointers(added, across, first, before, last), c, heads * p * n, p * n, batch)
    kernel.launch((-(-last.numel() // (SIZE * THREADS)), 1, 1), THREADS, words)
    return before, last


def weigh(scores: Tensor, s: Tensor, dt: Tensor, seen: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`G K dt`."""
    r, heads, q = s.shape
    weights = s.new_empty((r, heads, q, q), dtype=dtype)
    kernel = _kernel("weigh", s, dtype, q, seen is not None)
    words = (*_pointers(scores, s, dt, seen, weights), heads, scores.shape[1])
    kernel.launch((r * heads, 1, 1), THREADS, words)
    return weights


def weigh_back(
    products: Tensor, scores: Tensor, s: Tensor, dt: Tensor, seen: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """`G K`, dG, and the sums of `P G dt` and of `P G`."""
    r, heads, q = s.shape
    groups = scores.shape[1]
    each = heads // groups
    wanted = BLOCKS_WANTED * cuda.multiprocessors(s.get_device())
    # Blocks that share a group's heads.
    parts = next(k for k in range(1, each + 1) if each % k == 0 and (k == each or r * groups * k >= wanted))
    weights = s.new_empty((r, heads, q, q), dtype=dtype)
    dscores = s.new_empty((r, groups, parts, q, q))
    rows, columns = torch.empty_like(s), torch.empty_like(s)
    threads = 2 * THREADS if q > MOST_OF_FEW_THREADS else THREADS
    at_once = threads // min(q // SIZE, WARP)
    kernel = _kernel("weigh_back", s, dtype, q, seen is not None, shared_bytes=at_once * q * FLOAT_BYTES)
    words = (*_pointers(products, scores, s, dt, seen, weights, dscores, rows, columns), heads, groups, parts)
    kernel.launch((r * groups * parts, 1, 1), threads, words)
    return weights, (dscores[:, :, 0] if parts == 1 else dscores.sum(2)).to(dtype), rows, columns


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of products over each head's numbers."""
    r, q, heads, p = a.shape
    in_rows = b.stride(0) == q * b.stride(1) and b.stride()[2:] == (p, 1)
    whole = all(number % SIZE == 0 for number in (p, b.stride(1), b.data_ptr() // b.element_size()))
    if not (in_rows and (whole or p % SIZE)):
        b = b.contiguous()
    dots = a.new_empty((r, q, heads), dtype=torch.float32)
    kernel = _kernel("dot_heads", a, a.dtype, SHORTEST, False, piece=_piece(p), other=b.dtype)
    words = (a.data_ptr(), b.data_ptr(), dots.data_ptr(), r * q, heads, p, b.stride(1))
    kernel.launch((-(-dots.numel() * LANES_OF_DOT // THREADS), 1, 1), THREADS, words)
    return dots


def join(a: Tensor, weights: Tensor, b: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`(a weights + b) scale`."""
    q, heads, p = a.shape[1:]
    joined = a if dtype == a.dtype else torch.empty_like(a, dtype=dtype)
    kernel = _kernel("join_heads", a, torch.float32, SHORTEST, False, piece=_piece(p), other=dtype)
    words = (*_pointers(a, weights, b, scale, joined), a.numel(), q, heads, p)
    kernel.launch((-(-a.numel() // (_piece(p) * THREADS)), 1, 1), THREADS, words)
    return joined


def _piece(p: int) -> int:
    """Numbers of a head that are moved at once."""
    return SIZE if p % SIZE == 0 else 1


def _kernel(
    name: str,
    like: Tensor,
    dtype: torch.dtype,
    q: int,
    seen: bool,
    reverse: bool = False,
    shared_bytes: int = 0,
    piece: int = SIZE,
    other: torch.dtype = torch.float32,
) -> cuda.Kernel:
    macros = (("TYPE", TYPES[dtype]), ("STEPS", q), ("SEEN", int(seen)), ("REVERSE", int(reverse)))
    macros += (("PIECE", piece), ("OTHER", TYPES[other]))
    return cuda.kernel(SOURCE, name, macros, like.get_device(), shared_bytes)


def _pointers(*tensors: Tensor | None) -> tuple[int, ...]:
    assert all(x is None or x.is_contiguous() for x in tensors)
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


INNER = chunks.Inner(pass_states, weigh, weigh_back, dot, join)
