"""From a store to the records that are committed and read by the report: every cell, and what follows from them."""

import csv
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from selectra.compare.command import BUDGET, COSTS
from selectra.compare.forecasting import (
    BUDGET_TRIALS,
    MAMBAS,
    RATES,
    SCANNING,
    TABLES,
    WITHOUT_GRADIENT,
    Table,
    chosen_rate,
)  # fmt: skip
from selectra.compare.stats import paired, spread
from selectra.compare.store import Store
from selectra.errors import DataError

# Fewer cells than half of tables (a) and (b) together give no verdict.
FEWEST_CELLS = 12
RIVALS = ("linear", "dlinear", "patchtst", "itransformer")
# What of every cell's record is kept; software and hardware are told once.
KEPT = (
    "data", "lookback", "horizon", "model", "size", "args", "seed", "order", "lr", "val", "test", "test_windows",
    "best_step", "steps", "seconds", "packed", "parameters", "device", "backends", "environment", "reason",
    "group",
)  # fmt: skip
COLUMNS = (
    "table", "data", "lookback", "horizon", "model", "size", "seed", "order", "lr", "test_mse", "test_mae", "val_mse",
    "best_step", "steps", "seconds", "packed", "parameters", "device",
)  # fmt: skip
WHAT = "selectra compare forecasting"
# How the records begin as a file.
BEGINS = f'{{\n "what": "{WHAT}"'
Row = dict[str, Any]
Place = tuple[str, int, int]


def export(store: Store) -> dict[str, Any]:
    """Everything about a comparison, in JSON's types."""
    every, environments = _cells(store)
    tried = [cell for cell in every if cell["group"] == BUDGET_TRIALS]
    cells = [cell for cell in every if cell["group"] != BUDGET_TRIALS]
    rates = _rates(store, cells)
    final = [cell for cell in cells if cell["lr"] in (None, rates.get((cell["data"], cell["model"])))]
    rows = _rows([cell for cell in final if "args" not in cell and cell["order"] == 0 and "test" in cell])
    spreads = _spreads([cell for cell in final if "test" in cell])
    published = read_published()
    # Cells that nobody has begun yet count as missing too.
    asked = {c.label["model"] for c, _, _ in store.cells() if c.label.get("lookback", 96) != 96}
    for row in rows:
        row["orders"] = spreads.get((*_place(row), row["model"]))
        row["published"] = _nearest(published, row)
    return {
        "what": WHAT,
        "budget": store.recall(BUDGET),
        "budgets": budgets(tried),
        "rates": {"tried": list(RATES), "chosen": [[*key, rate] for key, rate in sorted(rates.items())]},
        "environments": environments,
        "tables": {name: _table(TABLES[name], rows, cells, asked) for name in ("a", "b", "c")},
        "orders": [{"data": d, "lookback": b, "horizon": h, "model": m, **s} for (d, b, h, m), s in spreads.items()],
        "ablation": _ablation(final),
        "verdict": verdict(rows),
        "targets": targets(rows, published),
        "costs": store.recall(COSTS) or [],
        "cells": final,
        "trials": [cell for cell in cells if cell not in final] + tried,
    }


