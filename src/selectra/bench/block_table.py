"""Tables of the benchmarks of blocks and models, as Markdown, made from their records alone."""

from typing import Any

from selectra.bench.scan_table import markdown

Record = dict[str, Any]


def block_table(record: Record) -> str:
    """By length: both blocks' times, and the Transformer's over the Mamba blocks'."""
    rows = []
    for length in dict.fromkeys(row["L"] for row in record["rows"]):
        found = {row["name"]: row for row in record["rows"] if row["L"] == length}
        cells = [f"{length:,}"]
        for kind in ("forward", "training"):
            mamba, other = (1e3 * found[name][kind]["median"] for name in ("mamba", "transformer"))
            cells += [f"{mamba:.2f}", f"{other:.2f}", f"{other / mamba:.2f}"]
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


def _mebibytes(row: Record) -> str:
    """The peak of a training step; a dash where it was not measured."""
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes']['training'] / 2**20:,.0f}"
