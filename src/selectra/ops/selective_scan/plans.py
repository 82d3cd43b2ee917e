"""What the sizes, types and strides of a call decide: kernels, their grids, memory for partial results, fixed words.

A plan is made once for every kind of call and kept; a call itself only fills in its addresses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from selectra.ops.selective_scan import geometry, narrow, short, wide
from selectra.ops.selective_scan.call import ScanCall
from selectra.ops.selective_scan.faults import Fault, faults
from selectra.ops.selective_scan.geometry import Macros
from selectra.ops.selective_scan.passes import Launch, Pass, Sizes

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
FLOAT_BYTES = 4
# Kernels count steps, channels and the elements between them in 32 bits, and multiply the last two by up to 64.
LARGEST_STRIDE, LARGEST_NARROW_STRIDE = 2**31 - 1, 2**25 - 1

# The members of ScanCall in scan_call.cuh, in its order, and how many words each has.
_MEMBERS = {
    **dict.fromkeys(("n_seqs", "length", "channels", "groups", "reverse", "interval", "chunk", "n_chunks"), 1),
    **dict.fromkeys(("first_sequence", "slice_sequences", "first_step", "slice", "span", "fold"), 1),
    **dict.fromkeys(("u", "delta", "z"), 4),
    **dict.fromkeys(("B", "C"), 5),
    "A": 3,
    **dict.fromkeys(("D", "delta_bias", "initial_state", "mask", "cu_seqlens"), 1),
    "y": 4,
    **dict.fromkeys(("final_state", "checkpoints", "chunk_state", "chunk_delta", "fault"), 1),
    **dict.fromkeys(("dy", "du", "ddelta", "dz"), 4),
    **dict.fromkeys(("dfinal", "dinitial", "partial_bc", "partial_a", "partial_d", "partial_bias"), 1),
    **dict.fromkeys(("dB", "dC", "dA", "dD", "dbias"), 1),
}
# With routes activations have one more stride, that of their groups, and the grid stands at the end.
_ACTIVATIONS = ("u", "delta", "z", "y", "dy", "du", "ddelta", "dz")
_GRID_MEMBERS = _MEMBERS | dict.fromkeys(_ACTIVATIONS, 5) | {"grid": 4}


def _places(members: dict[str, int]) -> dict[str, int]:
    found, place = {}, 0
    for name, words in members.items():
        found[name] = place
        place += words
    return found


Places = dict[str, int]
PLACES, GRID_PLACES = _places(_MEMBERS), _places(_GRID_MEMBERS)
_GRADIENTS = ("dy", "du", "ddelta", "dz")
N_WORDS, N_GRID_WORDS = sum(_MEMBERS.values()), sum(_GRID_MEMBERS.values())
# Routes of the groups, width, and how to divide by the height: the last words of ScanCall with ROUTES.
Grid = tuple[int, int, int, int]


class Plan(NamedTuple):
    """All launches of a forward or backward call."""

    words: list[int]
    """The kernels' argument without addresses."""
    passes: tuple[Pass, ...]
    scratch: int
    """Numbers of float32 that the launches share and nobody else."""
    scratch_words: tuple[tuple[int, int], ...]
    """Words that are addresses in it, and the bytes from its start."""
    fault: Fault
    """The device's word for what is wrong with A, whose address the words hold."""


