"""How the scan's CUDA kernels for one to four states are laid over a call: scan_narrow_forward.cu and its backward."""

from typing import NamedTuple

from selectra.ops import cuda
from selectra.ops.selective_scan.geometry import Macros
from selectra.ops.selective_scan.passes import Launch, Pass, Sizes

FORWARD, BACKWARD = (f"selective_scan/scan_narrow_{name}.cu" for name in ("forward", "backward"))
WARP, STEPS_OF_TILE, CHAIN_THREADS, FLOAT_BYTES = 32, 16, 128, 4
# Tiles of a warp in shared memory: one that is worked on and one that is on its way; one more where warps are few.
DEPTH = 2
# Blocks of two channels a lane for each multiprocessor below which the length is cut into chunks, the warps of a
# multiprocessor that are wanted then, and the limits.
FEW_BLOCKS, WANTED_WARPS, SHORTEST_CHUNK, MOST_CHUNKS = 0.45, 16, 64, 65535
# Turns in which so much of the warps' time is without a tile are not worth it where warps are enough without them.
IDLE, ENOUGH_WARPS = 0.1, 8


class Cut(NamedTuple):
    """How warps are laid over the channels."""

    each: int
    """Channels of a lane."""
    warps: int
    """Warps of a block, which take the tiles of the same channels in turn."""
    resident: int = 0
    """Warps of a multiprocessor that registers suffice for; 0: the compiler's own choice."""
    depth: int = DEPTH


# By states, of what was tried on an H100 the fastest: from so many blocks of two channels a lane for each
# multiprocessor on, and for fewer.
FORWARD_CUTS: dict[int, tuple[float, Cut, Cut]] = {
    1: (1.5, Cut(2, 8), Cut(1, 8)),
    2: (4.0, Cut(2, 4), Cut(1, 4)),
    3: (4.0, Cut(1, 1), Cut(2, 4)),
    4: (4.0, Cut(1, 1), Cut(2, 4)),
}
BACKWARD_CUTS: dict[int, tuple[float, Cut, Cut]] = {
    1: (1.5, Cut(2, 8, 8), Cut(1, 4, 12)),
    2: (4.0, Cut(1, 2, 8), Cut(1, 4, 8)),
    3: (4.0, Cut(1, 2, 8), Cut(1, 8, 8)),
    4: (4.0, Cut(1, 2, 8), Cut(1, 8, 8)),
}
# For chunks: where two channels a lane leave enough warps, and where not.
FORWARD_CHUNK_CUTS = (Cut(2, 1), Cut(1, 1))
BACKWARD_CHUNK_CUTS = {1: (Cut(2, 1, 8), Cut(1, 1, 12)), 2: (Cut(1, 1, 8),) * 2}


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
    # y takes u's place in a tile where it fits.
    tile = _Tile(sizes, macros, 2 + sizes.gated, 0 if out_bytes == sizes.item_bytes else out_bytes)
    layout = _layout(tile, FORWARD_CUTS[sizes.states], FORWARD_CHUNK_CUTS, device_index)
    return _launch(sizes, macros, FORWARD, ("scan_states", "scan_forward"), layout, device_index)


def backward(sizes: Sizes, macros: Macros, device_index: int) -> Launch:
    """The launches of the backward, without the last sums."""
    tile = _Tile(sizes, macros, 3 + sizes.gated, 0)
    layout = _layout(tile, BACKWARD_CUTS[sizes.states], BACKWARD_CHUNK_CUTS[min(sizes.states, 2)], device_index)
    return _launch(sizes, macros, BACKWARD, ("scan_adjoints", "scan_backward"), layout, device_index)


class _Tile(NamedTuple):
    """What shared memory holds of a call."""

    sizes: Sizes
    macros: Macros
    tensors: int
    """Activations of a tile."""
    apart: int
    """Bytes of a number in a further tile, if any."""

    def shared(self, cut: Cut) -> int:
        """Bytes of `Shared` in the kernels."""
        width, states = WARP * cut.each, self.sizes.states
        pitch = width + (2 if dict(self.macros)["ALONG_TIME"] else 0)
        of_step = self.tensors * pitch * self.sizes.item_bytes + (2 * states + 1) * FLOAT_BYTES
        size = cut.warps * STEPS_OF_TILE * (cut.depth * of_step + pitch * self.apart)
        messages = 2 * cut.warps * width * (3 if states == 1 else 2 * states) * FLOAT_BYTES
        return size + (messages if cut.warps > 1 else 0)


def _blocks(sizes: Sizes, each: int) -> int:
    return sizes.groups * -(-(sizes.channels // sizes.groups) // (WARP * each))


def _layout(tile: _Tile, cuts: tuple[float, Cut, Cut], chunk_cuts: tuple[Cut, Cut], device_index: int) -> Layout:
    """What suits the device."""
    sizes, processors = tile.sizes, cuda.multiprocessors(device_index)
    pairs = _blocks(sizes, 2) * sizes.n_seqs
    if pairs < FEW_BLOCKS * processors and sizes.length >= 2 * SHORTEST_CHUNK:
        most = min(sizes.length // SHORTEST_CHUNK, MOST_CHUNKS)
        cut = chunk_cuts[0 if pairs * most >= WANTED_WARPS * processors else 1]
        wanted = -(-WANTED_WARPS * processors // (_blocks(sizes, cut.each) * sizes.n_seqs))
        chunk = STEPS_OF_TILE * -(-sizes.length // (min(wanted, most) * STEPS_OF_TILE))
        n_chunks = -(-sizes.length // chunk)
    else:
        many, *by_number = cuts
        cut = _fitting(tile, by_number[0 if pairs >= many * processors else 1], device_index)
        chunk, n_chunks = 0, 1
    return Layout(cut, tile.shared(cut), chunk, n_chunks, _blocks(sizes, cut.each))


def _fitting(tile: _Tile, cut: Cut, device_index: int) -> Cut:
    """The same with so many warps as find a tile and room."""
    sizes = tile.sizes
    n_tiles = -(-sizes.length // STEPS_OF_TILE)
    enough = ENOUGH_WARPS * cuda.multiprocessors(device_index)
    while cut.warps > 1:
        idle = -n_tiles % cut.warps > IDLE * n_tiles
        halves_are_enough = _blocks(sizes, cut.each) * sizes.n_seqs * cut.warps // 2 >= enough
        if cut.warps < 2 * n_tiles and not (idle and halves_are_enough):
            break
        cut = cut._replace(warps=cut.warps // 2)
    limit, fitting = cuda.shared_limit(device_index), cut
    while fitting.warps > 1 and tile.shared(fitting) > limit:
        fitting = fitting._replace(warps=fitting.warps // 2)
    deeper = fitting._replace(depth=DEPTH + 1)
    return deeper if fitting.warps < cut.warps and tile.shared(deeper) <= limit else fitting


def _launch(
    sizes: Sizes, macros: Macros, source: str, names: tuple[str, str], layout: Layout, device_index: int
) -> Launch:
    cut, chunk, n_chunks, n_blocks = layout.cut, layout.chunk, layout.n_chunks, layout.n_blocks
    told = (*macros, ("EACH", cut.each), ("DEPTH", cut.depth), ("WARPS", cut.warps))
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
