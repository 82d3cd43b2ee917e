"""Tables of the benchmarks that run on a CPU, as Markdown, made from their records alone."""

from typing import Any

from selectra.bench.scan_table import markdown

Record = dict[str, Any]
NAMES = ("mamba", "transformer")
KINDS = ("forward", "training")
PRODUCTS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def stack_table(record: Record) -> str:
    """By length: both stacks' times and the Transformer's over the Mamba blocks', and where the second is longer."""
    rows = []
    for row in record["rows"]:
        cells = [f"{row['L']:,}"]
        for kind in KINDS:
            cells += [f"{1e3 * row[kind][name]['median']:.1f}" for name in NAMES] + [f"{row[kind]['ratio']:.2f}"]
        rows.append(cells)
    columns = ["L", "forward, ms: Mamba", "Transformer", "ratio", "training, ms: Mamba", "Transformer", "ratio"]
    counts = " and ".join(f"{record['parameters'][name] / 1e6:.2f}" for name in NAMES)
    told = "; ".join(f"{kind}, Mamba is faster {faster_from(record, kind)}" for kind in KINDS)
    return f"{markdown(columns, rows)}\n\nParameters, millions: {counts}. {told[0].upper()}{told[1:]}."


def faster_from(record: Record, kind: str) -> str:
    """The least measured length from which on the ratio stays above 1, in words."""
    found = None
    for row in reversed(record["rows"]):
        if row[kind]["ratio"] <= 1:
            break
        found = row["L"]
    return "at no length" if found is None else f"from {found:,} tokens on"


def stream_table(record: Record) -> str:
    """Milliseconds of one token by its position: median, and fastest."""
    rows = []
    for row in record["rows"]:
        times = (f"{1e3 * row[name]['median']:.2f} ({1e3 * row[name]['fastest']:.2f})" for name in NAMES)
        rows.append([f"{row['position']:,}", *times, f"{row['ratio']:.2f}"])
    return markdown(["token", "Mamba, ms (fastest)", "Transformer, ms (fastest)", "ratio"], rows)


def cpu_parts_table(record: Record) -> str:
    """One line a part: its share of a forward and of a training step, at each size, and the milliseconds of all."""
    sizes = [f"d {row['d_model']}, L {row['length']:,}" for row in record["rows"]]
    parts = [part for part in record["rows"][0]["forward"]["parts_ms"] if part != "all"]
    rows = [[part, *(_shares(row, (part,)) for row in record["rows"])] for part in parts]
    rows.append(["**products**", *(_shares(row, PRODUCTS) for row in record["rows"])])
    times = (" / ".join(f"{1e3 * row[kind]['timing']['median']:.2f}" for kind in KINDS) for row in record["rows"])
    rows.append(["all, ms", *times])
    return markdown(["part", *sizes], rows)


def _shares(row: Record, parts: tuple[str, ...]) -> str:
    found = (sum(row[kind]["parts_ms"][part] for part in parts) / row[kind]["parts_ms"]["all"] for kind in KINDS)
    return " / ".join(f"{share:.0%}" for share in found)


def cpu_scan_table(record: Record) -> str:
    """Milliseconds of forward and training step of every contender at each shape, and ours under the best other's."""
    shapes = {tuple(row["shape"].values()): None for row in record["rows"]}
    found = {(tuple(row["shape"].values()), row["name"]): row for row in record["rows"]}
    names = dict.fromkeys(row["name"] for row in record["rows"])
    rows = []
    for name in names:
        cells = (found.get((shape, name)) for shape in shapes)
        rows.append([f"`{name}`" if " " not in name else name, *(_pair(row) for row in cells)])
    others = [name for name in names if name in ("mambapy pscan", "transformers loop")]
    if others:
        rows.append(["best other / `cpu`", *(_against(found, shape, others) for shape in shapes)])
    return markdown(["forward / training step, ms", *(str(shape) for shape in shapes)], rows)


def _pair(row: Record | None) -> str:
    return "not run" if row is None else " / ".join(f"{1e3 * row[kind]['median']:,.1f}" for kind in KINDS)


def _against(found: dict[Any, Record], shape: Any, others: list[str]) -> str:
    cells = []
    for kind in KINDS:
        best = min(found[shape, name][kind]["median"] for name in others if (shape, name) in found)
        cells.append(f"{best / found[shape, 'cpu'][kind]['median']:.0f}")
    return " / ".join(cells)


def conv_table(record: Record) -> str:
    """One line a shape: our milliseconds of the convolution, and how much longer PyTorch's faster layout takes."""
    rows = []
    for row in record["rows"]:
        cells = [str(tuple(row["shape (b, l, d)"]))]
        for kind in KINDS:
            times = row[f"{kind}, ms"]
            best = min(time for name, time in times.items() if name != "ours")
            cells += [f"{times['ours']:.2f}", f"{best:.2f}", f"{row[f'{kind}, ratio']:.2f}"]
        rows.append(cells)
    columns = ["shape (b, l, d)"]
    for kind in KINDS:
        columns += [f"{kind}, ms", "PyTorch", "ratio"]
    return markdown(columns, rows)


def threads_table(record: Record) -> str:
    """One line a shape: milliseconds on one thread and on several, and the median of the calls' ratios."""
    rows = []
    for row in record["rows"]:
        cells = [str(tuple(row["shape (b, d, l, n)"]))]
        for kind in ("forward", "backward"):
            one, several = (time for name, time in row[kind].items() if name.endswith(", ms"))
            cells += [f"{one:.2f}", f"{several:.2f}", f"{row[kind]['ratio']:.2f}"]
        rows.append(cells)
    several = next(name for name in record["rows"][0]["forward"] if name.endswith("threads, ms")).removesuffix(", ms")
    columns = ["shape (b, d, l, n)"]
    for kind in ("forward", "backward"):
        columns += [f"{kind}, ms", several, "ratio"]
    return markdown(columns, rows)
