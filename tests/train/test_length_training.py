"""Trainings whose sequences are split over processes: two gloo processes give what one gives."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from selectra.data.text import TextBatch
from selectra.errors import ConfigError
from selectra.spec import Run, Spec
from selectra.train.batches import part_of
from selectra.train.job import check, train_job
from selectra.train.parallel import World
from selectra.train.steps import Steps
from selectra.train.stop import StoppedError
from tests.train import texts
from tests.train.processes import spawned


def run_of(folder: Path, kind: str, **train: Any) -> Run:
    """A recipe on a file, in pieces of 17 tokens, of which the second process has eight."""
    path = folder / "text.txt"
    if not path.exists():
        path.write_text("".join(np.random.RandomState(0).choice(list("abcdefg"), 900).repeat(2)))
    data = Spec("text_file", path=str(path), seq_len=17, packed=False, shares=(0.8, 0.2, 0.0))
    return texts.run_of(kind=kind, **train).model_copy(update={"data": data})


def train(out: Path, run: Run) -> dict[str, str]:
    """As the command line does it; what went wrong, if anything."""
    torch.set_num_threads(1)
    try:
        train_job(run, out, Console(quiet=True))
    except (ConfigError, RuntimeError) as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {}


def read(out: Path, event: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


@pytest.mark.dist
@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "recompute": True, "ema": 0.9}])
def test_two_processes_give_the_losses_of_one(settings: dict[str, Any], tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert train(one, run_of(tmp_path, "none", **settings)) == {}
    assert spawned(2, train, two, run_of(tmp_path, "length", **settings)) == [{}, {}]
    assert read(two, "started")[0]["processes"] == 2
    for event, names, count in (("step", ("loss", "norm"), texts.STEPS), ("metrics", ("loss", "accuracy"), 1)):
        for name in names:
            expected = [line[name] for line in read(one, event)]
            assert len(expected) == count
            assert [line[name] for line in read(two, event)] == pytest.approx(expected, rel=1e-6), name
    here, there = (load_file(out / "model.safetensors") for out in (one, two))
    assert here.keys() == there.keys()
    # AdamW makes steps of 0.01 of rounding where a gradient is next to nothing.
    away = {name: float((value - there[name]).abs().max()) for name, value in here.items()}
    assert max(away.values()) < 1e-4, away
    samples = [[line["rate"] * line["seconds"] for line in read(out, "step")] for out in (one, two)]
    assert samples[1] == pytest.approx(samples[0])


@pytest.mark.dist
def test_it_goes_on_and_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    """Half of a training by two processes, the rest by one; then a model with attention."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    half = run_of(tmp_path, "length", save_every=3)
    assert train(whole, run_of(tmp_path, "none")) == {}
    assert spawned(2, _until_three, out, half) == ["stopped", "stopped"]
    assert train(out, run_of(tmp_path, "none", save_every=3)) == {}
    assert [line["step"] for line in read(out, "step")] == list(range(1, texts.STEPS + 1))
    losses = [[line["loss"] for line in read(folder, "step")] for folder in (out, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    model = run_of(tmp_path, "length").model_copy(update={"model": Spec("gpt_smoke")})
    for said in spawned(2, train, tmp_path / "gpt", model):
        assert said["error"] == "ConfigError" and "attention needs the whole sequence" in said["text"]


def _until_three(out: Path, run: Run) -> str:
    """Stop at the third step, as SIGTERM asks for."""

    def one_step(self: Steps) -> float:
        self.flag.asked = self.state.at.step == 2
        return step(self)

    step, Steps.one_step = Steps.one_step, one_step
    try:
        train_job(run, out, Console(quiet=True))
    except StoppedError:
        return "stopped"
    return ""


def test_a_part_keeps_its_targets() -> None:
    tokens = torch.arange(14).view(2, 7)
    batch = TextBatch(tokens, tokens + 1)
    assert part_of(batch, World(1, 3)) is batch
    parts = [part_of(batch, World(rank, 3, split=True)) for rank in range(3)]
    assert torch.equal(torch.cat([part.tokens for part in parts], 1), tokens)
    assert all(torch.equal(part.targets, part.tokens + 1) for part in parts)


def test_what_has_no_length_to_split_is_refused(tmp_path: Path) -> None:
    packed = TextBatch(torch.zeros(1, 4), torch.zeros(1, 4), torch.tensor([0, 2, 4], dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"data\.packed=false"):
        part_of(packed, World(0, 2, split=True))
    with pytest.raises(ConfigError, match="a Tensor is not split so"):
        part_of(torch.zeros(2), World(0, 2, split=True))
    series = Run(model=Spec("tsm2_smoke"), data=Spec("etth1"), task=Spec("forecasting"))
    length = series.parallel.model_copy(update={"kind": "length"})
    with pytest.raises(ConfigError, match="the task is for series"):
        check(series.model_copy(update={"parallel": length}))
    with pytest.raises(ConfigError, match="start it with torchrun"):
        train_job(run_of(tmp_path, "length"), tmp_path / "out", Console())
