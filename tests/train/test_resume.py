"""Training that is interrupted, killed or damaged."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from selectra.errors import ConfigError, DataError, RankError
from selectra.train import checkpoint
from selectra.train import state as state_module
from selectra.train.parallel import World, _others_named
from selectra.train.record import Record
from selectra.train.snapshots import Snapshot, Snapshots
from selectra.train.state import State
from selectra.train.stop import StalledError, StoppedError
from tests.train.tiny import TinyModel, train

ROOT = Path(__file__).parents[2]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float, float]]:
    return [(line["step"], line["loss"], line["lr"]) for line in lines(out) if line["event"] == "step"]


def evaluations(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["mse"]) for line in lines(out) if line["event"] == "metrics"]


def same_weights(one: TinyModel, other: TinyModel) -> bool:
    other_state = other.state_dict()
    return all(torch.equal(value, other_state[name]) for name, value in one.state_dict().items())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TinyModel]:
    """The uninterrupted training."""
    out = tmp_path_factory.mktemp("whole")
    return out, train(out)[0]


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, signum: int) -> None:
    """Send a signal during forward pass `number`."""
    calls, forward = iter(range(1, 10_000)), TinyModel.forward

    def counted(self, *args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signum)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TinyModel, "forward", counted)


# Forward pass 5 to 6 belong to the first evaluation.
@pytest.mark.parametrize("number", [1, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, monkeypatch, whole, number, signum):
    with monkeypatch.context() as patch:
        stop_at(patch, number, signum)
        with pytest.raises(StoppedError) as stopped:
            train(tmp_path)
    assert stopped.value.command == f"selectra train {tmp_path}/run.json"
    # The step was finished, and is what is saved.
    assert 0 < (stopped.value.step or 0) == len(losses(tmp_path)) < 12
    assert checkpoint.steps(tmp_path)[-1] == stopped.value.step
    # Draws in between must not matter.
    torch.rand(7)
    model, fitted = train(tmp_path)
    assert fitted.stopped_by == "steps"
    assert losses(tmp_path) == losses(whole[0])
    assert evaluations(tmp_path) == evaluations(whole[0])
    assert same_weights(model, whole[1])
    assert [line["event"] for line in lines(tmp_path)].count("resumed") == 1


def test_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    train(tmp_path)
    assert signal.getsignal(signal.SIGINT) is before


def start(out: Path, pause: float) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-m", "tests.train.tiny", str(out), str(pause), "0.1"]
    return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def wait_for(out: Path, text: str) -> None:
    for _ in range(6000):
        if (out / "record.jsonl").is_file() and text in (out / "record.jsonl").read_text():
            return
        time.sleep(0.05)
    raise AssertionError(text)


def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, whole):
    process = start(tmp_path, 0.1)
    # After the first checkpoint, at step 4.
    wait_for(tmp_path, '"step": 6')
    process.kill()
    process.wait()
    assert 4 in checkpoint.steps(tmp_path)
    model, _ = train(tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    assert evaluations(tmp_path) == evaluations(whole[0])
    assert same_weights(model, whole[1])
    assert not [*tmp_path.glob(".*"), *(tmp_path / "checkpoints").glob(".*")]


def test_a_finished_training_is_not_repeated(tmp_path, whole):
    train(tmp_path)
    before = losses(tmp_path)
    model, fitted = train(tmp_path)
    assert fitted.steps == 12
    assert losses(tmp_path) == before
    assert same_weights(model, whole[1])


@pytest.mark.parametrize("file", ["__0_0.distcp", "state.pt", ".metadata", "sums.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text", "gone"])
def test_damaged_checkpoint_is_said_in_words(tmp_path, damage, file, whole):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = checkpoint.folder(tmp_path, 12) / file
    content = bytearray(path.read_bytes())
    if damage == "flip":
        middle = len(content) // 3
        content[middle] ^= 0xFF
    path.write_bytes(
        {"cut": content[: -len(content) // 3], "flip": content, "empty": b"", "text": b"hello", "gone": b""}[damage]
    )
    if damage == "gone":
        path.unlink()
    with pytest.raises(DataError, match=r"checkpoint.*damaged.*Delete it"):
        train(tmp_path)


def test_behind_a_damaged_checkpoint_there_is_another(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    assert checkpoint.steps(tmp_path) == [8, 12]
    shutil.rmtree(checkpoint.folder(tmp_path, 12))
    model, _ = train(tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    assert same_weights(model, whole[1])
    assert checkpoint.steps(tmp_path) == [8, 12]


class Evil:
    """Something that a pickle could call."""

    def __reduce__(self):
        return os.system, ("true",)


def test_nothing_in_a_checkpoint_is_called(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    path = checkpoint.folder(tmp_path, 12)
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    sums = json.loads((path / "sums.json").read_text())
    (path / "sums.json").write_text(json.dumps({**sums, ".metadata": zlib.crc32((path / ".metadata").read_bytes())}))
    with pytest.raises(DataError, match=r"damaged.*names (posix|nt)\.system"):
        train(tmp_path)


def save_as_one_file(state: State, record: Record) -> None:
    """A checkpoint as it was before there were folders."""
    assert state.out is not None
    saved = {
        "format": 1,
        "run": state.run.to_json(),
        "data": None,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "schedule": state.schedule.state_dict(),
        "scaler": state.scaler.state_dict(),
        "mean": None if state.mean is None else state.mean.state_dict(),
        "progress": asdict(state.at),
        "best": state.best,
        "generators": [checkpoint.random_state()],
        "record": record.length(),
    }
    torch.save(saved, state.out / "checkpoint.pt")


def test_an_earlier_versions_checkpoint_is_gone_on_with(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        patch.setattr(State, "save", save_as_one_file)
        stop_at(patch, 7, signal.SIGTERM)
        with pytest.raises(StoppedError):
            train(tmp_path)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint.pt"
    model, _ = train(tmp_path)
    assert losses(tmp_path) == losses(whole[0])
    assert same_weights(model, whole[1])
    assert checkpoint.latest(tmp_path) == checkpoint.folder(tmp_path, 12)


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "text"])
def test_a_damaged_file_of_an_earlier_version_is_said_in_words(tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    torch.save({"format": 1, "model": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0xFF if damage == "flip" else 0
    path.write_bytes({"cut": content[:-100], "flip": content, "empty": b"", "text": b"hello"}[damage])
    with pytest.raises(DataError, match=r"checkpoint.*damaged.*Delete it"):
        train(tmp_path, steps=4)


def test_checkpoint_of_another_format(tmp_path):
    torch.save({"format": 0}, tmp_path / "checkpoint.pt")
    with pytest.raises(DataError, match="format 0"):
        train(tmp_path)


def test_another_run_in_the_folder_is_refused(tmp_path):
    train(tmp_path, steps=4)
    with pytest.raises(ConfigError, match=r"another training: train.steps is 4 there and 8 now"):
        train(tmp_path, steps=8)


def test_a_cut_record_is_refused(tmp_path):
    train(tmp_path, steps=4)
    (tmp_path / "record.jsonl").write_text("")
    with pytest.raises(DataError, match="record"):
        train(tmp_path, steps=4)


def test_an_error_leaves_the_former_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("whole")
    with pytest.raises(RuntimeError), checkpoint.replacing(path) as partial:
        partial.write_text("ha")
        raise RuntimeError
    assert path.read_text() == "whole"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


class CrashError(Exception):
    """Stands for whatever ends a process at a bad moment."""


def test_what_was_read_is_not_written_again(tmp_path, monkeypatch, whole):
    saved, save = [], State.save

    def counted(self, record):
        saved.append(self.at.step)
        if len(saved) == 2:
            raise CrashError
        save(self, record)

    monkeypatch.setattr(State, "save", counted)
    with pytest.raises(CrashError):
        train(tmp_path)
    assert saved == [4, 8] and checkpoint.steps(tmp_path) == [4]
    model, _ = train(tmp_path)
    assert saved == [4, 8, 8, 12]
    assert same_weights(model, whole[1])


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path, monkeypatch, whole):
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(StoppedError):
            train(tmp_path)
    (step,) = checkpoint.steps(tmp_path)
    path = checkpoint.folder(tmp_path, step)
    # As it is between the two changes of names.
    path.rename(path.with_name(checkpoint.REPLACED + path.name))
    model, _ = train(tmp_path)
    assert [line["event"] for line in lines(tmp_path)].count("resumed") == 1
    assert losses(tmp_path) == losses(whole[0])
    assert same_weights(model, whole[1])


def test_a_process_whose_files_are_all_missing_is_noticed(tmp_path, whole):
    out = tmp_path / "copy"
    shutil.copytree(whole[0], out)
    for step in checkpoint.steps(out):
        for file in checkpoint.folder(out, step).glob("__0*"):
            file.unlink()
    with pytest.raises(DataError, match="is missing"):
        train(out)


def test_how_steps_are_computed_is_not_taken_from_a_checkpoint(tmp_path, monkeypatch):
    """FSDP2 on a GPU takes fused steps, whose counts lie on the device; DDP does not."""
    with monkeypatch.context() as patch:
        plain = state_module._without_tensors
        patch.setattr(state_module, "_without_tensors", lambda group: plain(group) | {"fused": True})
        stop_at(patch, 3, signal.SIGTERM)
        with pytest.raises(StoppedError):
            train(tmp_path)
    found, resume = [], State.resume

    def resumed(self):
        length = resume(self)
        found.extend(group["fused"] for group in self.optimizer.param_groups)
        return length

    monkeypatch.setattr(State, "resume", resumed)
    train(tmp_path)
    assert found and not any(found)


@pytest.mark.parametrize("error", [StalledError("a loader timed out (train.load_timeout)"), StoppedError(3, "x/nccl")])
def test_an_own_error_is_not_another_processs(monkeypatch, error):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(type(error)), _others_named(5):
        raise error
    with pytest.raises(RankError), _others_named(5):
        raise RuntimeError("gloo: connection closed by peer")


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    weights = {"b": torch.arange(3.0), "a": torch.arange(5, dtype=torch.int64), "tied": torch.ones(2, 2)}
    metadata = {name: f'{{"ä": "{name}\n"}}' for name in "zyxwvutsr"}
    found = set()
    for _ in range(4):
        checkpoint.save_weights(tmp_path / "weights.safetensors", weights, metadata)
        found.add((tmp_path / "weights.safetensors").read_bytes())
    assert len(found) == 1
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), value) for name, value in weights.items())


def test_parts_of_some_processes_are_no_checkpoint(tmp_path):
    """Where an error ends the group of processes, PyTorch takes the parts of one for all."""
    snapshots = Snapshots(tmp_path, World(), 2)
    snapshots.save(1, {"x": torch.ones(4)}, {})
    snapshots.finish()
    snapshots.world = World(size=2)
    snapshots.save(2, {"x": torch.ones(4)}, {})
    with pytest.raises(DataError, match=r"1 of 2 processes wrote their parts; that of step 1 is whole"):
        snapshots.finish()
    assert checkpoint.steps(tmp_path) == [1]


def test_a_tensor_that_lacks_a_part_is_not_read(tmp_path):
    snapshots = Snapshots(tmp_path, World(), 2)
    snapshots.save(1, {"x": torch.ones(4)}, {})
    snapshots.finish()
    snapshot = Snapshot(checkpoint.folder(tmp_path, 1), World())
    described: Any = snapshot.described["x"]
    described.chunks.clear()
    with pytest.raises(DataError, match=r"damaged.*of 'x' it has 0 of 4 numbers"):
        snapshot.read({"x": torch.empty(4)})
