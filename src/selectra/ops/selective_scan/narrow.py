"""How the scan's CUDA kernels for one to four states are laid over a call: scan_narrow_forward.cu and its backward."""

from typing import NamedTuple

from selectra.ops import cuda
from selectra.ops.selective_scan.geometry import Macros
from selectra.ops.selective_scan.passes import Launch, Pass, Sizes

FORWARD, BACKWARD = (f"selective_scan/scan_narrow_{name}.cu" for name in ("forward", "backward"))
WARP, STEPS_OF_TILE, CHAIN_THREADS, FLOAT_BYTES = 32, 16, 128, 4
# A lane takes two channels where these warps are there for a multiprocessor: fewer instructions for each channel.
ENOUGH_WARPS = 8
# Warps of a multiprocessor below which the length is cut into chunks, and how many are wanted then.
FEW_WARPS, WANTED_WARPS, SHORTEST_CHUNK, MOST_CHUNKS = 4, 12, 64, 65535
# Tiles of a warp in shared memory, and warps of a multiprocessor that registers suffice for.
FEWEST_TILES, MOST_TILES, MOST_RESIDENT = 2, 4, 12
# Shared memory of a multiprocessor by its capability, of all others, and what a block takes of it beyond its own.
KIB = 1024
SHARED_OF_MULTIPROCESSOR = {(8, 0): 164 * KIB, (8, 7): 164 * KIB, (9, 0): 228 * KIB, (10, 0): 228 * KIB}
SHARED_OF_OTHERS, SHARED_OF_BLOCK = 100 * KIB, KIB


class Layout(NamedTuple):
    """Of the launches of one kind."""

    each: int
    """Channels of a lane."""
    depth: int
    """Tiles of a warp in shared memory."""
    shared: int
    """Bytes of it."""
    chunk: int
    n_chunks: int
    n_blocks: int


def forward(sizes: Sizes, macros: Macros, out_bytes: int, device_index: int) -> Launch:
    """The launches of the forward.

    Args:
        macros: Constants of scan_call.cuh.
        out_bytes: Bytes of one number of y.
    """
    each = _channels_of_lane(sizes, device_index)
    # y takes u's place in a tile where it fits.
    apart = 0 if out_bytes == sizes.item_bytes else STEPS_OF_TILE * _pitch(macros, each) * out_bytes
    layout = _layout(sizes, macros, each, 2 + sizes.gated, apart, device_index)
    return _launch(sizes, macros, FORWARD, ("scan_states", "scan_forward"), layout, device_index)


def backward(sizes: Sizes, macros: Macros, device_index: int) -> Launch:
    """The launches of the backward, without the last sums."""
    each = _channels_of_lane(sizes, device_index) if sizes.states == 1 else 1
    layout = _layout(sizes, macros, each, 3 + sizes.gated, 0, device_index)
    return _launch(sizes, macros, BACKWARD, ("scan_adjoints", "scan_backward"), layout, device_index)


def _channels_of_lane(sizes: Sizes, device_index: int) -> int:
    enough = _blocks(sizes, 2) * sizes.n_seqs >= ENOUGH_WARPS * cuda.multiprocessors(device_index)
    return 2 if enough else 1


def _blocks(sizes: Sizes, each: int) -> int:
    return sizes.groups * -(-(sizes.channels // sizes.groups) // (WARP * each))


def _pitch(macros: Macros, each: int) -> int:
    return WARP * each + (2 if dict(macros)["ALONG_TIME"] else 0)


def _layout(sizes: Sizes, macros: Macros, each: int, tensors: int, apart: int, device_index: int) -> Layout:
    """What suits the device; `tensors` activations are in a tile, `apart` bytes lie beyond the tiles."""
    processors, n_blocks = cuda.multiprocessors(device_index), _blocks(sizes, each)
    warps = n_blocks * sizes.n_seqs
    chunk, n_chunks = 0, 1
    if warps < FEW_WARPS * processors and sizes.length >= 2 * SHORTEST_CHUNK:
        wanted = min(-(-WANTED_WARPS * processors // warps), MOST_CHUNKS)
        steps = max(SHORTEST_CHUNK, -(-sizes.length // wanted))
        chunk = STEPS_OF_TILE * -(-steps // STEPS_OF_TILE)
        n_chunks = -(-sizes.length // chunk)
    of_step = tensors * _pitch(macros, each) * sizes.item_bytes + (2 * sizes.states + 1) * FLOAT_BYTES
    tile = STEPS_OF_TILE * of_step
    # Few warps look far ahead; many must all find room.
    resident = -(-warps * n_chunks // processors)
    there = SHARED_OF_MULTIPROCESSOR.get(cuda.capability(device_index), SHARED_OF_OTHERS)
    room = there // min(resident, MOST_RESIDENT) - apart - SHARED_OF_BLOCK
    depth = FEWEST_TILES if resident > MOST_RESIDENT else max(FEWEST_TILES, min(MOST_TILES, room // tile))
    return Layout(each, depth, depth * tile + apart, chunk, n_chunks, n_blocks)


def _launch(
    sizes: Sizes, macros: Macros, source: str, names: tuple[str, str], layout: Layout, device_index: int
) -> Launch:
    told = (*macros, ("EACH", layout.each), ("DEPTH", layout.depth))
    chunk, n_chunks, n_blocks = layout.chunk, layout.n_chunks, layout.n_blocks
    grid = (n_blocks * sizes.n_seqs, n_chunks, 1)
    last = Pass(cuda.kernel(source, names[1], told, device_index, layout.shared), grid, WARP, chunk)
    if n_chunks == 1:
        return Launch((last,), n_blocks, chunk, n_chunks)
    states = Pass(cuda.kernel(source, names[0], told, device_index, layout.shared), grid, WARP, chunk)
    n_states = sizes.n_seqs * sizes.channels * sizes.states
    chain_grid = (-(-n_states // CHAIN_THREADS), 1, 1)
    chain = Pass(cuda.kernel(source, "scan_chain", told, device_index), chain_grid, CHAIN_THREADS, chunk)
    return Launch((states, chain, last), n_blocks, chunk, n_chunks)
