"""The page of a comparison of forecasters, in Markdown, from its exported records; nothing is computed anew."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from selectra.errors import DataError
from selectra.report.explained import misses, responsible
from selectra.report.markdown import DATA, NAMES, Row, error, grid
from selectra.report.read import whole

# Of tables (a) and (b).
N_CELLS = 24
TITLES = {
    "a": "Table (a): look-back 96, every model",
    "b": "Table (b): look-back 96, the main models",
    "c": "Table (c): look-back chosen on validation",
}


def read_records(path: Path) -> dict[str, Any]:
    """The exported records.

    Raises:
        DataError: The file is absent, damaged or of something else.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as exported records: {error}.") from error
    if not isinstance(content, dict) or content.get("what") != "selectra compare forecasting":
        raise DataError(f"'{path}' holds no comparison of forecasters; make one with `selectra compare forecasting`.")
    return content


def write_page(records: Path, out: Path) -> None:
    """Write the page beside which nothing is needed."""
    text = page(read_records(records), records.name)
    with whole(out) as partial:
        partial.write_text(text, encoding="utf-8")


def page(content: dict[str, Any], source: str) -> str:
    """The whole page; `source` is the name of the file of records."""
    parts = [
        "# Forecasting: Mamba models against strong and simple rivals",
        headline(content["verdict"]),
        responsible(content),
        _method(content, source),
        _pairs(content["verdict"]),
        _wins(content),
        _targets(content["targets"]),
    ]
    for name in ("a", "b"):
        parts += _table(name, content["tables"][name])
    parts += [*_longer(content["tables"]["c"]), misses(content)]
    parts += [_ablation(content["ablation"]), _orders(content["orders"]), _costs(content["costs"]), _cells(content)]
    return "\n\n".join(part for part in parts if part) + "\n"


def signed(value: float) -> str:
    """A difference."""
    return f"{value:+.4f}"


def headline(verdict: Row) -> str:
    """The first line: does a Mamba model win?"""
    if verdict["mamba"] is None:
        return (
            f"**No verdict: only {verdict['cells']} cells of (a) and (b) hold a Mamba model and all its rivals; "
            "twelve are needed.**"
        )
    name, pairs = NAMES[verdict["mamba"]], verdict["pairs"]["one"]
    beaten = [rival for rival, each in pairs.items() if each["difference"] < 0]
    surely = [rival for rival, each in pairs.items() if each["high"] < 0]
    lost = [rival for rival in pairs if rival not in beaten]
    over = f"over the {verdict['cells']} cells of (a) and (b)"
    over += " that all ran" if verdict["cells"] < N_CELLS else ""
    if verdict["left_out"]:
        over += f" (left out, since not run in all of these: {_list(verdict['left_out'])})"
    if not lost:
        doubt = [rival for rival in pairs if rival not in surely]
        text = f"Yes: the Mamba model chosen on validation, {name}, has a lower mean MSE than {_list(pairs)} {over}"
        text += f"; the difference from {_list(doubt)} is within chance." if doubt else ", each beyond chance."
        return f"**{text}**"
    text = f"No: the Mamba model chosen on validation, {name}, does not have the lowest mean MSE {over}: "
    text += f"{_list(lost)} {'is' if len(lost) == 1 else 'are'} as good or better"
    text += f", and {_list(beaten)} {'is' if len(beaten) == 1 else 'are'} worse." if beaten else "."
    return f"**{text}**"


def _list(names: Iterable[str]) -> str:
    *most, last = [NAMES[name] for name in names]
    return f"{', '.join(most)} and {last}" if most else last


def _method(content: dict[str, Any], source: str) -> str:
    budget, rates = content["budget"], content["rates"]
    places = sorted({cell["device"] for cell in content["cells"] if "device" in cell})
    packed = max((cell.get("packed", 1) for cell in content["cells"]), default=1)
    versions = sorted({env["versions"]["torch"] for env in content["environments"] if "versions" in env})
    lines = [
        f"Every number is computed from [`results/{source}`](../../results/{source}), which holds every training.",
        "",
        "- Every window of the test part counts, whatever the batch. Errors are of values standardised by the training "
        "part. ETT is cut at 12, 16 and 20 months, the others at 70 and 80 %. Hyper-parameters and kept weights are "
        "chosen on validation alone.",
        f"- The same budget for every model: {budget['steps']} steps of {budget['batch_size']} windows, AdamW, a "
        f"warm-up and a cosine, {budget['evaluations']} evaluations on validation of which the best one's weights are "
        "kept. The learning rate alone is chosen, for each model and data set, among "
        f"{', '.join(map(str, rates['tried']))} at horizon 96 on validation: as many trials for every model. "
        "Sizes are the published ones where there are any.",
        *_budgets(content["budgets"]),
        f"- Run on {' and '.join(places)}, PyTorch {', '.join(versions)}. Up to {packed} trainings ran side by side on "
        "the GPU: *seconds* are those of one training among them, evaluations included; the time of a step alone is "
        "in the table of costs.",
        "- *Published* are others' numbers, copied, with the look-back they were made at and the fault that is known "
        "of them. Those at another look-back than ours are no comparison.",
    ]
    return "\n".join(lines)


