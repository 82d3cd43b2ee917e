"""What a training tells while it runs: the record, TensorBoard's folder, the lines on the terminal."""

import io
import json
import time

import pytest
import torch
from rich.console import Console

from selectra.errors import ConfigError
from selectra.tasks import Forecasting
from selectra.train.loop import fit
from selectra.train.meter import Meter
from selectra.train.parallel import World
from selectra.train.record import Record
from selectra.train.state import State
from tests.train.tiny import TinyModel, make_run, windows


def steps_of(out):
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "step"]


class Slow:
    """Windows that take their time."""

    def __init__(self, pause):
        self.windows, self.pause = windows(64), pause
        self.left_out: list[str] = []

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, indices):
        time.sleep(self.pause)
        return self.windows[indices]


def test_the_record_says_how_fast_a_step_was_and_what_it_took(tmp_path):
    run = make_run(steps=4, accumulate=2)
    fit(TinyModel(pause=0.02), Forecasting(), Slow(0.06), None, run, tmp_path, progress=False)
    for line in steps_of(tmp_path):
        assert line["rate"] == pytest.approx(32 / line["seconds"])
        assert 0.3 < line["wait"] < 0.95
        assert line["norm"] > 0 and 0.01 < line["memory"] < 100


class Read(list):
    """A batch that is read where it is asked for."""

    def __init__(self, samples, reads):
        super().__init__(samples)
        self.reads = reads

    def to(self, _):
        time.sleep(0.05)
        return self


def test_a_step_does_not_count_the_last_ones_data():
    meter = Meter(iter([Read([1, 2, 3], False), Read([4], False)]), World(size=4))
    meter.take()
    assert meter.samples == 3 and meter.step(2.0, 5)["rate"] == pytest.approx(2.5)
    meter.take(counts=False)
    assert meter.samples == 0


@pytest.mark.parametrize("reads", [True, False])
def test_waiting_is_for_what_is_read_and_not_for_a_transfer(reads):
    meter = Meter(iter([Read([1], reads)]), World())
    meter.take()
    assert (meter.step(0.1, 1)["wait"] > 0.4) == reads  # pyright: ignore[reportOptionalOperand]


def test_samples_are_named_before_a_checkpoint_is_saved(tmp_path):
    data = Slow(0.0)
    data.left_out = ["sample 7"]
    run = make_run(steps=3, eval_every=100, save_every=1)
    steps = State.save
    with pytest.MonkeyPatch.context() as patch:
        named = []

        def save(self, record):
            named.append("left_out" in (tmp_path / "record.jsonl").read_text())
            steps(self, record)

        patch.setattr(State, "save", save)
        patch.setattr("selectra.train.loader.taken", lambda _: [])
        fit(TinyModel(), Forecasting(), data, None, run, tmp_path, progress=False)
    assert named[0]


def test_a_terminal_is_told_the_speed_and_of_waiting():
    console = Console(file=io.StringIO(), width=300)
    run = make_run(steps=8, eval_every=4)
    fit(TinyModel(), Forecasting(), Slow(0.05), windows(30, 64), run, console=console)
    assert isinstance(console.file, io.StringIO)
    first = console.file.getvalue().splitlines()[0]
    assert "step 4/8" in first and "/s, " in first and "of the time waiting for data), about " in first


def test_tensorboard_shows_what_the_record_says(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setattr("selectra.train.board.PAUSE", 0.0)
    run = make_run(steps=8, eval_every=4)
    for _ in range(2):
        # The second time nothing is left to do.
        fit(TinyModel(), Forecasting(), windows(64), windows(30, 64), run, tmp_path, progress=False, tensorboard=True)
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    names = {f"train/{name}" for name in ("loss", "norm", "lr", "rate", "wait", "memory", "seconds")}
    assert names | {"val/mse", "val/mae"} <= set(found.Tags()["scalars"])
    losses = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in steps_of(tmp_path)]


def test_tensorboard_is_written_now_and_then_only(tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = make_run(steps=200, eval_every=200)
    fit(TinyModel(), Forecasting(), windows(64), windows(30, 64), run, tmp_path, progress=False, tensorboard=True)
    found = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    assert 1 <= len(found.Scalars("train/loss")) < 50
    assert len(found.Scalars("val/mse")) == 1


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'selectra\[scale\]'"):
        fit(TinyModel(), Forecasting(), windows(64), None, make_run(), tmp_path, progress=False, tensorboard=True)


def test_a_record_line_waits_for_no_device(tmp_path, monkeypatch):
    """What is written of a step are numbers already: nothing asks a device for them."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("a device was waited for"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**30)
    world = World(device=torch.device("cuda", 0))
    meter = Meter(iter([]), world)
    with Record(tmp_path / "record.jsonl") as record:
        record.write("step", step=1, **meter.step(0.5, 1))
    assert json.loads((tmp_path / "record.jsonl").read_text())["memory"] == 3.0
