"""Two gloo processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import tiny_images
from tests.train.tiny import train

ROOT = Path(__file__).parents[2]


def read(out: Path, event: str) -> list[dict]:
    found = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


def in_two_processes(*words: str) -> None:
    """Run a module of the tests as two processes that torchrun starts."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launcher, "-m", *words], env=environment, cwd=ROOT, check=True, timeout=120, capture_output=True)


@pytest.mark.dist
def test_two_processes_give_the_losses_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    in_two_processes("tests.train.tiny", str(two), "0", "0.0")
    train(one, dropout=0.0)
    assert read(two, "started")[0]["processes"] == 2
    for event, key in (("step", "loss"), ("step", "norm"), ("metrics", "mse"), ("metrics", "mae")):
        expected = [line[key] for line in read(one, event)]
        assert len(expected) in (3, 12)
        assert [line[key] for line in read(two, event)] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.dist
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_see_the_images_of_one_as_one_sees_them(accumulate, tmp_path):
    """Views and mixtures follow from seed, pass and image, so that they are those of one process; the mean, too."""
    one, two = tmp_path / "one", tmp_path / "two"
    in_two_processes("tests.train.tiny_images", str(two), str(accumulate))
    tiny_images.train(one, accumulate=accumulate)
    assert read(two, "started")[0]["processes"] == 2
    for event, key in (("step", "loss"), ("step", "norm"), ("metrics", "top1"), ("metrics", "loss")):
        expected = [line[key] for line in read(one, event)]
        assert len(expected) == (11 if event == "step" else 3)
        assert [line[key] for line in read(two, event)] == pytest.approx(expected, rel=1e-6, abs=1e-6), key
    here, there = (load_file(out / "model.safetensors") for out in (one, two))
    assert all(torch.allclose(value, there[name], rtol=1e-5, atol=1e-6) for name, value in here.items())
