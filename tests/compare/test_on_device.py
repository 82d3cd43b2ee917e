"""The training that stays on the device comes to what the loop comes to."""

from pathlib import Path
from typing import Any

import pytest
import torch

from selectra.compare.cells import Cell
from selectra.compare.on_device import OnDevice, Resident, order_of, rates_of
from selectra.compare.store import Store
from selectra.compare.worker import build, work_on_gpu
from selectra.errors import ConfigError
from selectra.spec import Optim, Spec
from selectra.train.evaluation import evaluate
from selectra.train.loop import fit
from selectra.train.parallel import World
from tests.compare.small import make_cells, make_run, write_series

CPU = torch.device("cpu")
# Without dropout, whose draws differ, and without batch norm, which sees the windows that fill up a batch.
MODELS = {
    "dlinear": Spec("dlinear", kernel=5),
    "tsm2": Spec("tsm2_smoke", dropout=0.0),
    "itransformer": Spec("itransformer_smoke", dropout=0.0),
    "rlinear": Spec("rlinear_smoke"),
}


def on_device(cell: Cell, device: torch.device = CPU) -> tuple[Any, OnDevice]:
    built = build(cell)
    resident = Resident.of(built.parts["train"], device)
    training = OnDevice(built.model.to(device), built.task, built.parts, cell.run, resident)
    training.prepare()
    while training.advance():
        pass
    training.finish()
    return built, training


def by_loop(cell: Cell, device: torch.device = CPU) -> tuple[Any, Any, dict[str, float]]:
    built, world = build(cell), World(device=device)
    fitted = fit(
        built.model, built.task, built.parts["train"], built.parts["val"], cell.run, progress=False, world=world
    )
    return built, fitted, evaluate(built.model, built.task, built.parts["test"], 7, world)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_loop(name: str, tmp_path: Path) -> None:
    cell = Cell(make_run(write_series(tmp_path), MODELS[name]), 0, {})
    looped, fitted, test = by_loop(cell)
    built, training = on_device(cell)
    outcome = training.outcome()
    assert outcome.best_step == fitted.best_step
    assert outcome.val["mse"] == pytest.approx(fitted.best["mse"], rel=1e-5)
    assert outcome.test == pytest.approx(test, rel=1e-5)
    assert len(outcome.history) == 3
    x = built.parts["test"][[0, 5, 20]].x
    with torch.no_grad():
        # Not the weights: a bias of attention's keys changes nothing, and Adam moves it by rounding errors.
        torch.testing.assert_close(built.model.eval()(x), looped.model.eval()(x), rtol=1e-4, atol=1e-5)


def test_order_is_the_loops_with_full_batches(tmp_path: Path) -> None:
    run = make_run(write_series(tmp_path), MODELS["dlinear"], steps=14)
    windows = build(Cell(run, 0, {})).parts["train"]
    order, counts = order_of(windows, run)
    per_pass = -(-len(windows) // 32)
    assert counts[:per_pass].sum() == len(windows)
    seen = torch.cat([row[:count] for row, count in zip(order[:per_pass], counts[:per_pass], strict=True)])
    assert seen.sort().values.tolist() == list(range(len(windows)))
    assert order.shape == (14, 32)
    # A short batch is filled with its own windows.
    short = order[per_pass - 1]
    assert set(short.tolist()) == set(short[: counts[per_pass - 1]].tolist())


def test_rates_rise_and_fall() -> None:
    rates = rates_of(Optim(lr=1.0, warmup_steps=2), 8)
    assert rates[0] == pytest.approx(1 / 3)
    assert max(rates) == pytest.approx(1.0)
    assert 0 < rates[-1] < 0.1


def test_gaps_are_masked_as_in_the_loop(tmp_path: Path) -> None:
    path = write_series(tmp_path)
    lines = path.read_text().splitlines()
    for row in (40, 41, 120, 230, 231, 270):
        stamp, _, *rest = lines[row].split(",")
        lines[row] = ",".join([stamp, "", *rest])
    path.write_text("\n".join(lines) + "\n")
    cell = Cell(make_run(path, MODELS["tsm2"]), 0, {})
    _, _, test = by_loop(cell)
    _, training = on_device(cell)
    assert training.resident.observed is not None
    assert training.outcome().test == pytest.approx(test, rel=1e-5)


def test_the_best_weights_are_measured(tmp_path: Path) -> None:
    """A rate that stays far too high: the kept weights are of an earlier step than the last."""
    run = make_run(write_series(tmp_path), MODELS["dlinear"], steps=12)
    run = run.model_copy(update={"optim": Optim(lr=1.0, schedule="constant")})
    built, training = on_device(Cell(run, 0, {}))
    outcome = training.outcome()
    assert outcome.best_step < 12
    scores = [each["mse"] for each in outcome.history]
    assert outcome.best_step == 3 * (scores.index(min(scores)) + 1)
    assert outcome.val["mse"] == pytest.approx(min(scores))
    again = evaluate(built.model, built.task, built.parts["val"], 50)
    assert again["mse"] == pytest.approx(min(scores), rel=1e-5)


def test_what_only_the_loop_does_is_refused(tmp_path: Path) -> None:
    run = make_run(write_series(tmp_path), MODELS["dlinear"])
    patient = run.model_copy(update={"train": run.train.model_copy(update={"patience": 2})})
    with pytest.raises(ConfigError, match=r"train\.patience"):
        on_device(Cell(patient, 0, {}))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", MODELS)
def test_graphs_are_the_loop(name: str, tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    cells = [Cell(make_run(write_series(tmp_path), MODELS[name], seed=seed), seed, {}) for seed in range(5)]
    store, found = Store(tmp_path / "cells.sqlite"), {}
    store.add(cells)

    def note(cell: Cell, state: str, record: dict[str, Any]) -> None:
        found[cell.key] = record

    work_on_gpu(store, device, 3, float("inf"), note)
    for cell in cells:
        _, fitted, test = by_loop(cell, device)
        assert found[cell.key]["best_step"] == fitted.best_step
        assert found[cell.key]["test"]["mse"] == pytest.approx(test["mse"], rel=1e-4)


def test_seeds_differ(tmp_path: Path) -> None:
    first, second, *_ = make_cells(write_series(tmp_path))
    assert on_device(first)[1].outcome().test != on_device(second)[1].outcome().test