class _Room:
    """Scratch memory, laid out part by part on 16 bytes."""

    def __init__(self, places: Places) -> None:
        self.numbers = 0
        self.words: list[tuple[int, int]] = []
        self._places = places

    def add(self, name: str, numbers: int) -> None:
        self.words.append((self._places[name], FLOAT_BYTES * self.numbers))
        self.numbers += -(-numbers // 4) * 4


def fits(call: ScanCall) -> bool:
    """Whether kernels can read the tensors as they lie: one type, whole parameters, strides in 32 bits."""
    dtype = call.u.dtype
    if any(x is not None and x.dtype != dtype for x in (call.delta, call.B, call.C, call.z)):
        return False
    parameters = (call.D, call.delta_bias, call.initial_state, call.mask, call.cu_seqlens)
    if not all(x is None or x.is_contiguous() for x in parameters):
        return False
    return all(strides_fit(x) for x in (call.u, call.delta, call.z, call.B, call.C) if x is not None)


def strides_fit(x: Tensor) -> bool:
    """Whether kernels can count from one position, and from one channel or state, to the next."""
    rows_fit = x.shape[1] == 1 or x.stride(1) <= LARGEST_STRIDE
    return rows_fit and (x.shape[-1] == 1 or x.stride(-1) <= LARGEST_NARROW_STRIDE)


def plan_forward(call: ScanCall, y: Tensor, interval: int, grid: Grid | None = None) -> Plan:
    """The plan of a forward call whose tensors fit.

    Args:
        interval: Steps between two checkpoints.
        grid: Where every group walks a grid on its own route; activations are (b, l, g, d / g) then.
    """
    index, sizes = call.u.get_device(), Sizes.of(call)
    macros = call_macros(call, TYPES[y.dtype], (call.u, call.delta, call.z, y), grid)
    if grid is None and is_short(call):
        launch, interval = short.forward(sizes, macros, index)
    elif sizes.states <= geometry.NARROW_STATES:
        launch = narrow.forward(sizes, macros, y.element_size(), index)
    else:
        launch = wide.forward(sizes, macros, interval, index)
    places = PLACES if grid is None else GRID_PLACES
    room = _Room(places)
    if launch.n_chunks > 1:
        _add_chunks(room, sizes, launch.n_chunks)
    words = _words(call, sizes, interval, launch, grid)
    _set_strides(words, places["y"], y)
    return Plan(words, launch.passes, room.numbers, tuple(room.words), faults.of(index))


def plan_backward(
    call: ScanCall,
    dy: Tensor,
    du: Tensor,
    ddelta: Tensor,
    dz: Tensor | None,
    interval: int,
    grid: Grid | None = None,
) -> Plan:
    """The plan of a backward call whose tensors fit."""
    index, sizes = call.u.get_device(), Sizes.of(call)
    macros = call_macros(call, TYPES[call.u.dtype], (call.u, call.delta, call.z, dy, du, ddelta, dz), grid)
    if grid is None and is_short(call):
        return _plan_short_backward(call, sizes, macros, (dy, du, ddelta, dz), index)
    if sizes.states <= geometry.NARROW_STATES:
        launch = narrow.backward(sizes, macros, index)
        passes = (*launch.passes, wide.reduce(sizes, macros, launch.n_blocks, index))
    else:
        launch = wide.backward(sizes, macros, interval, index)
        passes = launch.passes
    d, n, rows = sizes.channels, sizes.states, sizes.n_seqs * launch.n_chunks
    fold = wide.rows_of_fold(rows)
    if fold > 1:
        passes = (*passes[:-1], wide.fold(sizes, macros, rows, fold, index), passes[-1])
    places = PLACES if grid is None else GRID_PLACES
    room = _Room(places)
    sliced = launch.rows_of_sums > 0
    room.add("partial_bc", (launch.rows_of_sums or sizes.batch * sizes.length) * launch.n_blocks * 2 * n)
    room.add("partial_a", rows * d * n)
    room.add("partial_d", rows * d)
    room.add("partial_bias", rows * d)
    # Written in any case; a call that wants them puts its own addresses there.
    room.add("dD", d)
    room.add("dbias", d)
    if launch.n_chunks > 1 or sliced:
        _add_chunks(room, sizes, launch.n_chunks)
    words = _words(call, sizes, interval, launch, grid)
    words[places["fold"]] = fold
    for name, tensor in zip(_GRADIENTS, (dy, du, ddelta, dz), strict=True):
        _set_strides(words, places[name], tensor)
    return Plan(words, passes, room.numbers, tuple(room.words), faults.of(index))


def is_short(call: ScanCall) -> bool:
    """Whether the kernels for many short sequences of few channels take a call."""
    if call.cu_seqlens is not None:
        return False
    batch, length = call.u.shape[:2]
    return short.takes(batch, length, call.A.shape[0], call.B.shape[2], call.A.shape[1])


def _plan_short_backward(
    call: ScanCall, sizes: Sizes, macros: Macros, gradients: tuple[Tensor | None, ...], index: int
) -> Plan:
    launch, segment, blocks = short.backward(sizes, macros, index)
    room, d = _Room(PLACES), sizes.channels
    room.add("partial_a", blocks * d * sizes.states)
    for name in ("partial_d", "partial_bias"):
        room.add(name, blocks * d)
    # As above.
    for name in ("dD", "dbias"):
        room.add(name, d)
    words = _words(call, sizes, segment, launch, None)
    words[PLACES["fold"]] = blocks
    for name, tensor in zip(_GRADIENTS, gradients, strict=True):
        _set_strides(words, PLACES[name], tensor)
    return Plan(words, launch.passes, room.numbers, tuple(room.words), faults.of(index))


def _add_chunks(room: _Room, sizes: Sizes, n_chunks: int) -> None:
    room.add("chunk_state", sizes.n_seqs * n_chunks * sizes.channels * sizes.states)
    room.add("chunk_delta", sizes.n_seqs * n_chunks * sizes.channels)


def _words(call: ScanCall, sizes: Sizes, interval: int, launch: Launch, grid: Grid | None) -> list[int]:
    words = [0] * (N_WORDS if grid is None else N_GRID_WORDS)
    places = PLACES if grid is None else GRID_PLACES
    words[places["fault"]] = faults.of(call.u.get_device()).address
    head = (
        sizes.n_seqs,
        sizes.length,
        sizes.channels,
        sizes.groups,
        int(call.reverse),
        interval,
        launch.chunk,
        launch.n_chunks,
    )
    words[: len(head)] = head
    for name in ("u", "delta", "z", "B", "C", "A"):
        _set_strides(words, places[name], getattr(call, name))
    if grid is not None:
        words[places["grid"] :] = grid
    return words


def _set_strides(words: list[int], place: int, tensor: Tensor | None) -> None:
    """Behind the address at `place`, which a call fills in."""
    if tensor is not None:
        words[place + 1 : place + 1 + tensor.dim()] = tensor.stride()


def call_macros(call: ScanCall, out_type: int, activations: Sequence[Tensor | None], grid: Grid | None) -> Macros:
    """The constants of scan_call.cuh.

    Args:
        activations: All that a kernel reads and writes by position and channel.
        grid: As in `plan_forward`.
    """
    u, B, C = call.u, call.B, call.C
    vectors = (call.A.shape[0] // B.shape[2]) % 8 == 0 and all(x is None or _in_eights(x) for x in activations)
    facts = {
        "STATES": B.shape[3],
        "TYPE": TYPES[u.dtype],
        "OUT_TYPE": out_type,
        "GATED": call.z is not None,
        "SOFTPLUS": call.delta_softplus,
        "MASKED": call.mask is not None,
        "PACKED": call.cu_seqlens is not None,
        "ALONG_TIME": not vectors and _along_time(u) and _along_time(call.delta),
        "VECTORS": vectors,
        "PAIRS": B.shape[3] % 2 == 0 and _in_pairs(B) and _in_pairs(C),
    }
    if grid is not None:
        facts["ROUTES"] = True
    return tuple((name, int(fact)) for name, fact in facts.items())


def _along_time(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(-1) > 1


def _in_eights(x: Tensor) -> bool:
    """Whether any eight neighbouring channels can be read 16 bytes at a time."""
    *outer, channel = x.stride()
    rows_fit = all(stride % 8 == 0 or size == 1 for stride, size in zip(outer, x.shape, strict=False))
    return channel == 1 and rows_fit and x.data_ptr() % 16 == 0


def _in_pairs(x: Tensor) -> bool:
    """Whether any two neighbouring states can be read at once."""
    batch, row, group, state = x.stride()
    aligned = x.data_ptr() % (2 * x.element_size()) == 0
    return state == 1 and batch % 2 == 0 and row % 2 == 0 and group % 2 == 0 and aligned
