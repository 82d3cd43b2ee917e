"""The switch that makes a training repeat itself bit for bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from selectra.errors import ConfigError
from selectra.train import deterministic as module
from selectra.train.deterministic import WORKSPACE, deterministic, fix_products
from tests.train.tiny import TinyModel, train

CPU = torch.device("cpu")


def settings() -> tuple[bool, ...]:
    enabled, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled: Any = torch.utils.deterministic
    return enabled, warn_only, torch.backends.cudnn.benchmark, filled.fill_uninitialized_memory


def test_what_has_no_repeatable_form_is_refused_by_name_and_settings_come_back():
    def put() -> None:
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))

    before = settings()
    refused = pytest.raises(ConfigError, match=r"train\.deterministic=true, and 'put_' has no such form on cpu")
    with refused, deterministic(True, CPU):
        assert settings() == (True, False, False, False)
        put()
    assert settings() == before
    # The tests themselves ask for warnings.
    with deterministic(False, CPU), pytest.warns(UserWarning, match="put_"):
        put()


def test_other_errors_stay_as_they_are():
    with pytest.raises(RuntimeError, match="mine"), deterministic(True, CPU):
        raise RuntimeError("mine")


@pytest.mark.parametrize("on", [True, False])
def test_a_training_turns_it_on_for_its_steps_alone(on, tmp_path, monkeypatch):
    seen, forward, before = set(), TinyModel.forward, settings()

    def watched(self, *args, **kwargs):
        seen.add(settings())
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(TinyModel, "forward", watched)
    train(tmp_path, steps=2, deterministic=on)
    assert seen == {(True, False, False, False) if on else before}
    assert settings() == before


def test_on_a_gpu_products_must_have_been_told_in_time(monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    refused = pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment")
    with refused, deterministic(True, torch.device("cuda")):
        pass
    monkeypatch.setenv(WORKSPACE, ":16:8")
    fix_products()
    assert os.environ[WORKSPACE] == ":16:8"
    monkeypatch.delenv(WORKSPACE)
    fix_products()
    assert os.environ.pop(WORKSPACE) in module.FIXED


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["vim_smoke", "vmamba_smoke", "simba_smoke", "resnet_smoke"])
def test_killed_on_a_gpu_it_goes_on_bit_for_bit(name, tmp_path):
    words = f"train {name} data=images data.path=shapes task=classification train.deterministic=true train.device=cuda "
    words += "train.steps=40 train.batch_size=16 train.eval_every=10 train.save_every=5 train.precision=bfloat16"

    def begin(out: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "selectra", *words.split(), "--out", str(out)])

    assert begin(tmp_path / "whole").wait(120) == 0
    process = begin(tmp_path / "killed")
    until = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoints" / "step-000000015").is_dir():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert begin(tmp_path / "killed").wait(120) == 0
    whole, killed = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("whole", "killed"))
    assert whole == killed
