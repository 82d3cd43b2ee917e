"""How the scan's CUDA kernels for one to four states are laid over a call: scan_narrow_forward.cu and its backward."""

from typing import NamedTuple

from selectra.ops import cuda
from selectra.ops.selective_scan.geometry import Macros
from selectra.ops.selective_scan.passes import Launch, Pass, Sizes

FORWARD, BACKWARD = (f"selective_scan/scan_narrow_{name}.cu" for name in ("forward", "backward"))
WARP, STEPS_OF_TILE, CHAIN_THREADS, FLOAT_BYTES = 32, 16, 128, 4
# Tiles of a warp in shared memory: one that is worked on and one that is on its way.
DEPTH = 2
# Blocks of a multiprocessor, of one warp each, below which a block has several warps; and below which the length is cut
# into chunks: then so many warps are wanted.
MANY_BLOCKS, FEW_BLOCKS, WANTED_WARPS, SHORTEST_CHUNK, MOST_CHUNKS = 4.0, 1.2, 16, 64, 65535
# Shared memory of a multiprocessor by its capability, of all others, and what a block takes of it beyond its own.
KIB = 1024
SHARED_OF_MULTIPROCESSOR = {(8, 0): 164 * KIB, (8, 7): 164 * KIB, (9, 0): 228 * KIB, (10, 0): 228 * KIB}
SHARED_OF_OTHERS, SHARED_OF_BLOCK = 100 * KIB, KIB
# Blocks that shall find room in a multiprocessor side by side.
SIDE_BY_SIDE = 2


class Cut(NamedTuple):
    """How warps are laid over channels and length; fastest on an H100 of what was tried."""

    each: int
    """Channels of a lane."""
    warps: int
    """Warps of a block, which take the tiles of the same channels in turn."""
    resident: int = 0
    """Warps of a multiprocessor that registers suffice for; 0: the compiler's own choice."""


class Layout(NamedTuple):
    """Of the launches of one kind."""

    cut: Cut
    shared: int
    """Bytes of shared memory of a block."""
    chunk: int
    n_chunks: int
    n_blocks: int


def forward(sizes: Sizes, macros: Macros, out_bytes: int, device_index: int) -> Launch:
    """The launches of the forward.

    Args:
        macros: Constants of scan_call.cuh.
        out_bytes: Bytes of one number of y.
    """
    cuts = (Cut(2, 8 if sizes.states == 1 else 4), Cut(2, 8 if sizes.states == 1 else 4))
    # y takes u's place in a tile where it fits.
    apart = 0 if out_bytes == sizes.item_bytes else out_bytes
    layout = _layout(sizes, macros, cuts, 2 + sizes.gated, apart, device_index)
    return _launch(sizes, macros, FORWARD, ("scan_states", "scan_forward"), layout, device_index)


def backward(sizes: Sizes, macros: Macros, device_index: int) -> Launch:
    """The launches of the backward, without the last sums."""
    cuts = (Cut(2, 1, 8), Cut(2, 4, 8)) if sizes.states == 1 else (Cut(1, 1, 8), Cut(1, 2, 8))
    layout = _layout(sizes, macros, cuts, 3 + sizes.gated, 0, device_index)
    return _launch(sizes, macros, BACKWARD, ("scan_adjoints", "scan_backward"), layout, device_index)


def _blocks(sizes: Sizes, each: int) -> int:
    return sizes.groups * -(-(sizes.channels // sizes.groups) // (WARP * each))


def _layout(sizes: Sizes, macros: Macros, cuts: tuple[Cut, Cut], tensors: int, apart: int, device_index: int) -> Layout:
    """What suits the device.

    Args:
        cuts: For many blocks, and for fewer.
        tensors: Activations of a tile.
        apart: Bytes of a number in a further tile, if any.
    """
    processors = cuda.multiprocessors(device_index)
    cut, chunk, n_chunks = cuts[0], 0, 1
    blocks = _blocks(sizes, cut.each) * sizes.n_seqs
    if blocks < FEW_BLOCKS * processors and sizes.length >= 2 * SHORTEST_CHUNK:
        most = sizes.length // SHORTEST_CHUNK
        # Twice the warps where even the shortest chunks are too few.
        cut = cut._replace(each=cut.each if blocks * most >= WANTED_WARPS * processors else 1, warps=1)
        blocks = _blocks(sizes, cut.each) * sizes.n_seqs
        wanted = min(-(-WANTED_WARPS * processors // blocks), MOST_CHUNKS, most)
        chunk = STEPS_OF_TILE * -(-sizes.length // (wanted * STEPS_OF_TILE))
        n_chunks = -(-sizes.length // chunk)
    elif blocks < MANY_BLOCKS * processors:
        cut = cuts[1]
    there = SHARED_OF_MULTIPROCESSOR.get(cuda.capability(device_index), SHARED_OF_OTHERS)
    while cut.warps > 1 and _shared(sizes, macros, cut, tensors, apart) > there // SIDE_BY_SIDE - SHARED_OF_BLOCK:
        cut = cut._replace(warps=cut.warps // 2)
    return Layout(cut, _shared(sizes, macros, cut, tensors, apart), chunk, n_chunks, _blocks(sizes, cut.each))


def _shared(sizes: Sizes, macros: Macros, cut: Cut, tensors: int, apart: int) -> int:
    """Bytes of `Shared` in the kernels."""
    width, states = WARP * cut.each, sizes.states
    pitch = width + (2 if dict(macros)["ALONG_TIME"] else 0)
    of_step = tensors * pitch * sizes.item_bytes + (2 * states + 1) * FLOAT_BYTES
    size = cut.warps * STEPS_OF_TILE * (DEPTH * of_step + pitch * apart)
    messages = 2 * cut.warps * width * (3 if states == 1 else 2 * states) * FLOAT_BYTES
    return size + (messages if cut.warps > 1 else 0)


def _launch(
    sizes: Sizes, macros: Macros, source: str, names: tuple[str, str], layout: Layout, device_index: int
) -> Launch:
    cut, chunk, n_chunks, n_blocks = layout.cut, layout.chunk, layout.n_chunks, layout.n_blocks
    told = (*macros, ("EACH", cut.each), ("DEPTH", DEPTH), ("WARPS", cut.warps))
    told += (("RESIDENT", cut.resident),) if cut.resident else ()
    grid = (n_blocks * sizes.n_seqs, n_chunks, 1)
    kernel = cuda.kernel(source, names[1], told, device_index, layout.shared)
    last = Pass(kernel, grid, WARP * cut.warps, chunk)
    if n_chunks == 1:
        return Launch((last,), n_blocks, chunk, n_chunks)
    assert cut.warps == 1
    states = Pass(cuda.kernel(source, names[0], told, device_index, layout.shared), grid, WARP, chunk)
    n_states = sizes.n_seqs * sizes.channels * sizes.states
    chain_grid = (-(-n_states // CHAIN_THREADS), 1, 1)
    chain = Pass(cuda.kernel(source, "scan_chain", told, device_index), chain_grid, CHAIN_THREADS, chunk)
    return Launch((states, chain, last), n_blocks, chunk, n_chunks)
