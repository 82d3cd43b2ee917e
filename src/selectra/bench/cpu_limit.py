"""The least time that a CPU needs for a scan: the larger of its arithmetic and of moving its bytes.

Both are computed from rates that are measured in the same run, in turn with the kernels: what a thread of this machine
does of the exponentials, multiply-adds, softplus and sigmoids that the kernels use, one kind alone from registers, and
how fast it copies as many bytes as a call moves, which a cache may hold as it may hold the call's.

The arithmetic is that of the recurrence and its adjoint, nothing around it: no loads, stores, sums over lanes. At every
state of every entry of u

- forward: the exponential of delta A; h = a h + x B (two multiply-adds), y += C h;
- backward: the exponential again, h again, y += C h where a gate needs it; dC += dy h; g = g + dy C, dB += g x,
  dx += g B, s = g (a h), dt += s A, dA += s dt, g = g a: ten multiply-adds, eleven with a gate;

and at every entry x = delta u and, with softplus, bias, skip and gate, these, as `COUNTS` has them.

Source: the formulas of ops/selective_scan/README.md.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F

from selectra.bench.calls import Ours
from selectra.bench.scan_table import markdown
from selectra.bench.shapes import Case
from selectra.bench.timing import Timing, interleaved
from selectra.ops.native.library import library, threads

# As in `Work` of call.h.
WORK = {"exponentials": 0, "multiply-adds": 1, "softplus": 2, "softplus and slope": 3, "sigmoid": 4}
COPY = 5
ROUNDS = 1000
SEED = 0
CPU = torch.device("cpu")
WAYS = {"plain_fwd": "forward, plain", "fwd": "forward", "bwd": "backward"}

Row = dict[str, Any]
Record = dict[str, Any]


@dataclass(frozen=True)
class Count:
    """What one way of a scan does and moves.

    Args:
        at_state: Multiply-adds at each state of each entry of u, beside one exponential.
        at_entry: Of each kind of work at each entry of u.
        wide: Tensors (b, l, d) read or written.
        narrow: Tensors (b, l, n) read or written.
        checkpoints: Whether the states kept every `chunk` steps are read.
    """

    at_state: int
    at_entry: dict[str, int]
    wide: int
    narrow: int
    checkpoints: bool = False


COUNTS = {
    # x = delta u.
    "plain_fwd": Count(3, {"multiply-adds": 1}, wide=3, narrow=2),
    # Bias, x, D u, and y z sigmoid(z).
    "fwd": Count(3, {"multiply-adds": 5, "softplus": 1, "sigmoid": 1}, wide=4, narrow=2),
    # Bias, x, D u; z sigmoid(z), its slope (3) and its products with dy and y (3); ddelta (2), du (2), dD, dbias.
    "bwd": Count(11, {"multiply-adds": 16, "softplus and slope": 1, "sigmoid": 1}, wide=7, narrow=4, checkpoints=True),
}


def measure_limits(case: Case, seconds: float) -> Row:
    """The times of our kernels below autograd, in turn with the rates, and what these leave as the least times.

    Args:
        case: In float32 with a gate.
        seconds: Time for the measurement.
    """
    arguments = case.arguments(CPU, SEED)
    nothing = dict.fromkeys(("D", "z", "delta_bias"))
    delta, bias = arguments["delta"], arguments["delta_bias"]
    assert delta is not None
    assert bias is not None
    plain = Ours(arguments | nothing | {"delta": F.softplus(delta + bias)}, "cpu", save=False, softplus=False)
    full, trained = Ours(arguments, "cpu", save=False), Ours(arguments, "cpu")
    outputs = trained.forward()
    dy = torch.ones_like(outputs[0])
    kernels: dict[str, Callable[[], object]] = {
        "plain_fwd": plain.forward,
        "fwd": full.forward,
        "bwd": lambda: trained.backward(outputs, dy),
    }
    moved = {way: moved_bytes(case, COUNTS[way]) for way in WAYS}
    copies = {f"copy {way}": _copying(moved[way] // 2) for way in WAYS}
    rounds = {name: _working(work) for name, work in WORK.items()}
    timings = interleaved({**kernels, **rounds, **copies}, seconds, CPU)
    native = library()
    vectors = ROUNDS * native.round_vectors * threads()
    rates = {name: vectors * native.lanes(torch.float32) / timings[name].median for name in WORK}
    copied = {way: 2 * (moved[way] // 2) / timings[f"copy {way}"].median for way in WAYS}
    return row_of(case, timings, rates, copied)


def row_of(case: Case, timings: dict[str, Timing], rates: dict[str, float], copied: dict[str, float]) -> Row:
    """A line of the record: milliseconds of ours and of the limit, each way, and the limit's share of ours.

    Args:
        rates: Of each kind of work, a second.
        copied: Bytes read and written a second, by way.
    """
    row: Row = {"B": case.b, "D": case.d, "L": case.l, "N": case.n, "groups": case.groups, "dtype": case.dtype}
    row |= {"work a second": rates, "bytes a second": copied}
    for way, count in COUNTS.items():
        ours, arithmetic = 1e3 * timings[way].median, arithmetic_ms(case, count, rates)
        moving = 1e3 * moved_bytes(case, count) / copied[way]
        floor = max(arithmetic, moving)
        row |= {f"ours_{way}_ms": ours, f"floor_{way}_ms": floor, f"share_{way}": floor / ours}
        row[f"floor_{way}"] = {"arithmetic_ms": arithmetic, "bytes_ms": moving}
    return row | {"timings": {name: asdict(timing) for name, timing in timings.items()}}


def arithmetic_ms(case: Case, count: Count, rates: dict[str, float]) -> float:
    """Milliseconds of all the work, one kind after another: they share the processor's units."""
    states = case.elements * case.n
    work = {name: case.elements * times for name, times in count.at_entry.items()}
    work["exponentials"] = states
    work["multiply-adds"] += states * count.at_state
    return 1e3 * sum(times / rates[name] for name, times in work.items())


