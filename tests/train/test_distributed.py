"""Two gloo processes train as one does."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.processes import free_port, spawned
from tests.train.trainings import TRAININGS, every

pytestmark = pytest.mark.dist
# By training: how many steps and evaluations, and what is compared beside the steps' losses and norms.
EXPECTED = {
    "series": (12, 3, ("mse", "mae")),
    "images": (6, 2, ("top1", "loss")),
    "images, accumulated": (6, 2, ("top1", "loss")),
    "objects": (2, 1, ("map", "mask_map50")),
}


def read(out: Path, event: str) -> list[dict]:
    found = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings in two processes that are started once."""
    folder = tmp_path_factory.mktemp("two")
    assert spawned(2, every, folder, [free_port() for _ in TRAININGS]) == [None, None]
    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_processes_give_the_losses_of_one(name, two, tmp_path):
    """Views, mixtures and samples follow from seed, pass and image, so that they are those of one process; the mean
    of weights, too.
    """
    steps, evaluations, metrics = EXPECTED[name]
    TRAININGS[name](tmp_path)
    assert read(two / name, "started")[0]["processes"] == 2
    for event, keys, count in (("step", ("loss", "norm"), steps), ("metrics", metrics, evaluations)):
        for key in keys:
            expected = [line[key] for line in read(tmp_path, event)]
            assert len(expected) == count
            assert [line[key] for line in read(two / name, event)] == pytest.approx(expected, rel=1e-6, abs=1e-6), key
    here, there = (load_file(out / "model.safetensors") for out in (tmp_path, two / name))
    # AdamW makes whole steps of what rounding leaves of gradients that are zero, which that model has.
    assert name == "objects" or all(
        torch.allclose(value, there[key], rtol=1e-5, atol=1e-6) for key, value in here.items()
    )
