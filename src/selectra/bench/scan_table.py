"""Tables of the GPU benchmark of the scan, as Markdown, made from its record alone."""

import statistics
from collections.abc import Sequence
from typing import Any

COLUMNS = (
    "shape", "B, D, L, N (groups)", "type", "fwd, ms", "floor", "share", "peer", "ratio",
    "bwd, ms", "floor", "share", "peer", "ratio", "peer; others, fwd / bwd",
)  # fmt: skip
WAYS = {"fwd": "forward", "bwd": "backward"}

Row = dict[str, Any]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table; the first `left` columns stand to the left, the others to the right."""
    marks = ["---" if i < left else "---:" for i in range(len(columns))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, marks, *rows))


def table(rows: Sequence[Row], header: bool = True) -> str:
    """One line a shape: our times and shares of the floor, the peer's times over ours, and who else was there."""
    text = markdown(COLUMNS, [_cells(row) for row in rows], left=3)
    return text if header else "\n".join(text.splitlines()[2:])


def _cells(row: Row) -> list[str]:
    groups = f" ({row['groups']})" if row["groups"] > 1 else ""
    cells = [row["tag"], f"{row['B']}, {row['D']}, {row['L']}, {row['N']}{groups}"]
    cells.append(f"{row['dtype']}{' z' if row['gate'] else ''}")
    for way in WAYS:
        ours, peer, floor = (row[f"{name}_{way}_ms"] for name in ("ours", "peer", "floor"))
        cells += [ms(ours), ms(floor), f"{floor / ours:.0%}"]
        cells += ["-", "-"] if peer is None else [ms(peer), f"{peer / ours:.1f}"]
    others = [f"{name} {ms(each['fwd_ms'])} / {ms(each['bwd_ms'])}" for name, each in row["others"].items()]
    return [*cells, "; ".join([row["peer"] or "none", *others])]


def ms(value: float) -> str:
    """Milliseconds with three digits after the point, or two from ten on."""
    return f"{value:.3f}" if value < 10 else f"{value:.2f}"


def ratios(rows: Sequence[Row], way: str) -> dict[str, float]:
    """Peer's time over ours, by tag, of the shapes that count."""
    counted = [row for row in rows if not row["extra"] and row[f"peer_{way}_ms"] is not None]
    return {row["tag"]: row[f"peer_{way}_ms"] / row[f"ours_{way}_ms"] for row in counted}


def summary(rows: Sequence[Row]) -> str:
    """Geometric means and the worst shape, in words."""
    lines = []
    for way, name in WAYS.items():
        found = ratios(rows, way)
        if found:
            worst = min(found, key=lambda tag: found[tag])
            mean = statistics.geometric_mean(found.values())
            lines.append(
                f"{name}: {mean:.2f} times the peer over {len(found)} shapes, least {found[worst]:.2f} ({worst})"
            )
    return "; ".join(lines) or "no peer to compare with"


def precision_table(record: dict[str, Any]) -> str:
    """Errors against float64 by output and gradient, ours beside each peer's: largest / root mean square."""
    rows = []
    for row in record["precision"]:
        for name in row["errors"]["y"]:
            found = [each[name] for each in row["errors"].values()]
            rows.append([row["dtype"], name, *(f"{e['largest']:.1e} / {e['rms']:.1e}" for e in found)])
    return markdown(["type", "kernel", *record["precision"][0]["errors"]], rows, left=2)


def memory_table(record: dict[str, Any]) -> str:
    """What a forward keeps for the backward over the inputs' bytes, and the peak of a training step."""
    rows = []
    for row in record["rows"]:
        for name, found in row["memory"].items():
            peak = found.get("peak_bytes")
            cells = [f"{found['kept_over_inputs']:.2f}", "-" if peak is None else f"{peak / 2**20:,.0f}"]
            if name in ("ours", row["peer"]):
                rows.append([row["tag"], name, *cells])
    return markdown(["shape", "kernel", "kept / inputs", "peak of a step, MiB"], rows, left=2)


def host_table(record: dict[str, Any]) -> str:
    """Host time of one call."""
    found = record["host_microseconds"]
    return markdown(["call", "host, microseconds"], [[name, f"{value:.1f}"] for name, value in found.items()])
