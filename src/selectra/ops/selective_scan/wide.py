"""How the scan's CUDA kernels for five states and more are laid over a call: scan_forward.cu and scan_backward.cu."""

import math
from typing import NamedTuple

from selectra.ops import cuda
from selectra.ops.selective_scan import geometry
from selectra.ops.selective_scan.geometry import Layout, Macros
from selectra.ops.selective_scan.passes import Launch, Pass, Sizes, Slice

FORWARD, THIN_FORWARD, BACKWARD, REDUCE = (
    f"selective_scan/scan_{name}.cu" for name in ("forward", "thin_forward", "backward", "reduce")
)
CHAIN_THREADS = REDUCE_THREADS = 256


class Costs(NamedTuple):
    """What kernels of one kind cost, as measured on an H100."""

    states: float
    """A pass over the states alone, in that of the whole pass."""
    neighbour: float = 0.58
    """A second block beside the first on a multiprocessor, in the first one's time."""
    block: float = 1.0
    """A block alone, in a wide forward's."""
    gain: float = 0.95
    """More chunks are taken where they should take this much of the time or less."""


FORWARD_COSTS, THIN_COSTS, BACKWARD_COSTS = Costs(0.6, gain=0.99), Costs(0.0, neighbour=0.4, block=0.61), Costs(0.2)
# Thin warps are taken where they should take this much of the wide ones' time or less.
THIN_GAIN = 0.9
FEWEST_STEPS_OF_CHUNK = 256
# More of these were never faster.
MOST_CHUNKS = 64
FLOAT_BYTES = 4
# A thread adds up so many rows of the parameters' partial sums without help.
MOST_ROWS_AT_ONCE = 512
# Partial sums of B's and C's gradients take this part of the bytes of u, delta and z at most, or little.
SHARE_OF_SUMS, FEWEST_BYTES_OF_SUMS = 1, 1 << 20
# In fewer steps a launch costs too much, where a multiprocessor takes its blocks in one round.
FEWEST_STEPS_OF_SLICE = 256
# TYPE and OUT_TYPE in scan_call.cuh.
BFLOAT16 = 1


def forward(sizes: Sizes, macros: Macros, interval: int, device_index: int) -> Launch:
    """The launches of the forward.

    Args:
        macros: Constants of scan_call.cuh.
        interval: Steps between two checkpoints.
    """
    source = FORWARD
    layout = geometry.forward_layout(sizes.states, cuda.shared_limit(device_index))
    shared = geometry.forward_shared(layout)
    n_blocks, chunk, n_chunks, time = _cut(sizes, layout, interval, FORWARD_COSTS, device_index)
    if _thin_takes(sizes, macros, device_index):
        thin, processors = geometry.THIN_LAYOUT, cuda.multiprocessors(device_index)
        n_thin = geometry.blocks(thin.width, sizes.channels, sizes.groups)
        # Chunks of the length are left to wide warps, whose pass over the states takes less.
        if _time(n_thin * sizes.n_seqs, processors, thin.resident, THIN_COSTS) < THIN_GAIN * time:
            source, layout, n_blocks, chunk, n_chunks = THIN_FORWARD, thin, n_thin, 0, 1
            shared = geometry.thin_shared(thin)
    told = (*macros, *layout.macros, ("INTERVAL", interval))
    grid = (n_blocks * sizes.n_seqs, n_chunks, 1)

    last = Pass(cuda.kernel(source, "scan_forward", told, device_index, shared), grid, layout.threads, chunk)
    if n_chunks == 1:
        return Launch((last,), n_blocks, chunk, n_chunks)
    kernel = cuda.kernel(source, "scan_states", told, device_index, shared)
    chain = _chain(sizes, macros, "scan_chain_forward", chunk, device_index)
    return Launch((Pass(kernel, grid, layout.threads, chunk), chain, last), n_blocks, chunk, n_chunks)


