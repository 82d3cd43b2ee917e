"""Tables of the benchmark of image models, as Markdown, made from its record alone."""

from typing import Any

from selectra.bench.scan_table import markdown
from selectra.bench.vision_training import WAYS

Record = dict[str, Any]


def vision_table(record: Record) -> str:
    """All parts that the record holds."""
    tables = {"training": training_table, "attention": attention_table, "growth": growth_table, "einfft": einfft_table}
    return "\n\n".join(table(record) for name, table in tables.items() if record.get(name, {}).get("rows"))


def training_table(record: Record) -> str:
    """Images a second of both sides, eager and compiled, and where the eager step's time goes."""
    part = record["training"]
    rows = []
    for row in part["rows"]:
        for way in WAYS:
            if way in row:
                wall, own = ratio_of(row[way]), f"{_ratio(row[way], 'device_ms'):.2f}"
                rates = [f"{_rate(row, row[way][side]):,.0f}" for side in ("ours", "theirs")]
                cells = [row["model"], row["peer"], str(row["batch"]), way, *rates, wall, own]
                rows.append([*cells, f"{row['target']:.1f}"])
    columns = ["model", "theirs", "batch", "way", "images/s: ours", "theirs", "ratio", "of the GPU's time", "wanted"]
    return f"{markdown(columns, rows, left=4)}\n\n{shares_table(record)}"


def shares_table(record: Record) -> str:
    """The GPU's milliseconds and their share of an eager step, for each kind of work."""
    found = [
        (row["model"], side, each)
        for row in record["training"]["rows"]
        for side, each in row.get("shares_ms", {}).items()
    ]
    if not found:
        return "No profile yet."
    kinds = [kind for kind in found[0][2] if kind != "all"]
    rows = [
        [
            model,
            side,
            *(f"{times[kind]:.1f} ({times[kind] / times['all']:.0%})" for kind in kinds),
            f"{times['all']:.1f}",
        ]
        for model, side, times in found
    ]
    return markdown(["model", "side", *kinds, "all, ms"], rows, left=2)


def attention_table(record: Record) -> str:
    """By image size: images a second and peak memory of every model, and Vim's against the two attentions."""
    rows = []
    for row in record["attention"]["rows"]:
        for way in ("eager", "compiled"):
            for kind in ("inference", "training"):
                found = row.get(way, {}).get(kind, {})
                ours = found.get("vim_tiny")
                if ours is None or "wall_ms" not in ours:
                    continue
                for name, each in found.items():
                    cells = [str(row["pixels"]), str(row["batch"]), way, kind, name]
                    if "wall_ms" not in each:
                        rows.append([*cells, each["problem"], *["-"] * 4])
                        continue
                    speed = each["wall_ms"]["median"] / ours["wall_ms"]["median"]
                    own = each["device_ms"]["median"] / ours["device_ms"]["median"]
                    memory = 1 - ours["peak_bytes"] / each["peak_bytes"]
                    cells += [f"{_rate(row, each):,.0f}", f"{each['peak_bytes'] / 2**20:,.0f}"]
                    rows.append(
                        [*cells, *([f"{speed:.2f}", f"{own:.2f}", f"{memory:.0%}"] if each is not ours else ["-"] * 3)]
                    )
    columns = ["px", "batch", "way", "", "model", "images/s", "peak, MiB", "Vim's speed over it", "by the GPU's time"]
    return markdown([*columns, "memory saved by Vim"], rows, left=5)


def growth_table(record: Record) -> str:
    """Slopes of time and memory over the upper half."""
    part = record["growth"]
    least, most = part["wanted slope"]
    rows = []
    for row in part["rows"]:
        if "slopes" in row:
            found = [row["slopes"][kind] for kind in ("forward_ms", "training_ms", "memory_bytes")]
            ends = f"{row['points'][0]['value']:,} to {row['points'][-1]['value']:,}"
            inside = "yes" if all(least <= each <= most for each in found) else "no"
            rows.append([row["mixer"], row["of"], row["against"], ends, *(f"{each:.2f}" for each in found), inside])
    columns = [
        "mixer",
        "mixes",
        "against",
        "from",
        "forward",
        "training",
        f"memory: {part['memory']}",
        f"all in {least} to {most}",
    ]
    return markdown(columns, rows, left=4)


def einfft_table(record: Record) -> str:
    """Milliseconds of every form of the products, and the others' over one batched product."""
    rows = []
    for row in record["einfft"]["rows"]:
        cells = [f"{row['tokens']:,}", str(row["channels"]), row["dtype"]]
        for kind in ("forward", "training"):
            ours, *others = (each["median"] for each in row[kind].values())
            cells += [f"{ours:.3f}", *(f"{other:.3f} ({other / ours:.2f})" for other in others)]
        rows.append(cells)
    names = list(record["einfft"]["rows"][0]["forward"])
    columns = [
        f"{kind}, ms: {name}" if not i else name for kind in ("forward", "training") for i, name in enumerate(names)
    ]
    return markdown(["tokens", "channels", "type", *columns], rows, left=3)


def ratio_of(way: Record) -> str:
    """How many times as fast ours is by the wall clock, and that it is one call's word where it is."""
    return f"{_ratio(way, 'wall_ms'):.2f}{' (one call)' if once(way) else ''}"


def once(way: Record) -> bool:
    """Whether a side was timed in one call alone: chance may have made it."""
    return min(each.get("rounds", 0) for each in way.values()) == 1


def _ratio(way: Record, clock: str) -> float:
    return way["theirs"][clock]["median"] / way["ours"][clock]["median"]


def _rate(row: Record, timing: Record) -> float:
    """Images a second by the wall clock."""
    return 1e3 * row["batch"] / timing["wall_ms"]["median"]
