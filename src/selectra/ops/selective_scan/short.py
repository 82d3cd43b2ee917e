"""How the scan's CUDA kernels for many short sequences of few channels are laid over a call: scan_short.cu."""

import math

from selectra.ops import cuda
from selectra.ops.selective_scan.geometry import Macros
from selectra.ops.selective_scan.passes import Launch, Pass, Sizes

SOURCE = "selective_scan/scan_short.cu"
THREADS, ROWS, LANES = 128, 8, 16
SUM_THREADS, SUM_COLUMNS = 256, 32
FLOAT_BYTES, STATE_FLOATS = 4, 4
# Whether calls are given to these kernels; benchmarks switch it off.
TAKEN = True
# What these kernels are for: up to so many steps and from so many rows on, as far as they were measured.
MOST_STEPS, FEWEST_STATES, FEWEST_ROWS = 40, 5, 8192
# Steps of which B and C lie in shared memory in the forward.
FORWARD_SEGMENT = 16
# A backward of so many steps keeps all states: at ten, too, segments were faster, for more blocks find room.
WHOLE = 0
# Blocks of a multiprocessor: what registers allow, and its shared memory, with what each block costs besides.
FORWARD_RESIDENT, BACKWARD_RESIDENT, BLOCK_BYTES = 5, 3, 1024


def takes(batch: int, length: int, channels: int, groups: int, states: int) -> bool:
    """Whether a call without packed sequences is one for these kernels; sizes alone decide."""
    fits = channels <= LANES * groups and FEWEST_STATES <= states <= LANES and 0 < length <= MOST_STEPS
    return TAKEN and fits and batch * groups >= FEWEST_ROWS


def forward(sizes: Sizes, macros: Macros, device_index: int) -> tuple[Launch, int]:
    """The launch of the forward, and steps of a segment."""
    segment = min(sizes.length, FORWARD_SEGMENT)
    kernel = _kernel("scan_short_forward", macros, device_index, _projection_bytes(sizes, segment))
    return Launch((Pass(kernel, _grid(sizes, FORWARD_RESIDENT, device_index), THREADS, 0),), 1, 0, 1), segment


def backward(sizes: Sizes, macros: Macros, device_index: int) -> tuple[Launch, int, int]:
    """The launches of the backward, steps of a segment, and blocks whose sums are added up."""
    segment = sizes.length if sizes.length <= WHOLE else math.isqrt(sizes.length - 1) + 1
    kept = segment + -(-sizes.length // segment) - 1
    shared = _projection_bytes(sizes, segment) + kept * _padded(sizes) * FLOAT_BYTES * THREADS
    # Sums over sequences take the same room.
    shared = max(shared, THREADS * (_padded(sizes) + 2) * FLOAT_BYTES)
    resident = min(max(cuda.shared_limit(device_index) // (shared + BLOCK_BYTES), 1), BACKWARD_RESIDENT)
    grid = _grid(sizes, resident, device_index)
    kernel = _kernel("scan_short_backward", macros, device_index, shared)
    columns = sizes.channels * (sizes.states + 2)
    total = _kernel("scan_short_sum", macros, device_index, SUM_THREADS * FLOAT_BYTES)
    passes = (Pass(kernel, grid, THREADS, 0), Pass(total, (-(-columns // SUM_COLUMNS), 1, 1), SUM_THREADS, 0))
    return Launch(passes, 1, 0, 1), segment, grid[0]


def _grid(sizes: Sizes, resident: int, device_index: int) -> tuple[int, int, int]:
    """Blocks that the device holds at once, or as many as find sequences."""
    at_once = -(-resident * cuda.multiprocessors(device_index) // sizes.groups)
    return min(-(-sizes.n_seqs // ROWS), at_once), sizes.groups, 1


def _padded(sizes: Sizes) -> int:
    return STATE_FLOATS * -(-sizes.states // STATE_FLOATS)


def _projection_bytes(sizes: Sizes, segment: int) -> int:
    return ROWS * segment * 2 * _padded(sizes) * FLOAT_BYTES


def _kernel(name: str, macros: Macros, device_index: int, shared: int) -> cuda.Kernel:
    # These kernels read one number at a time: how numbers lie makes no difference.
    told = tuple((key, 0 if key in ("VECTORS", "PAIRS", "ALONG_TIME") else value) for key, value in macros)
    return cuda.kernel(SOURCE, name, told, device_index, shared)
