"""The least time that a machine needs for a scan: the larger of moving its bytes and of its special functions.

Source: the exponentials, softplus and gate run on the special-function pipe, 16 a clock and multiprocessor from sm_80
on (CUDA C++ Programming Guide, arithmetic instructions).
"""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selectra.bench.events import Stopwatch
from selectra.bench.shapes import DTYPES, Case

PER_CLOCK = 16
# Two special functions for softplus, two for the gate, at each entry of u.
SOFTPLUS, GATE = 2, 2
# How often our backward forms the exponentials of all states, and softplus and gate with them.
BACKWARD_PASSES = 2
SPIN_CYCLES, LOAD_SECONDS = 200_000, 0.02


@dataclass(frozen=True)
class Machine:
    """What floors are computed from: bytes a second, special functions a second, and where the second comes from."""

    bandwidth: float
    special: float
    multiprocessors: int = 0
    clock: float = 0.0
    """Cycles a second under load, as measured."""

    def facts(self) -> dict[str, Any]:
        """How a record states it."""
        return {**asdict(self), "special functions a clock and multiprocessor": PER_CLOCK}


@dataclass(frozen=True)
class Floor:
    """Milliseconds: bytes and special functions; the floor is the larger."""

    bytes_ms: float
    special_ms: float

    @property
    def ms(self) -> float:
        """The floor."""
        return max(self.bytes_ms, self.special_ms)


def measure_machine(watch: Stopwatch) -> Machine:
    """Bandwidth and clock of the device as it is now, after work that heats it up."""
    if not watch.cuda:
        # A CPU has no such pipe: a stand-in, so that everything but the numbers can be tried.
        return Machine(watch.bandwidth, 1e9)
    count = torch.cuda.get_device_properties(watch.device).multi_processor_count
    work = torch.zeros(1 << 24, device=watch.device)
    clock = measure_clock(watch, lambda: work.exp2_().log2_())
    return Machine(watch.bandwidth, PER_CLOCK * count * clock, count, clock)


def at_clock_of(load: Callable[[], object], machine: Machine, watch: Stopwatch) -> Machine:
    """The machine at the clock that it keeps under `load`."""
    if not watch.cuda:
        return machine
    clock = measure_clock(watch, load)
    return replace(machine, clock=clock, special=PER_CLOCK * machine.multiprocessors * clock)


def measure_clock(watch: Stopwatch, load: Callable[[], object]) -> float:
    """Cycles a second right after work of `LOAD_SECONDS`.

    A kernel spins for a known number of cycles; the difference of two numbers cancels what a launch costs.
    """
    # Not public, but the only kernel of PyTorch's that counts cycles.
    spin = torch.cuda._sleep
    readings = []
    for _ in range(3):
        for _ in range(max(1, int(LOAD_SECONDS / watch.seconds(load)()))):
            load()
        short, long = (watch.seconds(lambda n=n: spin(n * SPIN_CYCLES)) for n in (1, 3))
        readings.append(2 * SPIN_CYCLES / (long() - short()))
    return statistics.median(readings)


def forward_floor(case: Case, machine: Machine) -> Floor:
    """Every input read once and y written once; N exponentials, softplus and gate at each entry of u."""
    return _floor(case, machine, _bytes(case, wide=4 if case.gate else 3, narrow=2), 1)


def backward_floor(case: Case, machine: Machine, checkpoint_bytes: int) -> Floor:
    """The floor of our own algorithm.

    u, delta, dy and the checkpoints are read, du and ddelta written, z and dz with a gate; B and C read, dB and dC
    written; the exponentials formed `BACKWARD_PASSES` times.
    """
    moved = _bytes(case, wide=7 if case.gate else 5, narrow=4) + checkpoint_bytes
    return _floor(case, machine, moved, BACKWARD_PASSES)


def _bytes(case: Case, wide: int, narrow: int) -> int:
    size = DTYPES[case.dtype].itemsize
    return size * (wide * case.elements + narrow * case.b * case.l * case.groups * case.n)


def _floor(case: Case, machine: Machine, moved: int, passes: int) -> Floor:
    special = passes * case.elements * (case.n + SOFTPLUS + (GATE if case.gate else 0))
    return Floor(1e3 * moved / machine.bandwidth, 1e3 * special / machine.special)


def input_bytes(arguments: dict[str, Tensor | None]) -> int:
    """What the inputs of a call occupy."""
    return sum(value.nbytes for value in arguments.values() if value is not None)
