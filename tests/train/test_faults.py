"""Faults that are caused on purpose: each ends a training with a named error, in time."""

import json
import multiprocessing
import os
import signal
import subprocess
import time

import pytest
import torch

from selectra.cli import main
from selectra.errors import DataError
from selectra.tasks import Forecasting
from selectra.train.batches import every_window_once
from selectra.train.loader import load
from selectra.train.loop import fit
from selectra.train.parallel import World
from selectra.train.record import environment
from selectra.train.stop import DeviceMemoryError, StalledError, StoppedError
from tests.data.shards import within
from tests.train.tiny import TinyModel, make_run, windows


class Faulty:
    """Windows of which some cannot be had."""

    def __init__(self, fault):
        self.windows, self.fault = windows(64), fault

    def __len__(self):
        return len(self.windows)

    def __getitem__(self, indices):
        if 40 in indices:
            self.fault()
        return self.windows[indices]


def refuse():
    raise DataError("window 40 is damaged")


def train(fault, **settings):
    return fit(TinyModel(), Forecasting(), Faulty(fault), None, make_run(**settings), progress=False)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_that_hangs_is_named_in_time(workers):
    with within(1.5 + 30), pytest.raises(StalledError, match=r"prepare batches gave the next one within 1\.5 s"):
        train(lambda: time.sleep(60), workers=workers, load_timeout=1.5)


def test_a_loader_that_hangs_in_an_evaluation_is_named_in_time():
    run, val = make_run(workers=1, load_timeout=1.5), Faulty(lambda: time.sleep(60))
    with within(1.5 + 30), pytest.raises(StalledError, match=r"prepare batches gave the next one within 1\.5 s"):
        fit(TinyModel(), Forecasting(), windows(64), val, run, progress=False)


def test_a_loader_that_is_killed_is_named():
    with within(30), pytest.raises(StalledError, match=r"has ended: .*lower train\.workers or train\.batch_size"):
        train(lambda: os._exit(9), workers=2)


def newly_started():
    """What gives the processes that are started from here on."""
    before = {child.pid for child in multiprocessing.active_children()}
    return lambda: [child for child in multiprocessing.active_children() if child.pid not in before]


class Struck(TinyModel):
    """In its third step signals reach the processes that prepare batches, and maybe itself."""

    def __init__(self, number, itself=False):
        super().__init__()
        self.calls, self.number, self.itself = 0, number, itself
        self.others = newly_started()

    def forward(self, x, **_):
        self.calls += 1
        if self.calls == 3:
            others = [child.pid for child in self.others()]
            assert len(others) == 2
            struck = [*others, os.getpid()] if self.itself else others[:1]
            # From outside: what the training itself sends means something else.
            subprocess.run(["kill", f"-{int(self.number)}", *map(str, struck)], check=True)
            time.sleep(0.3)
        return super().forward(x)


def test_a_loader_that_is_killed_while_nobody_waits_for_it_is_named():
    run = make_run(workers=2, batch_size=4)
    with within(30), pytest.raises(StalledError, match=r"has ended: .*Killed.*lower train\.workers"):
        fit(Struck(signal.SIGKILL), Forecasting(), windows(64), None, run, progress=False)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="senders of signals are not known")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_that_reaches_every_process_saves(number, tmp_path):
    run = make_run(workers=2, batch_size=4)
    with within(30), pytest.raises(StoppedError, match=r"stopped after step 3; go on with: "):
        fit(Struck(number, itself=True), Forecasting(), windows(64), None, run, tmp_path, progress=False)
    assert fit(TinyModel(), Forecasting(), windows(64), None, run, tmp_path, progress=False).steps == 12


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="senders of signals are not known")
def test_a_process_that_prepares_batches_ends_when_the_training_says_so():
    started, batches = newly_started(), load(windows(64), [[0], [1], [2]], 1)
    next(batches)
    (process,) = started()
    process.terminate()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_loader_keeps_its_own_words(workers):
    with within(30), pytest.raises(DataError, match=r"^window 40 is damaged$"):
        train(refuse, workers=workers)