def _budgets(tried: list[Row]) -> list[str]:
    if not tried:
        return []
    shown = ", ".join(f"{each['steps']} steps {each['val_mse']:.4f}" for each in tried)
    return [
        "- The budget was chosen on ETTh1's validation part, horizon 96, as the shortest within 1 % of the lowest "
        f"mean MSE of {tried[0]['models']} models: {shown}."
    ]


def _pairs(verdict: Row) -> str:
    if verdict["mamba"] is None:
        return ""
    kinds = {
        "one": f"One model for all: {NAMES[verdict['mamba']]}",
        "each": "One for each data set: "
        + ", ".join(f"{NAMES[model]} on {DATA[data]}" for data, model in verdict["by_data"].items()),
    }
    parts = ["## Does Mamba win?"]
    for kind, title in kinds.items():
        rows = [
            (NAMES[rival], f"{each['mean']:.4f}", f"{each['rival']:.4f}", signed(each["difference"]),
             f"{signed(each['low'])} to {signed(each['high'])}", f"{each['ratio']:.3f}",
             f"{each['wins']} of {each['pairs']}")
            for rival, each in verdict["pairs"][kind].items()
        ]  # fmt: skip
        head = ["rival", "Mamba's mean MSE", "rival's", "difference", "95 % interval", "ratio", "cells won"]
        parts += [f"{title} (chosen on validation).", grid(head, rows)]
    means = sorted(verdict["means"].items(), key=lambda item: item[1])
    parts.append(
        "Paired bootstrap over cells; below zero Mamba is better. The ratio is the geometric mean over cells, in which "
        "cells of large errors (Exchange at 720) weigh no more than others. Mean MSE of every model that ran in all of "
        "these cells: " + ", ".join(f"{NAMES[model]} {value:.4f}" for model, value in means) + "."
    )
    return "\n\n".join(parts)


def _wins(content: dict[str, Any]) -> str:
    lines = []
    for name in ("a", "b", "c"):
        won = Counter(each["model"] for each in content["tables"][name]["winners"])
        if won:
            counted = ", ".join(f"{NAMES[model]} {count}" for model, count in won.most_common())
            lines.append(f"- ({name}) cells won: {counted}.")
    return "\n".join(lines)


def _targets(found: Row) -> str:
    lines = []
    if found["linear"]["cells"]:
        each = found["linear"]
        lines.append(
            f"- The closed-form linear model against the same computed apart: {each['within']} of {each['cells']} "
            f"cells within 0.002 (of numbers with three digits); the largest difference is {each['largest']:.4f}."
        )
    if found["tsm2"]["cells"]:
        each = found["tsm2"]
        lines.append(
            f"- TSM2 at look-back 512, our reading: {each['within']} of {each['cells']} cells at most 3 % above the "
            f"paper's MSE; {each['below_linear']} of {each['of']} below the closed-form linear model."
        )
    return "\n".join(lines)


def _table(name: str, table: Row) -> list[str]:
    """For each data set a grid of models and horizons; the lowest MSE of each column in bold; then what is missing."""
    parts = [f"## {TITLES[name]}"]
    n_seeds = table["seeds"]
    parts.append(f"MSE / MAE, {'mean of ' + str(n_seeds) + ' seeds' if n_seeds > 1 else 'one seed'}; **lowest MSE**.")
    for data in dict.fromkeys(row["data"] for row in table["rows"]):
        mine = [row for row in table["rows"] if row["data"] == data]
        horizons = sorted({row["horizon"] for row in mine})
        best = {each["horizon"]: each["model"] for each in table["winners"] if each["data"] == data}
        rows = []
        for model in table["models"]:
            found = {row["horizon"]: row for row in mine if row["model"] == model}
            shown = []
            for horizon in horizons:
                text = f"{found[horizon]['mse']:.3f} / {found[horizon]['mae']:.3f}" if horizon in found else "-"
                shown.append(f"**{text}**" if best[horizon] == model else text)
            if found:
                rows.append((NAMES[model], *shown))
        parts += [f"### {DATA[data]}", grid([f"{DATA[data]}, horizon", *map(str, horizons)], rows)]
    parts.append(_missing(table["missing"]))
    return parts


def _missing(missing: list[Row]) -> str:
    """Every cell that is not there, those of one reason in one line."""
    if not missing:
        return "Every cell of this table was run."
    groups: dict[Any, list[str]] = {}
    for each in missing:
        key = (each["model"], each["data"], each["lookback"], each["seeds"], each["of"], each["reason"])
        groups.setdefault(key, []).append(str(each["horizon"]))
    lines = [
        f"- {NAMES[model]} on {DATA[data]}, look-back {lookback}, horizon {', '.join(horizons)}: "
        f"{seeds} of {wanted} seeds, {reason}"
        for (model, data, lookback, seeds, wanted, reason), horizons in groups.items()
    ]
    return f"Missing ({len(missing)} cells):\n\n" + "\n".join(lines)


