"""Rows of errors as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("model", "MSE", "MAE", "MASE", "parameters", "seconds")


def number(value: float | None, digits: int = 4) -> str:
    """A figure with fixed digits; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


COVERAGE = "coverage-"


def columns_of(rows: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The columns that there is something for: look-backs where they were chosen, CRPS and coverage with intervals."""
    levels = [f"{key.removeprefix(COVERAGE)} %" for key in rows[0] if key.startswith(COVERAGE)]
    chosen = ["rows in"] if "lookback" in rows[0] else []
    crps = ["CRPS"] if "crps" in rows[0] else []
    return (*COLUMNS[:4], *crps, *levels, *chosen, *COLUMNS[4:])


def shown_row(row: Mapping[str, Any], columns: Sequence[str] = COLUMNS) -> list[str]:
    """The cells of `columns`."""
    cells = {"model": str(row["model"]), "MSE": number(row.get("mse")), "MAE": number(row.get("mae"))}
    cells |= {"MASE": number(row.get("mase"), 3), "CRPS": number(row.get("crps"), 3)}
    cells |= {"rows in": str(row.get("lookback", "-"))}
    cells |= {"parameters": f"{row['params']:,}", "seconds": f"{row['seconds']:.1f}"}
    covered = {key.removeprefix(COVERAGE): value for key, value in row.items() if key.startswith(COVERAGE)}
    cells |= {f"{level} %": "-" if value is None else f"{value:.1%}" for level, value in covered.items()}
    return [cells[column] for column in columns]


def percent(part: float, whole: float) -> str:
    """How much `part` lies above or below `whole`, in per cent."""
    return f"{abs(part / whole - 1):.1%}" if whole > 0 else "-"


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """Who has the lowest MSE, and how the first model stands to it, in plain words."""
    main, best = rows[0], min(rows, key=lambda row: row["mse"])
    if len(rows) == 1:
        return f"{main['model']} was not compared with any other model."
    second = min((row for row in rows if row is not best), key=lambda row: row["mse"])
    if main["mse"] == second["mse"] == best["mse"] or (best is not main and main["mse"] == best["mse"]):
        rival = second if best is main else best
        return f"{main['model']} and {rival['model']} have the same MSE, the lowest of these."
    if best is main:
        lead = percent(best["mse"], second["mse"])
        return f"{main['model']} has the lowest MSE, {lead} below {second['model']}."
    if best["mse"] == 0:
        return f"{main['model']} does not win here: {best['model']}, the best of these, makes no error at all."
    loss = percent(main["mse"], best["mse"])
    return f"{main['model']} does not win here: its MSE is {loss} above that of {best['model']}, the best of these."


def losses(errors: Mapping[str, Any], main: str) -> dict[str, Any]:
    """Where another model has a lower MSE than the main one: series (worst first) and steps of the horizon."""
    others = [name for name in errors["models"] if name != main]

    def beaten(key: str) -> list[tuple[int, str, float, float]]:
        found = []
        for i, own in enumerate(errors["models"][main][key]):
            rivals = [(errors["models"][name][key][i], name) for name in others]
            value, name = min((rival for rival in rivals if rival[0] is not None), default=(None, ""))
            if own is not None and value is not None and value < own:
                found.append((i, name, own, value))
        return found

    by_series = sorted(beaten("mse_by_series"), key=lambda item: item[3] / item[2])
    return {
        "others": bool(others),
        "series": [(errors["series"][i], name, own, value) for i, name, own, value in by_series],
        "n_series": len(errors["series"]),
        "steps": [i + 1 for i, *_ in beaten("mse_by_step")],
        "n_steps": len(errors["models"][main]["mse_by_step"]),
    }


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs drawn together: "1 to 3, 7"."""
    runs: list[list[int]] = []
    for value in numbers:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    shown = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs[:6])
    return shown + (", ..." if len(runs) > 6 else "")


def cutoff_row(row: Mapping[str, Any], levels: Sequence[float]) -> list[str]:
    """The cells of a model's cross-validation: name, MSE, MAE, the least and the greatest MSE, coverage of levels."""
    found = row["cv"]
    each = [value for value in found["mse_by_cutoff"] if value is not None]
    spread = f"{number(min(each))} to {number(max(each))}" if each else "-"
    covered = [found.get(f"{COVERAGE}{level:g}") for level in levels]
    shown = ["-" if value is None else f"{value:.1%}" for value in covered]
    return [str(row["model"]), number(found["mse"]), number(found["mae"]), spread, *shown]
