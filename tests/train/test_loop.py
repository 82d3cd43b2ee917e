"""The loop: what it computes, when it ends, what it refuses."""

import io
import itertools
import json
import math
import os
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from selectra.errors import ConfigError, DataError
from selectra.spec import Optim, Train
from selectra.tasks import Forecasting
from selectra.train import optim
from selectra.train.batches import TrainingOrder, every_window_once
from selectra.train.checkpoint import load_weights
from selectra.train.evaluation import evaluate
from selectra.train.loop import fit
from selectra.train.parallel import World, joined, pick_device
from selectra.train.progress import duration
from selectra.train.stop import DivergedError
from tests.train.tiny import TinyModel, TinyNaive, TinySolved, make_run, train, windows


def steps_of(out: Path) -> list[list[float]]:
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [[line["loss"], line["norm"], line["lr"]] for line in lines if line["event"] == "step"]


def test_accumulation_is_a_larger_batch(tmp_path):
    train(tmp_path / "one", dropout=0.0, batch_size=16)
    train(tmp_path / "two", dropout=0.0, batch_size=8, accumulate=2)
    for one, two in zip(steps_of(tmp_path / "one"), steps_of(tmp_path / "two"), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_norm_is_that_of_the_mean_loss(tmp_path):
    torch.manual_seed(0)
    model, task = TinyModel(dropout=0.0), Forecasting()
    loss = task.loss(model, windows(64)[list(range(64))])
    (loss.sum / loss.count).backward()
    expected = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    train(tmp_path, dropout=0.0, batch_size=64, steps=1)
    assert steps_of(tmp_path)[0][:2] == pytest.approx([(loss.sum / loss.count).item(), expected.item()], rel=1e-5)


def test_workers_change_nothing(tmp_path):
    train(tmp_path / "one", steps=6)
    train(tmp_path / "two", steps=6, workers=1)
    assert steps_of(tmp_path / "one") == steps_of(tmp_path / "two")


def test_terminal_shows_a_bar_and_the_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    run = make_run(patience=9)
    fit(TinyModel(), Forecasting(), windows(64), windows(30, 64), run, console=console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for part in ("tiny", "12/12", "at most 0 s left", "loss ", "validation mse "):
        assert part in text


@pytest.mark.parametrize(("given", "shown"), [(12, True), (300, True), (11, False), (0, False)])
def test_a_training_that_is_all_warm_up_says_so(given, shown):
    console = Console(file=io.StringIO(), width=200)
    run = make_run(steps=12)
    run = run.model_copy(update={"optim": run.optim.model_copy(update={"warmup_steps": given})})
    fit(TinyModel(), Forecasting(), windows(64), None, run, console=console)
    assert isinstance(console.file, io.StringIO)
    said = f"All 12 steps are warm-up (optim.warmup_steps={given})"
    assert (said in console.file.getvalue()) is shown
    share = run.optim.model_copy(update={"warmup_steps": 0, "warmup_share": 0.9})
    assert optim.all_warmup(share, 12) is None


def test_every_file_is_written_and_read_back(tmp_path):
    _, fitted = train(tmp_path, epochs=2.0, steps=None)
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json", "record.jsonl", "checkpoints", "model.safetensors"
    }  # fmt: skip
    record = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert record[0]["versions"]["torch"] == torch.__version__
    assert record[0]["seed"] == 0
    assert record[1]["event"] == "backends"
    assert fitted.steps == 8
    best = min((line for line in record if line["event"] == "metrics"), key=lambda line: line["mse"])
    assert (fitted.best_step, fitted.best["mse"]) == (best["step"], best["mse"])
    again = TinyModel()
    load_weights(tmp_path / "model.safetensors", again)
    assert evaluate(again, Forecasting(), windows(30, 64), 7) == pytest.approx(fitted.best, abs=1e-6)


def test_early_stopping_keeps_the_best_weights():
    torch.manual_seed(0)
    model, task = TinyModel(), Forecasting()
    run = make_run(steps=400, eval_every=1, patience=3).model_copy(update={"optim": Optim(lr=0.3)})
    fitted = fit(model, task, windows(64), windows(30, 64), run, progress=False)
    assert fitted.stopped_by == "patience"
    assert fitted.steps == fitted.best_step + 3
    assert evaluate(model, task, windows(30, 64), 16) == pytest.approx(fitted.best)


def test_patience_without_validation_is_refused():
    with pytest.raises(ConfigError, match="no validation windows"):
        fit(TinyModel(), Forecasting(), windows(64), None, make_run(patience=2))


def test_without_validation_the_last_weights_are_kept():
    fitted = fit(TinyModel(), Forecasting(), windows(64), None, make_run(), progress=False)
    assert (fitted.stopped_by, fitted.best) == ("steps", {})


class Breaks(TinyModel):
    """Its loss becomes NaN through one weight."""

    def forward(self, x, **_):
        return super().forward(x) + (self.proj.bias.sum() * math.nan if x.mean() > -100 and self.training else 0)


def test_nan_stops_with_words(tmp_path):
    model = Breaks()
    before = model.proj.weight.clone()
    with pytest.raises(DivergedError, match=r"step 1: the loss is nan and the gradient of 'norm.weight' \(4 in all\)"):
        fit(model, Forecasting(), windows(64), windows(30, 64), make_run(), tmp_path, progress=False)
    assert torch.equal(model.proj.weight, before)


def test_solved_models_see_every_window_once(tmp_path):
    model = TinySolved()
    fitted = fit(model, Forecasting(), windows(50), windows(30, 64), make_run(), tmp_path)
    assert model.seen == 50
    assert (fitted.stopped_by, fitted.steps) == ("solved", 0)
    assert model.mean.item() != 0
    other = TinySolved()
    load_weights(tmp_path / "model.safetensors", other)
    assert other.mean == model.mean


def test_models_without_parameters_are_evaluated_only(tmp_path):
    fitted = fit(TinyNaive(), Forecasting(), windows(50), windows(30, 64), make_run(), tmp_path)
    assert fitted.stopped_by == "nothing to train"
    assert set(fitted.best) == {"mse", "mae"}


def test_training_order_covers_a_pass_and_goes_on_anywhere():
    settings = Train(steps=1, batch_size=8, seed=3)
    order = TrainingOrder(windows(30), settings, World())
    batches = order.start_at(0)
    first = [next(batches).x for _ in range(2 * len(order))]
    assert len(order) == 4
    assert sum(len(x) for x in first[:4]) == 30
    assert len({tuple(row.flatten().tolist()) for x in first[:4] for row in x}) == 30
    assert not torch.equal(first[0], first[4])
    again = TrainingOrder(windows(30), settings, World()).start_at(3)
    assert all(torch.equal(next(again).x, x) for x in first[3:])


@pytest.mark.parametrize("size", [2, 3])
def test_processes_together_see_the_batches_of_one(size):
    settings = Train(steps=1, batch_size=6, seed=3)
    alone = TrainingOrder(windows(30), settings, World()).start_at(0)
    shares = [TrainingOrder(windows(30), settings, World(rank, size)).start_at(0) for rank in range(size)]
    for _ in range(7):
        together = torch.cat([next(share).x for share in shares])
        expected = next(alone).x
        assert {tuple(x.flatten().tolist()) for x in together} == {tuple(x.flatten().tolist()) for x in expected}


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_evaluation_sees_every_window_once(size):
    shares = [list(every_window_once(windows(30), 4, World(rank, size))) for rank in range(size)]
    assert sum(len(batch) for share in shares for batch in share) == 30


def test_every_process_needs_a_share_of_the_batch():
    with pytest.raises(ConfigError, match=r"batch_size is 3 .* there are 4; take at least 4"):
        TrainingOrder(windows(30), Train(steps=1, batch_size=3), World(0, 4))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_uneven_shares_are_the_batches_of_one_process(size):
    """30 windows in batches of 7: the last batch of a pass has 2, fewer than there are processes."""
    train, n_batches = Train(steps=1, batch_size=7, seed=3), 10
    alone = TrainingOrder(windows(30), train, World())
    orders = [TrainingOrder(windows(30), train, World(rank, size)) for rank in range(size)]
    assert {len(order) for order in orders} == {5}
    expected, shares = alone.start_at(0), [order.start_at(0) for order in orders]
    for position in range(n_batches):
        together = [next(share).x for share in shares]
        own = [x for order, x in zip(orders, together, strict=True) if order.counts(position)]
        assert sorted(row.tolist() for row in torch.cat(own)) == sorted(row.tolist() for row in next(expected).x)
        assert len(own) == (2 if position % 5 == 4 else size)


def test_no_training_windows():
    with pytest.raises(DataError, match="no windows"):
        TrainingOrder(windows(0), Train(steps=1), World())


class Passes:
    """A split of five whose batches say in which pass and process they were made."""

    epoch = -1

    def __len__(self) -> int:
        return 5

    def at_pass(self, number: int, seed: int) -> None:
        self.epoch = number

    def __getitem__(self, indices: list[int]) -> tuple[int, int, list[int]]:
        return os.getpid(), self.epoch, indices


def test_processes_that_prepare_batches_stay_from_pass_to_pass() -> None:
    settings = Train(steps=1, batch_size=2, workers=2, load_timeout=60)
    found = list(itertools.islice(TrainingOrder(Passes(), settings, World()).start_at(2), 11))
    alone = TrainingOrder(Passes(), Train(steps=1, batch_size=2), World()).start_at(2)
    assert [each[1:] for each in found] == [each[1:] for each in itertools.islice(alone, 11)]
    assert [epoch for _, epoch, _ in found] == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    assert len({process for process, *_ in found} - {os.getpid()}) == 2


def test_gradients_are_scaled_in_one_call():
    class Calls(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    # One has none.
    model[1].weight.requires_grad_(False)
    model(torch.ones(1, 3)).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with Calls() as calls:
        optim.scale_gradients(model, 0.5)
    assert len([name for name in calls.names if "mul" in name]) == 1
    after = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(before) == 5 and all(torch.equal(after[name], 0.5 * grad) for name, grad in before.items())
    optim.scale_gradients(nn.Linear(2, 2), 0.5)


def test_weight_decay_groups():
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].weight._no_weight_decay = True  # type: ignore[attr-defined]
    decayed = [name for name, parameter in model.named_parameters() if optim.decayed(name, parameter)]
    assert decayed == ["0.weight"]


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.0), ("constant", 1.0)])
def test_schedule(schedule, last):
    model = nn.Linear(1, 1)
    optimizer = optim.make_optimizer(model, Optim(lr=1.0))
    steps = optim.make_schedule(optimizer, Optim(lr=1.0, schedule=schedule, warmup_steps=4), 10)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(10):
            rates.append(steps.get_last_lr()[0])
            optimizer.step()
            steps.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert steps.get_last_lr()[0] == pytest.approx(last, abs=1e-12)


def test_durations():
    assert [duration(x) for x in (0.4, 59, 61, 3700)] == ["0 s", "59 s", "1 min 01 s", "1 h 01 min"]


def test_devices(monkeypatch):
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ConfigError, match="allowed are"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="0 CUDA devices"):
        pick_device("cuda:1")


def test_parallel_kind_must_fit_the_processes(monkeypatch):
    parallel = make_run().parallel
    with (
        pytest.raises(ConfigError, match="start it with torchrun"),
        joined(parallel.model_copy(update={"kind": "ddp"})),
    ):
        pass
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="started 2 processes"), joined(parallel.model_copy(update={"kind": "none"})):
        pass


def test_weights_of_another_model(tmp_path):
    train(tmp_path, steps=1)
    with pytest.raises(DataError, match="belong to another model"):
        load_weights(tmp_path / "model.safetensors", nn.Linear(1, 1))
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(DataError, match="damaged"):
        load_weights(tmp_path / "model.safetensors", TinyModel())
    with pytest.raises(DataError, match="no weights"):
        load_weights(tmp_path / "other", TinyModel())