def _longer(table: Row) -> list[str]:
    parts = [f"## {TITLES['c']}"]
    if table["chosen"]:
        parts.append(
            "One seed. For each model the look-back, of 96, 336 and 512, with the lowest validation MSE: test MSE "
            "(look-back); **lowest MSE**. Only where all three were run."
        )
    best = {(each["data"], each["horizon"]): each["model"] for each in table["winners"]}
    for data in dict.fromkeys(each["data"] for each in table["chosen"]):
        mine = [each for each in table["chosen"] if each["data"] == data]
        horizons = sorted({each["horizon"] for each in mine})
        rows = []
        for model in dict.fromkeys(each["model"] for each in mine):
            found = {each["horizon"]: each for each in mine if each["model"] == model}
            texts = {n: f"{each['mse']:.3f} ({each['lookback']})" for n, each in found.items()}
            shown = [f"**{texts[n]}**" if best.get((data, n)) == model else texts.get(n, "-") for n in horizons]
            rows.append((NAMES[model], *shown))
        parts.append(grid([f"{DATA[data]}, horizon", *map(str, horizons)], rows))
    parts.append(_missing(table["missing"]))
    return parts


def _ablation(found: list[Row]) -> str:
    if not found:
        return ""
    variants = [name for name in found[0]["mse"] if name != "whole"]
    rows = [
        (
            f"{NAMES[each['model']]}, {DATA[each['data']]} {each['horizon']}",
            error(each["mse"]["whole"]),
            *(signed(each["mse"][name] - each["mse"]["whole"]) for name in variants),
        )
        for each in found
    ]
    text = (
        "## What a part is worth\n\nTest MSE of the whole model, and how it changes when one part is left out (above "
        "zero: the part helps). One seed, the same learning rate.\n\n"
    )
    return text + grid(["model and cell", "whole", *variants], rows)


def _orders(orders: list[Row]) -> str:
    if not orders:
        return ""
    rows = [
        (f"{DATA[each['data']]}, {each['horizon']}", NAMES[each["model"]], str(each["count"]), error(each["low"]),
         error(each["high"]), f"{each['spread']:.4f}")
        for each in orders
    ]  # fmt: skip
    text = (
        "## The order of the series\n\nModels that scan across the series depend on the order in which these stand in "
        "the file (TimeMachine here mixing the series). Test MSE over orders, one seed; all other models give the same "
        "forecast in any order.\n\n"
    )
    return text + grid(["cell", "model", "orders", "lowest", "highest", "standard deviation"], rows)


def _costs(costs: list[Row]) -> str:
    if not costs:
        return ""
    first = next(each for each in costs if "peak_mb" in each)
    lookbacks = sorted({each["lookback"] for each in costs})
    parts = [
        "## Costs against the look-back",
        f"One training step alone on the GPU, {DATA[first['data']]}, horizon {first['horizon']}, "
        f"{first['batch_size']} windows: peak memory in MiB (weights, optimizer and batch included) / milliseconds.",
    ]
    rows = []
    for model in dict.fromkeys(each["model"] for each in costs):
        found = {each["lookback"]: each for each in costs if each["model"] == model}
        shown = [
            f"{found[n]['peak_mb']:.0f} / {found[n]['step_ms']:.2f}" if "peak_mb" in found.get(n, {}) else "-"
            for n in lookbacks
        ]
        rows.append((NAMES[model], *shown))
    return "\n\n".join([*parts, grid(["model, look-back", *map(str, lookbacks)], rows)])


def _cells(content: dict[str, Any]) -> str:
    head = [
        "cell", "look-back", "model", "MSE", "± seeds", "MAE", "published MSE", "difference", "rate", "parameters",
        "seconds", "± orders",
    ]  # fmt: skip
    rows, seen, notes = [], set(), {}
    for name in ("a", "b", "c"):
        for row in content["tables"][name]["rows"]:
            key = (row["data"], row["lookback"], row["horizon"], row["model"])
            if key not in seen:
                seen.add(key)
                rows.append(_cell(row, notes))
    numbered = [f"{number}. {text}" for text, number in notes.items()]
    sources = "\n\nSources and faults of published numbers:\n\n" + "\n".join(numbered) if numbered else ""
    return "## Every cell\n\n" + grid(head, rows) + sources


def _cell(row: Row, notes: dict[str, int]) -> tuple[str, ...]:
    published, orders = row["published"], row["orders"]
    told = difference = "-"
    if published is not None:
        note = published["source"] + (f"; {published['fault']}" if published["fault"] else "")
        number = notes.setdefault(note, len(notes) + 1)
        same = published["lookback"] == row["lookback"]
        told = f"{published['mse']:.3f}{'' if same else ' at ' + str(published['lookback'])} [{number}]"
        difference = f"{100 * (row['mse'] / published['mse'] - 1):+.1f} %" if same else "-"
    return (
        f"{DATA[row['data']]} {row['horizon']}", str(row["lookback"]), NAMES[row["model"]], error(row["mse"]),
        error(row["mse_spread"]), error(row["mae"]), told, difference, "-" if row["lr"] is None else f"{row['lr']:g}",
        f"{row['parameters']:,}", f"{row['seconds']:.1f}",
        f"{orders['spread']:.4f}" if orders else "-",
    )  # fmt: skip
