"""What the project set out to reach on an H100, beside what the records say; as Markdown, from records alone."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median
from typing import Any

from selectra.bench.length_table import crossover, farthest, neighbours, per_token
from selectra.bench.scan_table import WAYS, markdown, ratios

PEER = "mamba_ssm"
LARGE = 4_000_000
GRADIENTS_AS_GOOD = 1.02

Record = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One figure to reach.

    Args:
        name: What it is.
        wanted: In words.
        found: In words.
        met: Whether it is reached.
    """

    name: str
    wanted: str
    found: str
    met: bool


def target_table(scan: Record, lengths: Record | None = None, start: Record | None = None) -> str:
    """Every target whose figures the records hold."""
    found = [*_of_scan(scan)]
    found += [] if lengths is None else _of_lengths(lengths)
    found += [] if start is None else _of_start(start)
    rows = [[each.name, each.wanted, each.found, "yes" if each.met else "no"] for each in found]
    return markdown(["target", "wanted", "measured", "met"], rows, left=4)


def _of_scan(record: Record) -> Iterator[Target]:
    rows = record["rows"]
    for way, name in WAYS.items():
        against = ratios(rows, way)
        if against:
            mean, worst = geometric_mean(against.values()), min(against, key=lambda tag: against[tag])
            yield Target(f"{name} against the peer, geometric mean", "at least 3.7", f"{mean:.2f}", mean >= 3.7)
            told = f"{against[worst]:.2f} ({worst})"
            yield Target(f"{name} against the peer, every shape", "at least 2.2", told, against[worst] >= 2.2)
    large = [row for row in rows if row["N"] > 1 and row["B"] * row["D"] * row["L"] >= LARGE]
    bf16, fp32 = ([row for row in large if row["dtype"] == dtype] for dtype in ("bf16", "fp32"))
    yield from _share("forward share of the floor, bf16 from 4 M elements on", bf16, 0.75, _of_floor("fwd"))
    yield from _share("forward share of the floor, fp32", fp32, 0.60, _of_floor("fwd"))
    for way, name in WAYS.items():
        narrow = [row for row in rows if row["N"] == 1]
        yield from _share(f"{name} share of copy bandwidth, N = 1", narrow, 0.68, _of_bytes(way))
    lm = [row for row in rows if row["tag"] == "lm"]
    yield from _share("backward share of its own floor, lm", lm, 0.50, _of_floor("bwd"))
    yield from _precision(record)
    yield from _memory(rows)
    for call, most in (("forward without gradient", 35), ("forward with gradient", 60)):
        host = record["host_microseconds"][call]
        yield Target(f"host time, {call}", f"under {most} microseconds", f"{host:.1f}", host < most)


def _of_floor(way: str) -> Callable[[Row], float]:
    return lambda row: row[f"floor_{way}_ms"] / row[f"ours_{way}_ms"]


def _of_bytes(way: str) -> Callable[[Row], float]:
    return lambda row: row[f"floor_{way}"]["bytes_ms"] / row[f"ours_{way}_ms"]


def _share(name: str, rows: Sequence[Row], least: float, share: Callable[[Row], float]) -> Iterator[Target]:
    if rows:
        worst = min(rows, key=share)
        told = f"{share(worst):.0%} ({worst['tag']})"
        yield Target(name, f"at least {least:.0%}", told, share(worst) >= least)


def _precision(record: Record) -> Iterator[Target]:
    for row in record["precision"]:
        found = row["errors"]
        gradients = [name for name in found if name != "y"]
        if row["dtype"] == "fp32":
            # The benchmarked shapes too: errors grow with the length.
            largest = [{name: found[name]["ours"]["largest"] for name in found}]
            largest += [at["errors at size"] for at in record["rows"] if at["dtype"] == "fp32"]
            y = max(each["y"] for each in largest)
            worst = max(error for each in largest for name, error in each.items() if name != "y")
            yield Target("float32 output against float64", "at most 1e-6", f"{y:.1e}", y <= 1e-6)
            yield Target("float32 gradients against float64", "at most 5e-6", f"{worst:.1e}", worst <= 5e-6)
        elif PEER in found["y"]:
            over = {name: found[name]["ours"]["rms"] / found[name][PEER]["rms"] for name in gradients}
            worst = max(over, key=lambda name: over[name])
            told = f"{over[worst]:.3f} times ({worst})"
            name = f"{row['dtype']} gradients' error over {PEER}'s, root mean square"
            yield Target(name, f"at most 1 (rounding: {GRADIENTS_AS_GOOD})", told, over[worst] <= GRADIENTS_AS_GOOD)


def _memory(rows: Sequence[Row]) -> Iterator[Target]:
    kept = {row["tag"]: row["memory"]["ours"]["kept_over_inputs"] for row in rows if row["N"] >= 16}
    if kept:
        worst = max(kept, key=lambda tag: kept[tag])
        told = f"{kept[worst]:.3f} ({worst})"
        yield Target("kept for the backward over the inputs, N = 16 and 64", "at most 1/3", told, kept[worst] <= 1 / 3)
    peaks = {
        row["tag"]: row["memory"]["ours"]["peak_bytes"] / row["memory"][PEER]["peak_bytes"]
        for row in rows
        if row["gate"] and "peak_bytes" in row["memory"].get(PEER, {})
    }
    if peaks:
        worst = max(peaks, key=lambda tag: peaks[tag])
        told = f"{peaks[worst]:.2f} times ({worst})"
        yield Target(f"peak of a training step with gate over {PEER}'s", "at most 1", told, peaks[worst] <= 1)


def _of_lengths(record: Record) -> Iterator[Target]:
    for way, name, most in (("fwd", "forward", 3500), ("train", "training step", 4096)):
        length = crossover(record, way)
        told = "not reached" if length is None else f"{length:,.0f} tokens"
        met = length is not None and length <= most
        yield Target(f"faster than FlashAttention, {name}", f"from {most:,} tokens on", told, met)
    for way, name in (("fwd", "forward"), ("train", "training step")):
        pairs = neighbours(record, way)
        if pairs:
            length, ratio = farthest(pairs)
            told = f"{ratio - 1:+.1%} (L = {length:,})"
            yield Target(f"L + 1 against L, {name}", "within 5 %", told, abs(ratio - 1) <= 0.05)
        ratio = per_token(record, way)
        if ratio is not None:
            told = f"{ratio - 1:+.1%}"
            yield Target(f"a token at 65,536 against 4,096, {name}", "within 10 %", told, abs(ratio - 1) <= 0.10)


def _of_start(record: Record) -> Iterator[Target]:
    for use, name, most in (("first", "first use on a clean machine", 5.0), ("later", "first call of later uses", 0.2)):
        slowest = max(record["rows"], key=lambda row: median(row[f"{use}_seconds"]))
        seconds = median(slowest[f"{use}_seconds"])
        yield Target(name, f"under {most:g} s", f"{seconds:.2f} s ({slowest['call']})", seconds < most)