def write(store: Store, path: Path) -> None:
    """Write the records as JSON, and their cells as CSV beside it."""
    content = export(store)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with path.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer: csv.DictWriter[str] = csv.DictWriter(file, COLUMNS, lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        for kind in ("cells", "trials"):
            for cell in content[kind]:
                if "test" in cell:
                    errors = {"test_mse": cell["test"]["mse"], "test_mae": cell["test"]["mae"]}
                    writer.writerow({**cell, **errors, "val_mse": cell["val"]["mse"], "table": kind})


def _cells(store: Store) -> tuple[list[Row], list[dict[str, Any]]]:
    """Every finished or failed cell, and the different environments that they ran in, which they name by number."""
    cells, environments = [], []
    for cell, state, record in store.cells():
        if state not in ("done", "failed") or record is None:
            continue
        where = {name: record[name] for name in ("versions", "hardware", "commit") if name in record}
        if where not in environments:
            environments.append(where)
        rate = cell.run.optim.lr if cell.by_gradient else None
        row = {**cell.label, **record, "lr": rate, "environment": environments.index(where),
               "group": cell.group}  # fmt: skip
        cells.append({name: row[name] for name in KEPT if name in row})
    return cells, environments


def budgets(trials: Iterable[Row]) -> list[Row]:
    """The mean validation MSE of all models with each budget of steps, over the models that finished them all."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for cell in trials:
        if "val" in cell:
            found[cell["model"]][cell["steps"]] = cell["val"]["mse"]
    steps = sorted({each for scores in found.values() for each in scores})
    whole = {model: scores for model, scores in found.items() if len(scores) == len(steps)}
    return [
        {"steps": each, "val_mse": fmean(scores[each] for scores in whole.values()), "models": len(whole)}
        for each in (steps if whole else [])
    ]


def _rates(store: Store, cells: Iterable[Row]) -> dict[tuple[str, str], float]:
    pairs = {(cell["data"], cell["model"]) for cell in cells if cell["lr"] is not None}
    found = {pair: chosen_rate(store, *pair) for pair in pairs}
    return {pair: rate for pair, rate in found.items() if rate is not None}


def _place(row: Mapping[str, Any]) -> Place:
    return row["data"], row["lookback"], row["horizon"]


def _rows(cells: Iterable[Row]) -> list[Row]:
    """One row for each model of a cell: means over seeds."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for cell in cells:
        groups[(*_place(cell), cell["model"])].append(cell)
    rows = []
    for (data, lookback, horizon, model), members in groups.items():
        mse = [cell["test"]["mse"] for cell in members]
        rows.append(
            {
                "data": data, "lookback": lookback, "horizon": horizon, "model": model, "size": members[0]["size"],
                "mse": fmean(mse), "mse_spread": spread(mse),
                "mae": fmean(cell["test"]["mae"] for cell in members),
                "val_mse": fmean(cell["val"]["mse"] for cell in members),
                "seeds": sorted(cell["seed"] for cell in members), "lr": members[0]["lr"],
                "parameters": members[0]["parameters"], "seconds": fmean(cell["seconds"] for cell in members),
                "packed": max(cell["packed"] for cell in members), "device": members[0]["device"],
            }
        )  # fmt: skip
    return rows


def _spreads(cells: Iterable[Row]) -> dict[Any, dict[str, Any]]:
    """Of every model that was trained with its series in several orders: lowest, highest and spread of the MSE."""
    groups: dict[Any, dict[int, float]] = defaultdict(dict)
    asked = TABLES["orders"]
    for cell in cells:
        usual = cell.get("args", {}) == SCANNING.get(cell["model"])
        if usual and cell["data"] in asked.data and cell["seed"] == 0 and cell["horizon"] in asked.horizons:
            groups[(*_place(cell), cell["model"])][cell["order"]] = cell["test"]["mse"]
    return {
        key: {"low": min(each.values()), "high": max(each.values()), "spread": spread(list(each.values())),
              "count": len(each)}
        for key, each in groups.items() if len(each) > 1
    }  # fmt: skip


def _ablation(cells: Iterable[Row]) -> list[Row]:
    """For each cell of the ablation the MSE of the whole model and of each variant, of one seed."""
    table, found = TABLES["ablation"], []
    cells = [cell for cell in cells if "test" in cell and not cell["order"] and cell["seed"] == 0]
    for family, variants in table.variants.items():
        for data in table.data:
            for horizon in table.horizons:
                here = [
                    cell
                    for cell in cells
                    if cell["model"] == family and _place(cell) == (data, table.lookbacks[0], horizon)
                ]
                mse = {_variant(cell.get("args", {})): cell["test"]["mse"] for cell in here}
                wanted = [_variant(args) for args in ({}, *variants)]
                if all(name in mse for name in wanted):
                    found.append({"model": family, "data": data, "horizon": horizon,
                                  "mse": {name: mse[name] for name in wanted}})  # fmt: skip
    return found


def _variant(args: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in args.items()) or "whole"


def _table(table: Table, rows: list[Row], cells: list[Row], asked: set[str]) -> dict[str, Any]:
    """What a table holds: its rows, who wins each cell, and which cells are missing, with the reason where known."""
    models = list(table.models)
    if table.name == "c":
        models += sorted(asked - set(models))
    mine, missing = [], []
    for data in table.data:
        for lookback in table.lookbacks:
            for horizon in table.horizons:
                here = [row for row in rows if _place(row) == (data, lookback, horizon) and row["model"] in models]
                mine += here
                found = {row["model"]: row for row in here}
                for model in models:
                    wanted = 1 if model in WITHOUT_GRADIENT else table.seeds
                    n_seeds = len(found[model]["seeds"]) if model in found else 0
                    if n_seeds < wanted:
                        reasons = [c["reason"] for c in cells if "reason" in c and c["model"] == model
                                   and _place(c) == (data, lookback, horizon)]  # fmt: skip
                        place = {"data": data, "lookback": lookback, "horizon": horizon, "model": model}
                        why = "; ".join(reasons) or "not run"
                        missing.append({**place, "seeds": n_seeds, "of": wanted, "reason": why})
    chosen = _chosen(table, mine) if len(table.lookbacks) > 1 else []
    winners = _best_of(chosen if len(table.lookbacks) > 1 else mine)
    return {
        "seeds": table.seeds, "models": models, "rows": mine, "missing": missing, "winners": winners, "chosen": chosen,
    }  # fmt: skip


def _chosen(table: Table, rows: list[Row]) -> list[Row]:
    """Of every model that ran a cell with all look-backs, the row of the one with the lowest validation error."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["data"], row["horizon"], row["model"]].append(row)
    return [
        min(found, key=lambda row: row["val_mse"]) for found in groups.values() if len(found) == len(table.lookbacks)
    ]  # fmt: skip


def _best_of(rows: list[Row]) -> list[Row]:
    """Who wins each cell."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["data"], row["horizon"]].append(row)
    best = (min(found, key=lambda row: row["mse"]) for found in groups.values())
    return [{name: row[name] for name in ("data", "lookback", "horizon", "model", "mse")} for row in best]


def verdict(rows: list[Row]) -> dict[str, Any]:
    """Whether the best Mamba model, chosen on validation, beats its rivals over the cells of (a) and (b)."""
    by_cell: dict[Place, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["lookback"] == 96 and any(row["data"] in TABLES[name].data for name in "ab"):
            by_cell[_place(row)][row["model"]] = row
    mambas, whole = _whole(by_cell)
    left_out = [model for model in MAMBAS if model not in mambas]
    if len(whole) < FEWEST_CELLS:
        return {"cells": len(whole), "mamba": None, "pairs": {}, "left_out": left_out}
    means = {model: fmean(found[model]["val_mse"] for found in whole.values()) for model in mambas}
    best = min(means, key=lambda model: means[model])
    by_data = {}
    for data in sorted({place[0] for place in whole}):
        scores = {m: fmean(f[m]["val_mse"] for p, f in whole.items() if p[0] == data) for m in mambas}
        by_data[data] = min(scores, key=lambda model: scores[model])
    chosen = {
        "one": [found[best]["mse"] for found in whole.values()],
        "each": [found[by_data[place[0]]]["mse"] for place, found in whole.items()],
    }
    pairs = {
        kind: {
            rival: paired(ours, [found[rival]["mse"] for found in whole.values()], compared=len(RIVALS))
            for rival in RIVALS
        }
        for kind, ours in chosen.items()
    }
    everybody = set.intersection(*({*found} for found in whole.values()))
    test = {model: fmean(found[model]["mse"] for found in whole.values()) for model in sorted(everybody)}
    return {
        "cells": len(whole), "mamba": best, "left_out": left_out, "validation": means, "by_data": by_data,
        "pairs": pairs, "means": test,
        "wins": all(each["difference"] < 0 for each in pairs["one"].values()),
        "surely": all(each["high"] < 0 for each in pairs["one"].values()),
    }  # fmt: skip


def _whole(by_cell: Mapping[Place, dict[str, Row]]) -> tuple[list[str], dict[Place, dict[str, Row]]]:
    """The Mamba models, and the cells that hold all of these and all rivals.

    Where these are too few, the Mamba model that ran in the fewest cells is left out.
    """
    mambas: list[str] = sorted(MAMBAS, key=lambda model: -sum(model in found for found in by_cell.values()))
    while True:
        whole = {place: found for place, found in by_cell.items() if {*mambas, *RIVALS} <= found.keys()}
        if len(whole) >= FEWEST_CELLS or len(mambas) == 1:
            return mambas, whole
        mambas = mambas[:-1]


def targets(rows: list[Row], published: list[Row]) -> dict[str, Any]:
    """How the closed form and TSM2 stand against published numbers."""
    of = {(*_place(row), row["model"]): row for row in rows}
    known = {(each["data"], each["lookback"], each["horizon"], each["model"]): each for each in published}
    closed = {key: abs(row["mse"] - known[key]["mse"]) for key, row in of.items()
              if key[3] == "linear" and key in known}  # fmt: skip
    tsm2 = {key: row["mse"] for key, row in of.items() if key[3] == "tsm2" and key[1] == 512 and key in known}
    rival = {key: of[(*key[:3], "linear")]["mse"] for key in tsm2 if (*key[:3], "linear") in of}
    return {
        "linear": {"cells": len(closed), "largest": max(closed.values(), default=None),
                   "within": sum(each <= 0.002 + 0.0005 for each in closed.values())},
        "tsm2": {"cells": len(tsm2), "within": sum(mse <= 1.03 * known[key]["mse"] for key, mse in tsm2.items()),
                 "below_linear": sum(tsm2[key] < mse for key, mse in rival.items()), "of": len(rival)},
    }  # fmt: skip


def read_published() -> list[Row]:
    """The numbers of papers and repositories, each with its look-back, its source and the known fault."""
    path = Path(str(files("selectra.compare") / "published.csv"))
    if not path.is_file():
        raise DataError(f"'{path}' is missing; the installation is damaged.")
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {**row, "horizon": int(row["horizon"]), "lookback": int(row["lookback"]), "mse": float(row["mse"]),
             "mae": float(row["mae"]) if row["mae"] else None}
            for row in csv.DictReader(file)
        ]  # fmt: skip


def _nearest(published: list[Row], row: Row) -> Row | None:
    """The published number of the same cell, at the nearest look-back there is one for."""
    found = [
        each for each in published
        if (each["model"], each["data"], each["horizon"]) == (row["model"], row["data"], row["horizon"])
    ]  # fmt: skip
    return min(found, key=lambda each: abs(each["lookback"] - row["lookback"]), default=None)
