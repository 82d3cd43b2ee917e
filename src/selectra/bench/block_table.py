"""Tables of the benchmarks of blocks and models, as Markdown, made from their records alone."""

from typing import Any

from selectra.bench.scan_table import markdown

Record = dict[str, Any]
WAYS = ("compiled", "graph")


def block_table(record: Record) -> str:
    """By length: both blocks' times, and the Transformer's over the Mamba blocks'."""
    rows = []
    for length in dict.fromkeys(row["L"] for row in record["rows"]):
        found = {row["name"]: row for row in record["rows"] if row["L"] == length}
        cells = [f"{length:,}"]
        for kind in ("forward", "training"):
            mamba, other = (found[name][kind] for name in ("mamba", "transformer"))
            cells += [_milliseconds(mamba), _milliseconds(other), f"{other['median'] / mamba['median']:.2f}"]
        cells += [_mebibytes(found[name]) for name in ("mamba", "transformer")]
        rows.append(cells)
    columns = ["L", "forward, ms: Mamba", "Transformer", "ratio", "training, ms: Mamba", "Transformer", "ratio"]
    counts = " and ".join(f"{row['parameters'] / 1e6:.2f}" for row in record["rows"][:2])
    table = markdown([*columns, "peak, MiB: Mamba", "Transformer"], rows)
    return f"{table}\n\nParameters, millions: {counts}."


def model_table(record: Record) -> str:
    """One line a model: parameters, samples a second, peak memory."""
    rows = []
    for row in record["rows"]:
        speed = [f"{row['input'][0] / row[kind]['median']:,.0f}" for kind in ("forward", "training")]
        rows.append([row["name"], f"{row['parameters']:,}", *speed, _mebibytes(row)])
    return markdown(["model", "parameters", "forward, samples/s", "training, samples/s", "peak, MiB"], rows)


def ways_table(record: Record) -> str:
    """By length: the blocks eager, compiled, and replayed from a CUDA graph; the device's idle time shows in these."""
    rows = []
    for row in record["rows"]:
        if "ways" in row:
            ways = row["ways"]
            cells = [_milliseconds(row["forward"]), *(_milliseconds(ways["forward"].get(w)) for w in WAYS)]
            cells += [_milliseconds(row["training"]), *(_milliseconds(ways["training"].get(w)) for w in WAYS)]
            rows.append([f"{row['L']:,}", row["name"], *cells])
    columns = ["L", "block", "forward, ms: eager", *WAYS, "training, ms: eager", *WAYS]
    return markdown(columns, rows) if rows else "Not measured in this record."


def _milliseconds(timing: dict[str, float] | None) -> str:
    """With a mark where it is the time of one call, which chance may have made."""
    if timing is None:
        return "-"
    return f"{1e3 * timing['median']:.2f}{' (one call)' if timing.get('rounds') == 1 else ''}"


def parts_table(record: Record) -> str:
    """One line a part: the GPU's milliseconds in a forward and in a training step, at each size."""
    named = [(f"{row['tag']}, {row['backward']}", row) for row in record["rows"]]
    kinds = ("forward", "training")
    parts = dict.fromkeys(part for _, row in named for kind in kinds for part in row[kind]["parts_ms"])
    rows = [
        [part, *(" / ".join(f"{row[kind]['parts_ms'][part]:.3f}" for kind in kinds) for _, row in named)]
        for part in parts
    ]
    rows.append(
        ["all, by events", *(" / ".join(f"{row[kind]['ms']['median']:.3f}" for kind in kinds) for _, row in named)]
    )
    return markdown(["part", *(name for name, _ in named)], rows)


def norms_table(record: Record) -> str:
    """One line a size: milliseconds of forward and training step, and the floor of its bytes."""
    rows = []
    for row in record["norms"]:
        names = list(row["forward"])
        times = (" / ".join(f"{row[kind][name]['median']:.3f}" for kind in ("forward", "training")) for name in names)
        floor = " / ".join(f"{row['floor'][kind]:.3f}" for kind in ("forward", "training"))
        rows.append([f"{row['rows']:,} x {row['width']:,}", row["kind"], row["stream"], *times, floor])
    names = list(record["norms"][0]["forward"]) if record["norms"] else []
    return markdown(["size", "norm", "stream", *names, "floor"], rows)


def _mebibytes(row: Record) -> str:
    """The peak of a training step; a dash where it was not measured."""
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes']['training'] / 2**20:,.0f}"
