"""Rows of errors as text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("model", "MSE", "MAE", "MASE", "parameters", "seconds")


def number(value: float | None, digits: int = 4) -> str:
    """A figure with fixed digits; a dash where there is none."""
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def shown_row(row: Mapping[str, Any]) -> list[str]:
    """The cells of `COLUMNS`."""
    errors = [number(row.get("mse")), number(row.get("mae")), number(row.get("mase"), 3)]
    return [str(row["model"]), *errors, f"{row['params']:,}", f"{row['seconds']:.1f}"]


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
