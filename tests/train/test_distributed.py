"""Two gloo processes train as one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.train.tiny import train

ROOT = Path(__file__).parents[2]


def read(out: Path, event: str) -> list[dict]:
    found = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]


@pytest.mark.dist
def test_two_processes_give_the_losses_of_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "tests.train.tiny", str(two), "0", "0.0"]
    subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=120, capture_output=True)
    train(one, dropout=0.0)
    assert read(two, "started")[0]["processes"] == 2
    for event, key in (("step", "loss"), ("step", "norm"), ("metrics", "mse"), ("metrics", "mae")):
        expected = [line[key] for line in read(one, event)]
        assert len(expected) in (3, 12)
        assert [line[key] for line in read(two, event)] == pytest.approx(expected, rel=1e-6, abs=1e-6)
