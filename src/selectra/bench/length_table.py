"""What the record of `selectra bench lengths` says: crossovers, neighbouring lengths, time per token; as Markdown."""

import math
from itertools import pairwise
from typing import Any

from selectra.bench.scan_table import markdown, ms

WAYS = {"fwd": "forward", "train": "training step"}
ATTENTION, OURS = "attention", "ours"
SHORT, LONG = 4096, 65536

Record = dict[str, Any]


def crossover(record: Record, way: str, name: str = OURS, attention: str = ATTENTION) -> float | None:
    """The length from which on the scans are faster than attention at every longer length measured.

    Between the last length where they are not and the next, by a straight line through the logarithms; the shortest
    length measured where they always are, None where they never come to be.
    """
    points = [
        (row["L"], row[f"{way}_ms"][name] / row[f"{way}_ms"][attention])
        for row in sorted(record["rows"], key=lambda row: row["L"])
        if name in row[f"{way}_ms"] and attention in row[f"{way}_ms"]
    ]
    slower = [i for i, (_, ratio) in enumerate(points) if ratio > 1]
    if not points or (slower and slower[-1] == len(points) - 1):
        return None
    if not slower:
        return float(points[0][0])
    (l1, r1), (l2, r2) = points[slower[-1]], points[slower[-1] + 1]
    share = math.log(r1) / (math.log(r1) - math.log(r2))
    return math.exp(math.log(l1) + share * (math.log(l2) - math.log(l1)))


def neighbours(record: Record, way: str, name: str = OURS) -> dict[int, float]:
    """For each length whose successor was measured too: the time of that over its own."""
    times = {row["L"]: row[f"{way}_ms"][name] for row in record["rows"] if name in row[f"{way}_ms"]}
    return {a: times[b] / times[a] for a, b in pairwise(sorted(times)) if b == a + 1}


def farthest(ratios: dict[int, float]) -> tuple[int, float]:
    """The length whose ratio lies farthest from one."""
    length = max(ratios, key=lambda key: abs(math.log(ratios[key])))
    return length, ratios[length]


def per_token(record: Record, way: str, name: str = OURS) -> float | None:
    """Time per token at the long length over that at the short one."""
    times = {row["L"]: row[f"{way}_ms"].get(name) for row in record["rows"]}
    short, long = times.get(SHORT), times.get(LONG)
    return None if short is None or long is None else (long / LONG) / (short / SHORT)


def findings(record: Record) -> dict[str, Any]:
    """Crossovers, neighbours and time per token, as numbers and in words."""
    found: dict[str, Any] = {"crossover": {}, "neighbours": {}, "per token": {}}
    words = []
    attentions = [name for name in _names(record) if name.startswith(ATTENTION)]
    scans = [name for name in _names(record) if not name.startswith(ATTENTION)]
    for way, called in WAYS.items():
        for name in scans:
            for attention in attentions:
                length = crossover(record, way, name, attention)
                found["crossover"].setdefault(way, {}).setdefault(attention, {})[name] = length
                said = "never faster here" if length is None else f"faster from {length:,.0f} tokens on"
                words.append(f"{called}, {name} against {attention}: {said}")
            ratios = neighbours(record, way, name)
            if ratios:
                length, ratio = farthest(ratios)
                found["neighbours"].setdefault(way, {})[name] = {str(key): value for key, value in ratios.items()}
                words.append(f"{called}, {name}: L + 1 takes {ratio:.3f} times L at most (L = {length})")
        found["per token"][way] = per_token(record, way)
        if found["per token"][way] is not None:
            words.append(f"{called}: a token at {LONG} takes {found['per token'][way]:.3f} times one at {SHORT}")
    return found | {"words": words}


def length_table(record: Record) -> str:
    """Times by length, forward / training step."""
    names = _names(record)
    rows = []
    for row in record["rows"]:
        cells = [f"{row['L']:,}"]
        for name in names:
            pair = [row[f"{way}_ms"].get(name) for way in WAYS]
            cells.append("-" if None in pair else " / ".join(ms(value) for value in pair if value is not None))
        rows.append(cells)
    return markdown(["L", *(f"{name}, ms" for name in names)], rows)


def _names(record: Record) -> list[str]:
    return list(dict.fromkeys(name for row in record["rows"] for name in row["fwd_ms"]))
