"""Several processes: other numbers of them go on, one that fails is named in time, and restarts lose nothing."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed
from torch.nn import functional as F

from selectra.train import checkpoint
from selectra.train.batch_norms import Together
from tests.ops.split import together as in_group
from tests.train.processes import on_hosts, run_of, together, train

pytestmark = pytest.mark.dist


def losses(out: Path) -> list[float]:
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    return [line[key] for line in lines for key in ("loss", "norm", "mse") if key in line]


def test_other_numbers_of_processes_go_on(tmp_path):
    """1, 2, 4 and 1 processes take turns in one training, stopped by SIGTERM in between."""
    whole, out = tmp_path / "whole", tmp_path / "parts"
    settings = {"ema": 0.8, "save_every": 4}
    train(whole, run_of("none", 30, **settings), 0.0)
    # Each counts its own passes.
    for n, kind, at in ((1, "none", 2), (2, "ddp", 3), (4, "fsdp2", 3), (2, "fsdp2", 2)):
        said = together(n, out, run_of(kind, 30, **settings), 0.0, at, "term")
        assert [each and each["error"] for each in said] == ["StoppedError"] * n, said
    assert checkpoint.steps(out)[-1] == 10
    train(out, run_of("none", 30, **settings), 0.0)
    assert len(losses(whole)) == len(losses(out)) == 27
    assert losses(out) == pytest.approx(losses(whole), rel=1e-6, abs=1e-6)
    here, there = (load_file(folder / "model.safetensors") for folder in (whole, out))
    assert all(torch.allclose(value, there[name], rtol=1e-5, atol=1e-6) for name, value in here.items())


@pytest.mark.parametrize(("kind", "n"), [("ddp", 2), ("ddp", 3), ("fsdp2", 2)])
def test_processes_that_were_stopped_give_what_they_give_undisturbed(kind, n, tmp_path):
    """Bit by bit, with units that are dropped at random, gathered batches and a running mean.

    Sums of three numbers have several orders.
    """
    run = run_of(kind, 30, accumulate=2, ema=0.8)
    assert together(n, tmp_path / "whole", run, 0.2) is not None
    said = together(n, tmp_path / "parts", run, 0.2, 9, "term")
    assert [each and each["error"] for each in said] == ["StoppedError"] * n, said
    assert checkpoint.steps(tmp_path / "parts") == [4, 5]
    assert [each and each["error"] for each in together(n, tmp_path / "parts", run, 0.2)] == [""] * n
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    here, there = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(value, there[name]) for name, value in here.items())


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_a_process_that_ends_is_named(kind, tmp_path):
    first, last = together(2, tmp_path, run_of(kind, 20, save_every=2), at=6, act="dies")
    assert last is None
    assert first is not None and first["error"] == "RankError"
    assert "process 0 of 2 waited for the others" in first["text"] and "the same command goes on" in first["text"]
    assert first["at"] - (tmp_path / "record.jsonl").stat().st_mtime < 20
    # That of step 4 was being written at most.
    assert checkpoint.steps(tmp_path)[-1] in (2, 4)


def test_a_process_that_stalls_is_named_within_the_limit(tmp_path):
    """The limit is 3 s, and the tenth pass is the first of those that wait for it."""
    first, _ = together(2, tmp_path, run_of("ddp", 3), at=6, act="stalls")
    assert first is not None and first["error"] == "RankError" and "within 3 s (parallel.timeout)" in first["text"]
    last_step = (tmp_path / "record.jsonl").stat().st_mtime
    assert first["at"] - last_step < 3 + 5


@pytest.mark.parametrize("hosts", [1, 2])
def test_torchrun_starts_again_by_itself(hosts, tmp_path):
    """Two processes of one host, or one of each of two: one ends, all start again, and the losses are one process's."""
    alone, out = tmp_path / "alone", tmp_path / "out"
    out.mkdir()
    assert on_hosts(hosts, out) == [0] * hosts
    train(alone, run_of("none", 30, save_every=2), 0.0)
    lines = [json.loads(line) for line in (out / "record.jsonl").read_text().splitlines()]
    assert [line["processes"] for line in lines if line["event"] in ("started", "resumed")] == [2, 2]
    assert [line["event"] for line in lines].count("resumed") == 1
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, 13))
    assert losses(out) == pytest.approx(losses(alone), rel=1e-6, abs=1e-6)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 KiB in memory."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_named_and_loses_nothing(small_disk, tmp_path):
    whole, out = tmp_path / "whole", small_disk / "out"
    run = run_of("none", 30, eval_every=2)
    train(whole, run, 0.0)
    (said,) = together(1, out, run, 0.0, 7, "fills")
    assert said and said["error"] == "DataError" and "No space left on device" in said["text"], said
    assert f"that of step {checkpoint.steps(out)[-1]} is whole" in said["text"]
    assert checkpoint.steps(out)[-1] in (4, 6)
    (small_disk / "filler").unlink()
    train(out, run, 0.0)
    assert losses(out) == losses(whole)


def test_a_limit_of_file_sizes_is_named(tmp_path):
    (said,) = together(1, tmp_path / "out", run_of("none", 30, eval_every=2), 0.0, 7, "limits")
    assert said and said["error"] == "DataError" and "File too large" in said["text"], said
    assert checkpoint.steps(tmp_path / "out")[-1] in (4, 6)


def _normed() -> list[Tensor]:
    """A share of seven rows: three, two, two; in the second call the last process has none and was handed the first."""
    generator = torch.Generator().manual_seed(0)
    rank, mode, found = distributed.get_rank(), Together(), []
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for size in (7, 2):
        x, g = (torch.randn(size, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        weight, bias = (torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
        mode.counts = len(x[rank::3]) > 0
        own = (x[rank::3] if mode.counts else x[:1]).clone().requires_grad_()
        with mode:
            y = F.batch_norm(own, mean, var, weight, bias, training=True)
            (y * (g[rank::3] if mode.counts else g[:1] * 0)).sum().backward()
        found += (
            [y.detach(), own.grad, weight.grad, bias.grad] if mode.counts else [x[:0], x[:0], weight.grad, bias.grad]
        )
    return [*found, mean, var]


def test_batch_norms_see_the_whole_batch():
    generator = torch.Generator().manual_seed(0)
    parts, expected = in_group(3, _normed), []
    mean, var = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    for size in (7, 2):
        x, g = (torch.randn(size, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
        weight, bias = (torch.randn(4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
        whole = x.clone().requires_grad_()
        y = F.batch_norm(whole, mean, var, weight, bias, training=True)
        (y * g).sum().backward()
        expected += [y.detach(), whole.grad, weight.grad, bias.grad]
    for index, value in enumerate(expected):
        shares = [part[index] for part in parts]
        if index % 4 < 2:
            for rank in range(3):
                assert torch.allclose(shares[rank], value[rank::3], atol=1e-12)
        else:
            assert torch.allclose(torch.stack(shares).sum(0), value, atol=1e-12)
    for part in parts:
        assert torch.allclose(part[-2], mean, atol=1e-12) and torch.allclose(part[-1], var, atol=1e-12)