def test_an_error_of_another_kind_is_not_hidden():
    def broken():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(load(Faulty(broken), [[40]], 1, 60.0))


def test_a_loader_without_faults_gives_every_window():
    batches = list(every_window_once(Faulty(lambda: None), 7, World(), workers=2))
    assert sum(len(batch) for batch in batches) == 64


class Full(TinyModel):
    """Has no memory left in its third step, or when it is measured."""

    def __init__(self, training):
        super().__init__()
        self.calls, self.when = 0, training

    def forward(self, x, **_):
        self.calls += self.training
        if self.training == self.when and (self.calls == 3 or not self.training):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
        return super().forward(x)


@pytest.mark.parametrize("training", [True, False])
def test_full_memory_says_what_to_change(training, tmp_path):
    run = make_run(batch_size=12, accumulate=1, steps=8, eval_every=2)
    with pytest.raises(DeviceMemoryError) as caught:
        fit(Full(training), Forecasting(), windows(64), windows(30, 64), run, tmp_path, progress=False)
    said = str(caught.value)
    for part in (
        "step 3: the memory of cpu is full with train.batch_size=12 (12 in a forward pass of each process), "
        "train.accumulate=1.",
        "train.batch_size=6 with train.accumulate=2 (the same gradient)",
        "train.recompute=true",
        "train.precision=bfloat16",
        "more processes",
        "(PyTorch: CUDA out of memory. Tried to allocate 2.00 GiB.)",
    ):
        assert part in said
    assert "more\n" not in said


def test_the_advice_does_not_name_what_is_done_already(tmp_path):
    run = make_run(batch_size=1, recompute=False, precision="bfloat16")
    with pytest.raises(DeviceMemoryError) as caught:
        fit(Full(True), Forecasting(), windows(64), None, run, progress=False)
    assert "bfloat16" not in str(caught.value) and "train.batch_size=0" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "way"),
    [(9, "train.batch_size=3 with train.accumulate=6 "), (7, "train.batch_size=1 with "), (1, "")],
)
def test_a_batch_is_cut_into_equal_parts_only(batch_size, way):
    run = make_run(batch_size=batch_size, accumulate=2)
    with pytest.raises(DeviceMemoryError) as caught:
        fit(Full(True), Forecasting(), windows(64), None, run, progress=False)
    assert way in str(caught.value) and ("with train.accumulate" in str(caught.value)) == bool(way)


def test_batch_norms_make_a_smaller_batch_another_gradient():
    model = Full(True)
    model.also = torch.nn.BatchNorm1d(3)
    with pytest.raises(DeviceMemoryError, match=r"train\.batch_size=8 with train\.accumulate=2;"):
        fit(model, Forecasting(), windows(64), None, make_run(), progress=False)


def test_what_was_saved_before_the_memory_was_full_is_gone_on_with(tmp_path):
    run = make_run(eval_every=2)
    with pytest.raises(DeviceMemoryError):
        fit(Full(True), Forecasting(), windows(64), None, run, tmp_path, progress=False)
    fitted = fit(TinyModel(), Forecasting(), windows(64), None, run, tmp_path, progress=False)
    assert fitted.steps == 12
    record = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [line["step"] for line in record if line["event"] == "step"] == list(range(1, 13))
    assert any(line["event"] == "resumed" for line in record)


@pytest.mark.parametrize("error", [StalledError("it hangs"), DeviceMemoryError("it is full")])
def test_the_command_ends_with_one_line(error, monkeypatch, capsys):
    def broken(*_, **__):
        raise error

    monkeypatch.setattr("selectra.train.job.train_job", broken)
    with pytest.raises(SystemExit) as ended:
        main(["train", "dlinear", "data=series_file"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {error}\n"


def test_git_that_hangs_is_no_commit(monkeypatch, tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("selectra.train.record.GIT", 0.3)
    with within(0.3 + 5):
        assert environment()["commit"] is None