def backward(sizes: Sizes, macros: Macros, interval: int, device_index: int) -> Launch:
    """The launches of the backward, with the last sums."""
    layout = geometry.backward_layout(sizes.states, sizes.gated, interval, cuda.shared_limit(device_index))
    n_blocks, chunk, n_chunks, _ = _cut(sizes, layout, interval, BACKWARD_COSTS, device_index)
    facts = dict(macros)
    slices = (
        ()
        if facts["PACKED"] or facts.get("ROUTES")
        else _slices(sizes, layout, n_blocks, chunk, interval, device_index)
    )
    if slices:
        macros = (*macros, ("SLICED", 1))
    told = (*macros, *layout.macros, ("INTERVAL", interval))
    shared = geometry.backward_shared(layout, sizes.gated, interval)
    kernel = cuda.kernel(BACKWARD, "scan_backward", told, device_index, shared)
    passes: list[Pass] = []
    if n_chunks > 1:
        adjoint = cuda.kernel(BACKWARD, "scan_adjoint", told, device_index, geometry.adjoint_shared(layout))
        passes.append(Pass(adjoint, (n_blocks * sizes.n_seqs, n_chunks, 1), layout.threads, chunk))
        passes.append(_chain(sizes, macros, "scan_chain_backward", chunk, device_index))
    for part in slices or (Slice(sequences=sizes.n_seqs),):
        grid = (n_blocks * part.sequences, n_chunks, 1)
        passes.append(Pass(kernel, grid, layout.threads, chunk, part))
        rows = part.sequences * n_chunks * part.steps if slices else sizes.batch * sizes.length
        last = part is slices[-1] if slices else True
        passes.append(_reduce(sizes, macros, n_blocks, rows, last, device_index)._replace(part=part))
    rows_of_sums = max((part.sequences * n_chunks * part.steps for part in slices), default=0)
    return Launch(tuple(passes), n_blocks, chunk, n_chunks, rows_of_sums)


def forward_effect(
    sizes: Sizes, macros: Macros, interval: int, chunk: int, n_chunks: int, device_index: int
) -> tuple[Pass, ...]:
    """The launches that find what all chunks, the last one too, make of a zero state: each, and together."""
    layout = geometry.forward_layout(sizes.states, cuda.shared_limit(device_index))
    told = (*macros, *layout.macros, ("INTERVAL", interval), ("LAST_TOO", 1))
    kernel = cuda.kernel(FORWARD, "scan_states", told, device_index, geometry.forward_shared(layout))
    grid = (geometry.blocks(layout.width, sizes.channels, sizes.groups) * sizes.n_seqs, n_chunks, 1)
    found = Pass(kernel, grid, layout.threads, chunk)
    return found, _chain(sizes, macros, "scan_effect", chunk, device_index)


def backward_effect(
    sizes: Sizes, macros: Macros, interval: int, chunk: int, n_chunks: int, device_index: int
) -> tuple[Pass, ...]:
    """The launches that find what all chunks make of a zero adjoint: each, and together."""
    layout = geometry.backward_layout(sizes.states, sizes.gated, interval, cuda.shared_limit(device_index))
    told = (*macros, *layout.macros, ("INTERVAL", interval))
    kernel = cuda.kernel(BACKWARD, "scan_adjoint", told, device_index, geometry.adjoint_shared(layout))
    grid = (geometry.blocks(layout.width, sizes.channels, sizes.groups) * sizes.n_seqs, n_chunks, 1)
    found = Pass(kernel, grid, layout.threads, chunk)
    return found, _chain(sizes, macros, "scan_effect_back", chunk, device_index)


