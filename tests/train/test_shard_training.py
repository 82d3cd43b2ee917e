"""Training on shards by the command line: stopped and gone on with, with workers, with samples left out."""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from selectra.cli import main
from selectra.train import checkpoint
from selectra.train.state import State
from tests.data.shards import image_of, serving, write_shard, write_shards


def words(folder, out, *more):
    data = [f"data.path={folder}", f"data.val={folder}", "data.img_size=8", "data.standard=half", "data.lanes=4,2"]
    shape = ["model.dims=8,16", "model.depths=1,1", "model.patch_size=2", "model.d_state=2", "model.drop_path=0.2"]
    train = ["train.steps=9", "train.batch_size=8", "train.eval_every=4", "train.device=cpu", "data.flip=0.5"]
    return ["train", "vmamba_smoke", "data=image_shards", *data, *shape, *train, *more, "--out", str(out)]


def command(*given):
    torch.set_num_threads(1)
    with pytest.raises(SystemExit) as ended:
        main(list(given))
    return ended.value.code


def record(out, event):
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def losses(out):
    return [(line["step"], line["loss"], line["norm"]) for line in record(out, "step")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    write_shards(tmp_path_factory.mktemp("shards"), [9, 4, 12, 5])
    return tmp_path_factory.getbasetemp() / "shards0"


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert command(*words(folder, out)) == 0
    return out


@pytest.mark.parametrize("at", [3, 5])
def test_stopped_and_gone_on_with_is_the_whole_training(folder, whole, tmp_path, monkeypatch, at):
    advance = State.advance

    def stopping(self, batches):
        advance(self, batches)
        if self.at.step == at:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(State, "advance", stopping)
    command(*words(folder, tmp_path))
    monkeypatch.undo()
    # The step that was under way is finished.
    assert len(losses(tmp_path)) == at + 1
    assert command("train", str(tmp_path / "run.json")) == 0
    assert losses(tmp_path) == losses(whole)
    one, other = (load_file(out / checkpoint.WEIGHTS) for out in (tmp_path, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_workers_and_a_server_change_nothing(folder, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(folder) as server:
        pattern = server.url("part-{0000..0003}.tar")
        assert command("data", "shards", pattern, "--to", str(tmp_path / "index.json")) == 0
        given = words(tmp_path / "index.json", tmp_path / "out", "train.workers=2")
        assert command(*given) == 0
    assert losses(tmp_path / "out") == losses(whole)


def test_what_is_left_out_is_in_the_record(folder, tmp_path, capsys):
    good = {f"s{i}": {"png": image_of(i), "cls": str(i % 3).encode()} for i in range(20)}
    path = write_shard(tmp_path / "bad.tar", {**good, "broken": {"png": b"no", "cls": b"1"}})
    out = tmp_path / "out"
    assert command(*words(path, out, "data.corrupt=skip", f"data.val={folder}", "train.workers=2")) == 0
    found = record(out, "left_out")
    assert found and all("'broken'" in name for line in found for name in line["samples"])
    assert sum(line["count"] for line in found) == 3
    assert "left out, because unreadable: 1 sample;" in capsys.readouterr().out
    capsys.readouterr()
    assert command(*words(path, tmp_path / "other")) == 2
    assert "sample 20 ('broken') of" in capsys.readouterr().err


def test_trained_weights_are_evaluated_on_test_shards(folder, tmp_path, capsys):
    assert command(*words(folder, tmp_path, f"data.test={folder}", "train.steps=1")) == 0
    assert command("eval", str(tmp_path)) == 0
    # A long folder's name breaks the line anywhere.
    assert "all 30 examples" in " ".join(capsys.readouterr().out.split())
