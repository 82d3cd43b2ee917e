"""What the project set out to reach on two cores with AVX-512, beside what the records say; from records alone."""

from collections.abc import Iterator
from typing import Any

from selectra.bench.cpu_limit import WAYS
from selectra.bench.scan_table import markdown
from selectra.bench.stack_table import KINDS, PRODUCTS, faster_from
from selectra.bench.targets import Target

OTHERS = ("mambapy pscan", "transformers loop")
# Of the time of a token late in the sequence over that of an early one: what the clock's noise is allowed.
SAME = 1.1
LEAST_SHARE = 0.65
LIMITED_N = 16
LEAST_SHARES_OF_LIMIT = {"plain_fwd": 0.70, "fwd": 0.60, "bwd": 0.45}

Record = dict[str, Any]


def cpu_target_table(
    scan: Record,
    narrow_set: Record | None = None,
    parts: Record | None = None,
    stack: Record | None = None,
    stream: Record | None = None,
) -> str:
    """Every target whose figures the records hold.

    Args:
        scan: With the widest instruction set.
        narrow_set: Forced to AVX2.
        parts: Of `bench block_parts`.
        stack: Of `bench stack`.
        stream: Of `bench stream`.
    """
    found = [*_of_limits(scan), *_of_scan(scan, 16, (60, 60)), *_of_scan(scan, 1, (12, 9))]
    found += [] if narrow_set is None else _of_scan(narrow_set, 16, (35, 35), ", forced to AVX2")
    found += [] if parts is None else _of_parts(parts)
    found += [] if stack is None else _of_stack(stack)
    found += [] if stream is None else _of_stream(stream)
    rows = [[each.name, each.wanted, each.found, "yes" if each.met else "no"] for each in found]
    return markdown(["target", "wanted", "measured", "met"], rows, left=4)


def _of_limits(record: Record) -> Iterator[Target]:
    """The least share of the limit among the shapes with 16 states."""
    rows = [row for row in record.get("limits", ()) if row["N"] == LIMITED_N]
    for way, least in LEAST_SHARES_OF_LIMIT.items():
        for row in sorted(rows, key=lambda row: row[f"share_{way}"])[:1]:
            share, shape = row[f"share_{way}"], (row["B"], row["D"], row["L"], row["N"])
            name = f"{WAYS[way]}, share of the limit, N = {LIMITED_N}"
            yield Target(name, f"at least {least:.0%}", f"{share:.0%} {shape}", share >= least)


def _of_scan(record: Record, n: int, wanted: tuple[int, int], how: str = "") -> Iterator[Target]:
    """The least lead over the best other package among the shapes with n states."""
    shapes = dict.fromkeys(tuple(row["shape"].values()) for row in record["rows"] if row["shape"]["n"] == n)
    for kind, least in zip(KINDS, wanted, strict=True):
        leads = []
        for shape in shapes:
            times = {
                row["name"]: row[kind]["median"] for row in record["rows"] if tuple(row["shape"].values()) == shape
            }
            others = [times[name] for name in OTHERS if name in times]
            if others and "cpu" in times:
                leads.append((min(others) / times["cpu"], shape))
        if leads:
            lead, shape = min(leads)
            name = f"{kind} against the best other package, N = {n}{how}"
            yield Target(name, f"at least {least} times", f"{lead:.0f} {shape}", lead >= least)


def _of_parts(record: Record) -> Iterator[Target]:
    for kind in KINDS:
        shares = []
        for row in record["rows"]:
            times = row[kind]["parts_ms"]
            shares.append((sum(times[part] for part in PRODUCTS) / times["all"], row["d_model"], row["length"]))
        share, width, length = min(shares)
        told = f"{share:.0%} (d {width}, L {length:,})"
        yield Target(f"products' share of an S6 block, {kind}", "at least 65%", told, share >= LEAST_SHARE)


def _of_stack(record: Record) -> Iterator[Target]:
    told = faster_from(record, "training")
    faster = any(told == f"from {row['L']:,} tokens on" for row in record["rows"] if row["L"] <= 1024)
    yield Target("training step, Mamba faster than the Transformer", "from 1,024 tokens on", told, faster)


def _of_stream(record: Record) -> Iterator[Target]:
    times = [1e3 * row["mamba"]["median"] for row in record["rows"]]
    fastest = max(1e3 * row["mamba"]["fastest"] for row in record["rows"])
    told = f"{max(times):.2f} ms (fastest round {fastest:.2f})"
    yield Target("one token, any position, median", "at most 1 ms", told, max(times) <= 1)
    yield Target(
        "the last position over the first", "the same", f"{times[-1] / times[0]:.2f}", times[-1] <= SAME * times[0]
    )
