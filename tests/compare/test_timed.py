"""Times of a model's calls, and what a study says of them."""

import time
from types import SimpleNamespace
from typing import Any, cast

import torch

from selectra.compare import measure
from selectra.compare.results import _costs
from selectra.compare.sampling import WARM_CALLS
from selectra.compare.study import Study
from selectra.report.study import _wavering


def test_what_only_the_first_calls_take_is_not_timed() -> None:
    calls: list[int] = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.2 if len(calls) <= WARM_CALLS else 0.002)

    median, iqr = measure._timed(call, torch.device("cpu"), 0.05)
    assert median < 100 and iqr > 0


def test_times_of_one_call_are_shown_as_such_and_compared_with_none() -> None:
    names = ("ours", "theirs")
    study = cast(Study, SimpleNamespace(bases=[SimpleNamespace(name="b")], rivals=lambda _: ["theirs"]))

    def found(iqr: float) -> set[tuple[str, str]]:
        cost = {"parameters": 5, "activations_mb": 1.0, "forward_iqr_ms": 0.1, "step_iqr_ms": iqr}
        both = {
            "ours": {**cost, "forward_ms": 1.0, "step_ms": 9.0},
            "theirs": {**cost, "forward_ms": 2.0, "step_ms": 3.0},
        }
        rows: list[dict[str, Any]] = [{"base": "b", "variant": name, "cost": both[name]} for name in names]
        return {(row["quantity"], row["outcome"]) for row in _costs(study, rows, "ours")}

    level = {("parameters", "level"), ("activations_mb", "level"), ("forward_ms", "better")}
    assert found(0.5) == level | {("step_ms", "worse")}
    assert found(0.0) == level
    assert _wavering(12.345, 0.5) == "12.3 ± 0.5" and _wavering(12.345, 0.0) == "12.3, once"
