"""Sentences about a comparison say what its records say."""

from typing import Any

from selectra.report.explained import misses, responsible


def ablation(*changes: tuple[str, float, float]) -> list[dict[str, Any]]:
    """Cells of data set, and the MSE without time mixer and without channel mixer; the whole model has 1."""
    return [
        {
            "model": "tsm2", "data": data, "horizon": 96,
            "mse": {"whole": 1.0, "without=time": time, "without=channels": channels},
        }
        for data, time, channels in changes
    ]  # fmt: skip


def of(difference: float, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "verdict": {"mamba": "tsm2", "pairs": {"one": {"linear": {"difference": difference}}}},
        "ablation": found,
    }


def test_the_part_that_costs_is_named_with_where_it_does() -> None:
    found = ablation(("etth1", 1.0, 0.9), ("etth1", 1.001, 0.94), ("weather", 0.999, 1.3))
    text = responsible(of(0.1, found))
    assert "without the channel mixer the MSE changes by +4.7 % on average, and is lower on 2 of 3 cells" in text
    assert "What costs most is the channel mixer: left out, the error falls on ETTh1 (-8.0 %)." in text
    assert text.endswith("What neither helps nor costs more than 0.2 % on average: the time mixer.")
    assert responsible(of(-0.1, found)) == "" and responsible(of(0.1, [])) == ""


def cell(model: str, horizon: int, val: float, test: float, best_step: int) -> dict[str, Any]:
    return {
        "data": "etth1", "horizon": horizon, "lookback": 512, "model": model, "order": 0, "best_step": best_step,
        "val": {"mse": val}, "test": {"mse": test},
    }  # fmt: skip


def test_misses_are_counted_by_what_their_trainings_say() -> None:
    rows = [
        {"data": "etth1", "horizon": h, "lookback": 512, "model": "tsm2", "published": {"mse": 1.0, "lookback": 512}}
        for h in (96, 192, 336)
    ]
    cells = [
        cell("tsm2", 96, 0.5, 1.02, 900), cell("tsm2", 192, 0.5, 1.10, 200), cell("tsm2", 336, 0.5, 1.20, 700),
        cell("linear", 192, 0.4, 1.01, 0), cell("linear", 336, 0.6, 1.05, 0), cell("patchtst", 192, 0.4, 0.99, 100),
    ]  # fmt: skip
    content = {"tables": {"c": {"rows": rows}}, "cells": cells, "budget": {"steps": 1000, "evaluations": 10}}
    text = misses(content)
    assert "| ETTh1 192 | 1.000 | 1.100 (+10.0) | 1.010 (+1.0) | 0.990 (-1.0) | 0.500 | 0.400 | 200 |" in text
    assert "| ETTh1 336 | 1.000 | 1.200 (+20.0) | 1.050 (+5.0) | - | 0.500 | 0.600 | 700 |" in text
    assert "ETTh1 96" not in text
    assert "- 1 of these 2 trainings are best" in text and "Of the 1 other cells 0 are like that" in text
    assert "- On 1 of 2 the closed-form" in text and "On 1 TSM2 is better on validation and worse on test" in text
    assert "above the paper on 1 of 2" in text
    content["cells"] = cells[:1]
    assert misses(content) == ""