def _slices(
    sizes: Sizes, layout: Layout, n_blocks: int, chunk: int, interval: int, device_index: int
) -> tuple[Slice, ...]:
    """Slices of the backward whose partial sums of B's and C's gradients take little memory; none where all do.

    Sequences are cut where the device takes them in several rounds anyway, at the borders of these, then the time.
    """
    span, n_chunks = chunk or sizes.length, -(-sizes.length // chunk) if chunk else 1
    of_row = FLOAT_BYTES * n_blocks * 2 * sizes.states
    inputs = sizes.batch * sizes.length * sizes.channels * sizes.item_bytes * (3 if sizes.gated else 2)
    most = max(inputs // SHARE_OF_SUMS, FEWEST_BYTES_OF_SUMS)
    if of_row * sizes.batch * sizes.length <= most:
        return ()
    capacity = cuda.multiprocessors(device_index) * layout.resident
    rounds, of_round = -(-n_blocks * n_chunks * sizes.n_seqs // capacity), capacity // (n_blocks * n_chunks)
    sequences = sizes.n_seqs
    if rounds > 1 and of_round and -(-sizes.n_seqs // of_round) == rounds:
        rounds = min(max(most // (of_row * sizes.length * of_round), 1), rounds)
        sequences = min(of_round * rounds, sizes.n_seqs)
    wanted = -(-of_row * sequences * n_chunks * span // most)
    steps = min(interval * -(-max(-(-span // wanted), FEWEST_STEPS_OF_SLICE // rounds) // interval), span)
    if sequences == sizes.n_seqs and steps == span:
        return ()
    return tuple(
        Slice(first, min(sequences, sizes.n_seqs - first), step, steps, span)
        for first in range(0, sizes.n_seqs, sequences)
        for step in reversed(range(0, span, steps))
    )


def reduce(sizes: Sizes, macros: Macros, n_blocks: int, device_index: int) -> Pass:
    """The last sums of any backward, over blocks of channels and over chunks."""
    return _reduce(sizes, macros, n_blocks, sizes.batch * sizes.length, True, device_index)


def rows_of_fold(rows: int) -> int:
    """How many of so many rows of the parameters' partial sums are added up first; 1: none."""
    return 1 if rows <= MOST_ROWS_AT_ONCE else math.isqrt(rows)


def fold(sizes: Sizes, macros: Macros, rows: int, rows_of_fold: int, device_index: int) -> Pass:
    """The launch that adds up pieces of so many rows; it stands before the last sums, which take every piece's."""
    numbers = -(-rows // rows_of_fold) * sizes.channels * (sizes.states + 2)
    kernel = cuda.kernel(REDUCE, "scan_fold", _of_sums(macros), device_index)
    return Pass(kernel, (-(-numbers // REDUCE_THREADS), 1, 1), REDUCE_THREADS, 0)


def _reduce(sizes: Sizes, macros: Macros, n_blocks: int, rows: int, last: bool, device_index: int) -> Pass:
    """The sums of so many rows of B and C; `last`: those of the parameters too."""
    numbers = rows * sizes.groups * 2 * sizes.states + (sizes.channels * (sizes.states + 2) if last else 0)
    kernel = cuda.kernel(REDUCE, "scan_reduce", _of_sums(macros), device_index)
    return Pass(kernel, (-(-numbers // REDUCE_THREADS), 1, 1), REDUCE_THREADS, n_blocks // sizes.groups)


def _chain(sizes: Sizes, macros: Macros, name: str, chunk: int, device_index: int) -> Pass:
    n_states = sizes.n_seqs * sizes.channels * sizes.states
    kernel = cuda.kernel(REDUCE, name, _of_sums(macros), device_index)
    return Pass(kernel, (-(-n_states // CHAIN_THREADS), 1, 1), CHAIN_THREADS, chunk)


def _of_sums(macros: Macros) -> Macros:
    """The constants that scan_reduce.cu looks at as they are, the others alike for all calls."""
    return tuple(
        (name, value if name in ("STATES", "TYPE", "PACKED", "ROUTES", "SLICED") else 0) for name, value in macros
    )


def _thin_takes(sizes: Sizes, macros: Macros, device_index: int) -> bool:
    """Whether scan_thin_forward.cu can run the call."""
    layout = geometry.THIN_LAYOUT
    enough = layout.states // 2 < sizes.states <= layout.states
    return enough and _all_bfloat16(macros) and geometry.thin_shared(layout) <= cuda.shared_limit(device_index)


def _all_bfloat16(macros: Macros) -> bool:
    types = dict(macros)
    return types["TYPE"] == types["OUT_TYPE"] == BFLOAT16


def _cut(sizes: Sizes, layout: Layout, unit: int, costs: Costs, device_index: int) -> tuple[int, int, int, float]:
    """Blocks along the channels, steps of a chunk (a multiple of `unit`), number of chunks, and time they should take.

    The cut is the one that should take the least time; in units of a wide block alone that runs the whole length.
    """
    n_blocks = geometry.blocks(layout.width, sizes.channels, sizes.groups)
    processors = cuda.multiprocessors(device_index)
    blocks = n_blocks * sizes.n_seqs
    most = min(MOST_CHUNKS, sizes.length // max(FEWEST_STEPS_OF_CHUNK, unit))
    best, chunk = _time(blocks, processors, layout.resident, costs), 0
    for n_chunks in range(2, most + 1):
        steps = unit * -(-sizes.length // (n_chunks * unit))
        if -(-sizes.length // steps) != n_chunks:
            continue
        time = _time(blocks * n_chunks, processors, layout.resident, costs) * (1 + costs.states) * steps / sizes.length
        if time < costs.gain * best:
            best, chunk = time, steps
    return (n_blocks, chunk, -(-sizes.length // chunk), best) if chunk else (n_blocks, 0, 1, best)


def _time(blocks: int, processors: int, resident: int, costs: Costs) -> float:
    """Time of so many equal blocks: whole rounds, then a last one that may be thinner."""
    rounds, rest = divmod(blocks, processors * resident)
    return rounds * _side_by_side(resident, costs) + _side_by_side(-(-rest // processors), costs)


def _side_by_side(blocks: int, costs: Costs) -> float:
    return costs.block * (1 + costs.neighbour * (blocks - 1)) if blocks else 0.0
