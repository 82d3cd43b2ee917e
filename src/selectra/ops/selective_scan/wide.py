"""How the scan's CUDA kernels for five states and more are laid over a call: scan_forward.cu and scan_backward.cu."""

from selectra.ops import cuda
from selectra.ops.selective_scan import geometry
from selectra.ops.selective_scan.geometry import Layout, Macros
from selectra.ops.selective_scan.passes import Launch, Pass, Sizes

FORWARD, BACKWARD, REDUCE = (f"selective_scan/scan_{name}.cu" for name in ("forward", "backward", "reduce"))
CHAIN_THREADS = REDUCE_THREADS = 256
# What a pass over the states alone costs beside the whole pass.
STATES_SHARE, ADJOINT_SHARE = 0.6, 0.2
# A second block beside the first on a multiprocessor adds so much of the first one's time.
TIME_OF_NEIGHBOUR = 0.58
MOST_CHUNKS, FEWEST_STEPS_OF_CHUNK = 64, 256


def forward(sizes: Sizes, macros: Macros, interval: int, device_index: int) -> Launch:
    """The launches of the forward.

    Args:
        macros: Constants of scan_call.cuh.
        interval: Steps between two checkpoints.
    """
    layout = geometry.forward_layout(sizes.states, cuda.shared_limit(device_index))
    n_blocks = geometry.blocks(layout.width, sizes.channels, sizes.groups)
    chunk, n_chunks = _chunks(sizes, n_blocks, layout, interval, STATES_SHARE, device_index)
    told = (*macros, *layout.macros, ("INTERVAL", interval))
    shared, grid = geometry.forward_shared(layout), (n_blocks * sizes.n_seqs, n_chunks, 1)

    last = Pass(cuda.kernel(FORWARD, "scan_forward", told, device_index, shared), grid, layout.threads, chunk)
    if n_chunks == 1:
        return Launch((last,), n_blocks, chunk, n_chunks)
    kernel = cuda.kernel(FORWARD, "scan_states", told, device_index, shared)
    chain = _chain(sizes, macros, "scan_chain_forward", chunk, device_index)
    return Launch((Pass(kernel, grid, layout.threads, chunk), chain, last), n_blocks, chunk, n_chunks)


def backward(sizes: Sizes, macros: Macros, interval: int, device_index: int) -> Launch:
    """The launches of the backward, without the last sums."""
    layout = geometry.backward_layout(sizes.states, sizes.gated, interval, cuda.shared_limit(device_index))
    n_blocks = geometry.blocks(layout.width, sizes.channels, sizes.groups)
    chunk, n_chunks = _chunks(sizes, n_blocks, layout, interval, ADJOINT_SHARE, device_index)
    told = (*macros, *layout.macros, ("INTERVAL", interval))
    shared, grid = geometry.backward_shared(layout, sizes.gated, interval), (n_blocks * sizes.n_seqs, n_chunks, 1)
    last = Pass(cuda.kernel(BACKWARD, "scan_backward", told, device_index, shared), grid, layout.threads, chunk)
    if n_chunks == 1:
        return Launch((last,), n_blocks, chunk, n_chunks)
    kernel = cuda.kernel(BACKWARD, "scan_adjoint", told, device_index, geometry.adjoint_shared(layout))
    chain = _chain(sizes, macros, "scan_chain_backward", chunk, device_index)
    return Launch((Pass(kernel, grid, layout.threads, chunk), chain, last), n_blocks, chunk, n_chunks)


def reduce(sizes: Sizes, macros: Macros, n_blocks: int, device_index: int) -> Pass:
    """The last sums of any backward, over blocks of channels and over chunks."""
    numbers = sizes.batch * sizes.length * sizes.groups * 2 * sizes.states + sizes.channels * (sizes.states + 2)
    kernel = cuda.kernel(REDUCE, "scan_reduce", _of_sums(macros), device_index)
    return Pass(kernel, (-(-numbers // REDUCE_THREADS), 1, 1), REDUCE_THREADS, n_blocks // sizes.groups)


def _chain(sizes: Sizes, macros: Macros, name: str, chunk: int, device_index: int) -> Pass:
    n_states = sizes.n_seqs * sizes.channels * sizes.states
    kernel = cuda.kernel(REDUCE, name, _of_sums(macros), device_index)
    return Pass(kernel, (-(-n_states // CHAIN_THREADS), 1, 1), CHAIN_THREADS, chunk)


def _of_sums(macros: Macros) -> Macros:
    """The constants that scan_reduce.cu looks at as they are, the others alike for all calls."""
    return tuple((name, value if name in ("STATES", "TYPE", "PACKED") else 0) for name, value in macros)


def _chunks(sizes: Sizes, n_blocks: int, layout: Layout, unit: int, share: float, device_index: int) -> tuple[int, int]:
    """Steps of a chunk, a multiple of `unit`, and the number of chunks: what should take the least time."""
    processors = cuda.multiprocessors(device_index)
    blocks = n_blocks * sizes.n_seqs
    most = min(MOST_CHUNKS, sizes.length // max(FEWEST_STEPS_OF_CHUNK, unit))
    best, chunk = _time(blocks, processors, layout.resident), 0
    for n_chunks in range(2, most + 1):
        steps = unit * -(-sizes.length // (n_chunks * unit))
        if -(-sizes.length // steps) != n_chunks:
            continue
        time = _time(blocks * n_chunks, processors, layout.resident) * (1 + share) * steps / sizes.length
        if time < 0.95 * best:
            best, chunk = time, steps
    return (chunk, -(-sizes.length // chunk)) if chunk else (0, 1)


def _time(blocks: int, processors: int, resident: int) -> float:
    """Time of so many equal blocks, in that of one alone: whole rounds, then a last one that may be thinner."""
    rounds, rest = divmod(blocks, processors * resident)
    return rounds * _side_by_side(resident) + _side_by_side(-(-rest // processors))


def _side_by_side(blocks: int) -> float:
    return 1 + TIME_OF_NEIGHBOUR * (blocks - 1) if blocks else 0.0
