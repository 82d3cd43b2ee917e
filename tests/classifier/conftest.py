"""Runs of images as a training leaves them, with random weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import selectra.models  # noqa: F401
from selectra.registry import models
from selectra.spec import Run, Spec
from selectra.train.checkpoint import WEIGHTS, copy_weights, save_weights
from selectra.train.record import write_run

CLASSES = ("cat", "dog", "horse", "ship", "frog", "truck")
SIZE = 32

MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(model: str = "vmamba_smoke", channels: int = 3, about: dict[str, Any] | None = None, **args: Any) -> Path:
        out, spec = tmp_path / model, Spec(model, **args)
        out.mkdir()
        torch.manual_seed(0)
        facts = {"n_classes": len(CLASSES), "in_channels": channels, "img_size": SIZE}
        run = Run(model=spec, data=Spec("series_file"), task=Spec("forecasting"), name="trial")
        found = {"classes": list(CLASSES), "img_size": [SIZE, SIZE], "in_channels": channels}
        found |= {"mean": [0.4] * channels, "std": [0.2] * channels}
        write_run(out, run, None, found if about is None else about)
        save_weights(out / WEIGHTS, copy_weights(models.build(spec, facts)), {})
        return out

    return make


@pytest.fixture
def make_image(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "photo.png", width: int = SIZE, height: int = SIZE, seed: int = 0) -> Path:
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
        return tmp_path / name

    return make
