"""Why a comparison of forecasters came out as it did, in sentences whose numbers are the records'."""

from statistics import fmean
from typing import Any

from selectra.report.markdown import DATA, NAMES, Row, error, grid

# A part is worth, or costs, something from here on: a relative change of the MSE.
NOTABLE = 0.002
PARTS = {
    "window_norm=none": "the normalisation of windows",
    "without=time": "the time mixer",
    "without=channels": "the channel mixer",
    "without=averages": "the averaging",
}
LONG, ABOVE = 512, 1.03


def responsible(content: dict[str, Any]) -> str:
    """By the ablation, which part of the Mamba model keeps it from the lowest mean; nothing where none was missed."""
    verdict, found = content["verdict"], content["ablation"]
    pairs = verdict["pairs"]["one"] if verdict["mamba"] is not None else {}
    if not found or all(each["difference"] < 0 for each in pairs.values()):
        return ""
    changes = {
        name: [each["mse"][name] / each["mse"]["whole"] - 1 for each in found]
        for name in PARTS
        if name in found[0]["mse"]
    }
    told = [
        f"without {PARTS[name]} the MSE changes by {100 * fmean(each):+.1f} % on average, and is lower on "
        f"{sum(change < 0 for change in each)} of {len(each)} cells"
        for name, each in changes.items()
    ]
    model = NAMES[found[0]["model"]]
    idle = [PARTS[name] for name, each in changes.items() if abs(fmean(each)) < NOTABLE]
    harm = {name: _harmed(found, name) for name in changes}
    worst = min(harm, key=lambda name: sum(change for _, change in harm[name]))
    text = f"By ablation of {model} (look-back 96, {len(found)} cells): {'; '.join(told)}."
    if harm[worst]:
        where = ", ".join(f"{DATA[data]} ({100 * change:+.1f} %)" for data, change in harm[worst])
        text += f" What costs most is {PARTS[worst]}: left out, the error falls on {where}."
    if idle:
        text += f" What neither helps nor costs more than {100 * NOTABLE:g} % on average: {', '.join(idle)}."
    return text


def _harmed(found: list[Row], name: str) -> list[tuple[str, float]]:
    """The data sets on which the model is better without a part, each with the mean relative change."""
    changes: dict[str, list[float]] = {}
    for each in found:
        changes.setdefault(each["data"], []).append(each["mse"][name] / each["mse"]["whole"] - 1)
    return [(data, fmean(each)) for data, each in changes.items() if fmean(each) < -NOTABLE]


def misses(content: dict[str, Any]) -> str:
    """Where TSM2 at look-back 512 is above its paper by more than 3 %: what the same trainings say about it."""
    cells = {
        (cell["data"], cell["horizon"], cell["model"]): cell
        for cell in content["cells"]
        if cell["lookback"] == LONG and "test" in cell and "args" not in cell and not cell["order"]
    }
    rows = {
        (row["data"], row["horizon"]): row["published"]["mse"]
        for row in _rows(content)
        if row["model"] == "tsm2" and row["lookback"] == LONG and row["published"]["lookback"] == LONG
    }
    every = [
        (data, horizon, paper, cells[data, horizon, "tsm2"])
        for (data, horizon), paper in rows.items()
        if (data, horizon, "tsm2") in cells
    ]
    missed = [each for each in every if each[3]["test"]["mse"] > ABOVE * each[2]]
    if not missed:
        return ""
    lines, both = [], []
    for data, horizon, paper, ours in missed:
        linear = cells.get((data, horizon, "linear"))
        both += [] if linear is None else [(paper, ours, linear)]
        lines.append((
            f"{DATA[data]} {horizon}", error(paper), _above(ours, paper), _above(linear, paper),
            _above(cells.get((data, horizon, "patchtst")), paper), error(ours["val"]["mse"]),
            error(linear and linear["val"]["mse"]), str(ours["best_step"]),
        ))  # fmt: skip
    head = ["cell", "paper", "TSM2", "linear (closed form)", "PatchTST", "TSM2, validation", "linear, validation",
            "TSM2's best step"]  # fmt: skip
    return "\n\n".join([
        "## Where TSM2 is above its paper",
        f"Look-back {LONG}, the cells more than {100 * (ABOVE - 1):.0f} % above the paper's MSE; test MSE (above the "
        f"paper, per cent), of {content['budget']['steps']} steps the one whose weights were kept.",
        grid(head, lines),
        _explained(every, missed, both, content["budget"]),
    ])  # fmt: skip


def _rows(content: dict[str, Any]) -> list[Row]:
    """The rows of all tables that have a published number."""
    return [row for table in content["tables"].values() for row in table["rows"] if row["published"] is not None]


def _above(cell: Row | None, paper: float) -> str:
    mse = None if cell is None else cell["test"]["mse"]
    return "-" if mse is None else f"{error(mse)} ({100 * (mse / paper - 1):+.1f})"


def _explained(every: list[Any], missed: list[Any], both: list[Any], budget: Row) -> str:
    early = budget["steps"] // budget["evaluations"] * 2
    soon = sum(ours["best_step"] <= early for *_, ours in missed)
    hits = [each for each in every if each not in missed]
    others = sum(ours["best_step"] <= early for *_, ours in hits)
    lines = [
        f"- {soon} of these {len(missed)} trainings are best on validation at one of their first two evaluations "
        f"(step {early} or before), and get worse from there: the model learns the training part by heart. Of the "
        f"{len(hits)} other cells {others} {'is' if others == 1 else 'are'} like that."
    ]
    if both:
        worse = sum(ours["val"]["mse"] > linear["val"]["mse"] for _, ours, linear in both)
        drift = sum(
            ours["val"]["mse"] <= linear["val"]["mse"] and ours["test"]["mse"] > linear["test"]["mse"]
            for _, ours, linear in both
        )
        far = sum(linear["test"]["mse"] > ABOVE * paper for paper, _, linear in both)
        lines += [
            f"- On {worse} of {len(both)} the closed-form linear map on the same windows has the lower error on "
            "validation already: what is missing is not a better choice on validation, but a model that fits the "
            f"training part less. On {drift} TSM2 is better on validation and worse on test: there the two parts ask "
            "for different models.",
            f"- The closed-form linear map itself is more than {100 * (ABOVE - 1):.0f} % above the paper on {far} of "
            f"{len(both)}: there the paper's number is out of a linear map's reach.",
        ]
    return "\n".join(lines)
