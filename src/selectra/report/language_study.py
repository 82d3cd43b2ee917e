"""Sections on trainings of language models, from the records of `results/language_train_gpu.py`.

Units: losses in nats a token, milliseconds of one step alone (a CUDA graph), GiB of its highest memory.
"""

from collections.abc import Iterator
from typing import Any

from selectra.report.markdown import Row, grid
from selectra.report.study_claims import interval

PARTS = {"val": "the half that chose the weights", "test": "the half that did not",
         "held_out": "both halves", "last": "both halves, last weights"}  # fmt: skip
OUTCOMES = {"below": "lower", "above": "**higher**", "level": "no difference that these seeds show",
            "too few seeds": "too few seeds"}  # fmt: skip


def losses(record: Row) -> Iterator[str]:
    """Families on one text: the verdict, their losses, what a step costs, and the targets."""
    yield f"**{record['verdict']['text']}**"
    speeds = {each["variant"]: each for each in record["speeds"]}
    lines = []
    for row in sorted(record["rows"], key=lambda row: row["val"]):
        speed, cells = speeds[row["variant"]], _cells(record, row)
        lines.append(
            [
                row["variant"], f"{row['cost']['parameters']:,}", _steps(cells), _rates(row, record),
                f"{row['val']:.4f}", f"{row['mean']:.4f}", _interval(record, row, 4), str(len(row["values"])),
                f"{speed['step_ms']:.2f}", f"{speed['tokens_per_s']:,.0f}", f"{speed['peak_gib']:.2f}",
            ]
        )  # fmt: skip
    head = ["model", "parameters", "steps", "learning rate", "validation loss", "test loss", "95 % interval", "seeds",
            "ms a step", "tokens a second", "peak, GiB"]  # fmt: skip
    yield grid(head, lines)
    yield from _targets(record)


def scores(record: Row) -> Iterator[str]:
    """Families by how much there is to remember: accuracies of each length, and how long all was trained."""
    yield f"**{record['verdict']['text']}**"
    bases = list(dict.fromkeys(row["base"] for row in record["rows"]))
    rows = {(row["variant"], row["base"]): row for row in record["rows"]}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in record["rows"]):
        found = [rows[variant, base] for base in bases]
        cells = [f"{row['cost']['parameters']:,}" for row in found[:1]]
        lines.append([variant, *cells, *(_share(record, row) for row in found)])
    yield "Mean accuracy of answers on examples never seen, with its 95 % interval over seeds where there are two:"
    yield grid(["model", "parameters", *bases], lines)
    yield " ".join(_budget(record))
    missing = [f"{row['variant']} on {row['base']}" for row in record["rows"] if row["missing"]]
    if missing:
        yield f"Not all seeds were trained within the time: {', '.join(missing)}."


def _budget(record: Row) -> Iterator[str]:
    """How long and how fast all were trained."""
    bases, tuning = record["study"]["bases"], record["study"]["tuning"]
    steps = sorted({cell["steps"] for cell in record["cells"] if "test" in cell})
    batches, rates = (sorted({base[part][name] for base in bases})
                      for part, name in (("train", "batch_size"), ("optim", "lr")))  # fmt: skip
    yield (
        f"Every model is trained for {_either(steps)} steps of {_either(batches)} examples; longer trainings may "
        "differ."
    )
    if tuning is None:
        yield f"All have the same learning rate, {_either(rates)}: another may suit a family better."
    else:
        tried = tuning["trials"] or len(next(iter(tuning["values"].values())))
        repeats = tuning.get("repeats", 1)
        seeds = "a seed that is" if repeats == 1 else f"{repeats} seeds that are"
        yield f"Each has the one of {tried} learning rates that is best on validation, with {seeds} not scored."


def _either(values: list[Any]) -> str:
    return " or ".join(f"{value:,}" for value in values)


def _cells(record: Row, row: Row) -> list[Row]:
    same = (row["base"], row["variant"])
    return [cell for cell in record["cells"] if (cell["base"], cell["variant"]) == same and "test" in cell]


def _steps(cells: list[Row]) -> str:
    return " or ".join(f"{n:,}" for n in sorted({cell["steps"] for cell in cells})) or "-"


def _rates(row: Row, record: Row) -> str:
    rate = row["differs"].get("optim.lr", record["study"]["bases"][0]["optim"]["lr"])
    return f"{rate:g} of {row['trials']}"


def _interval(record: Row, row: Row, digits: int) -> str:
    found = interval(record, row)
    return "-" if found is None else f"{found[0]:.{digits}f} to {found[1]:.{digits}f}"


def _share(record: Row, row: Row) -> str:
    if row["mean"] is None:
        return "-"
    spread = f" ({_interval(record, row, 3)})" if len(row["values"]) > 1 else " (1 seed)"
    return f"{row['mean']:.3f}{spread}"


def _targets(record: Row) -> Iterator[str]:
    """Each of ours beside the Transformer: what holds alone, what after correction, and why the verdict may differ."""
    targets = [each for each in record.get("targets", []) if "difference" in each]
    if not targets:
        return
    yield "Beside the Transformer, in pairs of seeds; losses of the held-out tenth of the text:"
    lines = []
    for each in targets:
        between = f"{each['low']:+.4f} to {each['high']:+.4f}"
        lines.append([each["model"], PARTS[each["on"]], f"{each['difference']:+.4f}", between, f"{each['p']:.4f}",
                      f"{each['p_adjusted']:.4f}", _after_correction(each, record["error_rate"])])  # fmt: skip
    yield grid(["model", "loss of", "difference", "95 % interval, alone", "p, alone", "p, corrected",
                "after correction"], lines)  # fmt: skip
    yield (
        f"Corrected by Holm's method for the {len(targets)} comparisons of this table; intervals are each comparison's "
        f"own. {_beside_the_verdict(record, targets[0]['rival'])}"
    ).rstrip()


def _after_correction(each: Row, error_rate: float) -> str:
    lost = each["outcome"] in ("below", "above") and each["p_adjusted"] >= error_rate
    return f"no difference; {OUTCOMES[each['outcome']]} alone" if lost else OUTCOMES[each["outcome"]]


def _beside_the_verdict(record: Row, rival: str) -> str:
    """What the verdict makes of the same rival, which it corrects for its own comparisons."""
    found = next((each for each in record["overall"] if each["rival"] == rival), None)
    if found is None:
        return ""
    outcome = {"better": "better", "worse": "worse", "level": "no difference"}[found["outcome"]]
    return (
        f"The verdict has another group, {record['subject']} against {len(record['overall'])} rivals by logarithms of "
        f"the test loss: there {rival} has p {found['p']:.4f} alone and {found['p_adjusted']:.4f} corrected, "
        f"which is {outcome}."
    )
