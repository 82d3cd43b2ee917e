"""How the scan's CUDA kernels are laid over a call: warps of a block, blocks of the grid, bytes of shared memory."""

from typing import NamedTuple

# A warp of the wide kernels holds 16 channels and tiles of 8 states; a tile of the sequence has 32 steps.
WARP, CHANNELS_OF_WARP, STATES_OF_TILE, STEPS_OF_TILE = 32, 16, 8, 32
GROUP = 4
STEPS_OF_THIN_TILE = 64
# Of the struct `Strips` in scan_backward.cu.
STRIPS_BYTES = 144
# Up to this many states a thread holds all states of its channels: scan_narrow.cu.
NARROW_STATES = 4
NARROW_INTERVAL = 16
# More states than this go through the kernels in parts, whose results are summed.
MOST_STATES_AT_ONCE = 64

Macros = tuple[tuple[str, int], ...]


class Layout(NamedTuple):
    """Warps of a block along channels and states, and what follows from them."""

    channel_warps: int
    state_warps: int
    state_tiles: int = 1
    resident: int = 1
    """Blocks of a multiprocessor that the registers must suffice for."""
    unrolled: int = 1
    """Groups of steps that are written out one after the other."""
    thin: int = 0
    """States of a lane in warps of 8 channels, of which a lane holds one; 0 for warps of 16."""

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return WARP * self.channel_warps * self.state_warps

    @property
    def width(self) -> int:
        """Channels of a block."""
        return CHANNELS_OF_WARP * self.channel_warps // (2 if self.thin else 1)

    @property
    def states(self) -> int:
        """States, with those that fill the last tile."""
        return (4 * self.thin or STATES_OF_TILE * self.state_tiles) * self.state_warps

    @property
    def macros(self) -> Macros:
        """The constants of scan_tiles.cuh."""
        return (
            ("CHANNEL_WARPS", self.channel_warps),
            ("STATE_WARPS", self.state_warps),
            ("STATE_TILES", self.state_tiles),
            ("RESIDENT", self.resident),
            ("UNROLLED", self.unrolled),
            *((("THIN", self.thin), ("TILE_STEPS", STEPS_OF_THIN_TILE)) if self.thin else ()),
        )


def state_warps(n: int) -> int:
    """Warps along the states for n of them, one tile each: a power of two."""
    return 1 << (-(-n // STATES_OF_TILE) - 1).bit_length()


def interval(item_bytes: int, n: int, gated: bool) -> int:
    """Steps between two checkpoints, such that these take at most a third of the bytes of u, delta and z.

    Args:
        item_bytes: Bytes of one number of these.
    """
    if n <= NARROW_STATES:
        return NARROW_INTERVAL
    state_bytes, input_bytes = 4 * min(n, MOST_STATES_AT_ONCE), (3 if gated else 2) * item_bytes
    return STEPS_OF_TILE * -(-3 * state_bytes // (input_bytes * STEPS_OF_TILE))


# By warps along the states: of the layouts that were tried on an H100 the fastest; then those that need less memory.
FORWARD_LAYOUTS = {
    1: (Layout(4, 1, resident=3),),
    2: (Layout(2, 2, resident=4, unrolled=4),),
    4: (Layout(2, 2, state_tiles=2, resident=2),),
    8: (Layout(2, 2, state_tiles=4, resident=2), Layout(1, 4, state_tiles=2, resident=2)),
}
# Where channels are few, for 9 to 16 states in bfloat16: twice the warps.
THIN_LAYOUT = Layout(2, 2, thin=2, resident=3)
# Many channels in a block, for each block costs a partial sum of B's and C's gradients.
BACKWARD_LAYOUTS = {
    1: (Layout(4, 1, resident=2, unrolled=4),),
    2: (Layout(4, 1, state_tiles=2, resident=2), Layout(2, 1, state_tiles=2, resident=2)),
    4: (Layout(4, 2, state_tiles=2), Layout(2, 2, state_tiles=2), Layout(1, 2, state_tiles=2)),
    8: (Layout(2, 4, state_tiles=2, unrolled=2), Layout(1, 4, state_tiles=2), Layout(1, 2, state_tiles=4)),
}


def forward_layout(n: int, shared_limit: int) -> Layout:
    """The forward's layout: the first that fits into so many bytes of shared memory, or the smallest."""
    layouts = FORWARD_LAYOUTS[state_warps(n)]
    return next((layout for layout in layouts if forward_shared(layout) <= shared_limit), layouts[-1])


def backward_layout(n: int, gated: bool, steps_of_interval: int, shared_limit: int) -> Layout:
    """The backward's layout, likewise."""
    layouts = BACKWARD_LAYOUTS[state_warps(n)]
    fitting = (x for x in layouts if backward_shared(x, gated, steps_of_interval) <= shared_limit)
    return next(fitting, layouts[-1])


def blocks(layout_width: int, channels: int, groups: int) -> int:
    """Blocks along the channels: all channels of a block are of one group."""
    return groups * -(-(channels // groups) // layout_width)


def _step_row(width: int) -> int:
    """Bytes of a row of steps in shared memory: STEP_ROW in scan_tiles.cuh."""
    return 16 * (width // 2 if width >= 64 else width // 2 + width // 16)


def _alive(layout: Layout) -> int:
    """Bytes of a word for every warp, on 16 bytes with some to spare."""
    warps = layout.threads // WARP
    return 4 * (warps + 4 - warps % 4)


def forward_shared(layout: Layout) -> int:
    """Bytes of `Shared` in scan_forward.cu."""
    steps = STEPS_OF_TILE
    size = steps * (_step_row(layout.width) + 4 * layout.states + 4 * (layout.states + 8))
    size += 4 * layout.state_warps * steps * (layout.width + 4) + 8 * layout.width + _alive(layout)
    return size


def thin_shared(layout: Layout) -> int:
    """Bytes of `Shared` in scan_thin_tiles.cuh."""
    steps = STEPS_OF_THIN_TILE
    stage = steps * (8 * (layout.width + 1) + 8 * layout.states + 16)
    stage += 4 * layout.state_warps * steps * (layout.width + 4)
    return 2 * stage + 8 * layout.width


def adjoint_shared(layout: Layout) -> int:
    """Bytes of the first part of `Shared` in scan_backward.cu."""
    steps = STEPS_OF_TILE
    dy_row = layout.width // 4 + (layout.width < 64)
    return (
        steps * (_step_row(layout.width) + 16 * dy_row + 8 * layout.states)
        + 8 * layout.width
        + STRIPS_BYTES
        + 8
        + _alive(layout)
        + 8
    )


def backward_shared(layout: Layout, gated: bool, steps_of_interval: int) -> int:
    """Bytes of `Shared` in scan_backward.cu, with the states before an interval's tiles."""
    steps, warps = STEPS_OF_TILE, layout.channel_warps * layout.state_warps
    states = 16 * warps * layout.state_tiles * WARP
    # ALONG_TIME takes as much or less for the sums over channels.
    size = adjoint_shared(layout) + steps // GROUP * states + 16 * 4 * layout.threads
    size += 8 * steps // GROUP * warps * WARP if gated else 0
    size += 4 * layout.channel_warps * steps * (2 * layout.states + 4)
    return size + max(16, (steps_of_interval // steps - 1) * states)
