"""What image models should reach, and what records show of it."""

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from selectra.bench import vision_training
from selectra.bench.scan_table import markdown
from selectra.bench.vision_results import OURS, accuracies, joined, kernels_by_case, name_of
from selectra.bench.vision_table import once, ratio_of

Record = dict[str, Any]
NOT_YET = "no record yet"
Found = tuple[str, str]
# Points of accuracy, and per cent.
WITHIN, OVER = 1.0, 90.0
RESNET = "resnet18_cifar10"


def vision_target_table(*records: Record) -> str:
    """Target, wanted, measured, met; a target without a record says so."""
    cifar = [each for each in records if each.get("what") == "vision_cifar10" and _is_of(each, "_cifar10")]
    rows = [
        ["CIFAR-10-JPEG: the best of ours against ResNet-18", f"within {WITHIN:g} point", *_near_resnet(cifar)],
        ["CIFAR-10-JPEG: the best of ours", f"over {OVER:g} %", *_over(cifar)],
    ]
    trainings = kernels_by_case(records)
    for case in vision_training.CASES:
        batches = sorted({batch for model, batch in trainings if model == case.model}) or [case.batch]
        for batch in batches:
            row = trainings.get((case.model, batch), {})
            # Not every record knows steps as one graph.
            for way in (way for way in vision_training.WAYS if way in row or way in ("eager", "compiled")):
                title = f"training of `{case.model}`, {batch} images of 224 px, against others' kernels, {way}"
                found = _faster(row, way, case.target)
                rows.append([title, f"{case.target:g} times", *found])
    growth = [
        row
        for each in records
        if str(each.get("device")).startswith("cuda")
        for row in each.get("growth", {}).get("rows", ())
    ]
    rows.append(["mixers on a GPU: slopes of time and memory, upper half", "0.9 to 1.1", *_slopes(growth)])
    stable = [each for each in records if each.get("rows") and "begun, of all" in each]
    rows.append(["500 steps in bfloat16 and float16, every width", "all stable", *_stable(stable)])
    return markdown(["target", "wanted", "measured", "met"], rows, left=2)


def _is_of(record: Record, ending: str) -> bool:
    return any(row["recipe"].endswith(ending) for row in (*record["models"], *record["trainings"]))


def _best(records: Sequence[Record]) -> tuple[str, dict[str, float]]:
    """The best of ours, or nothing, and the means of all."""
    _, trainings = joined(records)
    means = {recipe: fmean(accuracies(rows).values()) for recipe, rows in trainings.items() if rows}
    ours = [recipe for recipe in means if recipe.rpartition("_")[0] in OURS]
    return max(ours, key=lambda each: means[each], default=""), means


def _near_resnet(records: Sequence[Record]) -> Found:
    best, means = _best(records)
    if not best or RESNET not in means:
        return NOT_YET, "-"
    gap = means[best] - means[RESNET]
    shown = f"{name_of(best)} {means[best]:.2f} %, ResNet-18 {means[RESNET]:.2f} %: {gap:+.2f}"
    return shown, _met(gap >= -WITHIN)


def _over(records: Sequence[Record]) -> Found:
    best, means = _best(records)
    return (f"{name_of(best)} {means[best]:.2f} %", _met(means[best] > OVER)) if best else (NOT_YET, "-")


def _faster(row: Record, way: str, wanted: float) -> Found:
    if way not in row:
        return NOT_YET, "-"
    ratio = row[way]["theirs"]["wall_ms"]["median"] / row[way]["ours"]["wall_ms"]["median"]
    return ratio_of(row[way]), "not shown" if once(row[way]) else _met(ratio >= wanted)


def _slopes(rows: Sequence[Record]) -> Found:
    found = [value for row in rows for value in row.get("slopes", {}).values()]
    if not found:
        return NOT_YET, "-"
    inside = [0.9 <= value <= 1.1 for value in found]
    return f"{sum(inside)} of {len(inside)} slopes inside; {min(found):.2f} to {max(found):.2f}", _met(all(inside))


def _stable(records: Sequence[Record]) -> Found:
    if not records:
        return NOT_YET, "-"
    record = max(records, key=lambda each: each["date"])
    stable, ran, wanted = sum(bool(row["stable"]) for row in record["rows"]), *record["begun, of all"]
    met = "not all run" if stable == ran < wanted else _met(stable == wanted)
    return f"{stable} of {ran} that ran; {wanted - ran} of {wanted} not run", met


_met: Callable[[bool], str] = {True: "yes", False: "**no**"}.__getitem__