def moved_bytes(case: Case, count: Count) -> int:
    """Bytes that a call reads and writes, each once."""
    numbers = count.wide * case.elements + count.narrow * case.b * case.l * case.groups * case.n
    if count.checkpoints:
        numbers += case.b * -(-case.l // library().chunk) * case.d * case.n
    return 4 * numbers


def _working(work: int) -> Callable[[], object]:
    words = [work, ROUNDS, threads(), 0, 0, 0]
    return lambda: library().call("rate", torch.float32, words)


def _copying(size: int) -> Callable[[], object]:
    """A copy of so many bytes from one tensor to another: each byte is read once and written once."""
    native = library()
    source, target = (native.room((size,), torch.uint8).fill_(1) for _ in range(2))

    return lambda: native.call("rate", torch.float32, [COPY, 1, threads(), source.data_ptr(), target.data_ptr(), size])


def limit_table(record: Record) -> str:
    """Milliseconds and shares of the limit at every shape, and the rates they are computed from."""
    if "limits" not in record:
        return "The record has no limits: it was made by an older version."
    rows = []
    for row in record["limits"]:
        cells = [str((row["B"], row["D"], row["L"], row["N"]))]
        for way in WAYS:
            ours, floor, share = (row[name] for name in (f"ours_{way}_ms", f"floor_{way}_ms", f"share_{way}"))
            by = "bytes" if row[f"floor_{way}"]["bytes_ms"] == floor else "arithmetic"
            cells += [f"{ours:.2f}", f"{floor:.2f}, {by}", f"{share:.0%}"]
        rows.append(cells)
    columns = ["shape (b, d, l, n)"]
    for name in WAYS.values():
        columns += [f"{name}, ms", "limit", "share"]
    return f"{markdown(columns, rows)}\n\n{rates_told(record['limits'][0])}"


def rates_told(row: Row) -> str:
    """The rates of a row, in words."""
    found = row["work a second"]
    told = ", ".join(f"{rate / 1e9:.1f} {name}" for name, rate in found.items())
    copied = row["bytes a second"]
    return f"Measured at the first shape, a nanosecond: {told}; copying {copied['fwd'] / 1e9:.1f} bytes."
