"""The benchmark of scans along routes: all contenders compute the same, wrong ones are not timed."""

from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from selectra.bench import cross
from selectra.errors import BackendError

CPU = torch.device("cpu")


@pytest.mark.parametrize("case", cross.TINY_CASES, ids=lambda case: case.tag)
@pytest.mark.parametrize("name", ["copies", "one by one"])
def test_the_others_compute_the_same(case: cross.CrossCase, name: str) -> None:
    arguments = {k: x.double() for k, x in case.arguments(CPU).items()}
    ours, other = (cross.CONTENDERS[n](arguments, case.routes) for n in ("routes", name))
    torch.testing.assert_close(other.y(), ours.y())
    dy = torch.randn_like(arguments["u"])
    for shared in [name for name in ("u", "z") if name in arguments]:
        a, b = (torch.autograd.grad(c.y(), c.leaves[shared], dy)[0] for c in (ours, other))
        torch.testing.assert_close(a, b)


def test_every_shape_is_recorded_with_all_contenders() -> None:
    record = cross.bench_cross(CPU, 0.0, Console(quiet=True), lambda r: None, cross.TINY_CASES)
    assert [row["tag"] for row in record["rows"]] == ["tiny", "tiny-pair"]
    for row in record["rows"]:
        assert all(row[kind].keys() == cross.CONTENDERS.keys() for kind in ("forward", "training"))
    assert record["gate"]["tiny"]["y"] < 5e-3
    assert len({line.count("|") for line in cross.cross_table(record).splitlines()}) == 1


def test_the_table_has_the_others_times_over_ours() -> None:
    times = {name: {"median": value} for name, value in zip(cross.CONTENDERS, (1.0, 2.0, 3.0), strict=True)}
    row = cross.TINY_CASES[0]._asdict() | {"forward": times, "training": times}
    assert cross.cross_table({"rows": [row]}).splitlines()[2] == (
        "| tiny | 1, 3 x 5, 4, 8, 1 | 1.000 | 2.000 | 2.00 | 3.000 | 3.00 | 1.000 | 2.000 | 2.00 | 3.000 | 3.00 |"
    )


@pytest.mark.parametrize("name", ["routes", "copies"])
def test_nothing_wrong_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(cross.CONTENDERS[name]):
        def y(self) -> Tensor:
            return super().y() * (1.5 if self.leaves["u"].dtype != torch.float64 else 1)

    if name == "routes":
        monkeypatch.setattr(cross, "Contender", Wrong)
    else:
        monkeypatch.setitem(cross.CONTENDERS, name, Wrong)

    def fail(*_: Any) -> Any:
        raise AssertionError("timed")

    monkeypatch.setattr(cross, "measure", fail)
    with pytest.raises(BackendError, match="is wrong at tiny" if name == "routes" else "computes something else"):
        cross.bench_cross(CPU, 0.0, Console(quiet=True), lambda r: None, cross.TINY_CASES)
