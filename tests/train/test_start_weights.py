"""Trainings that begin with the weights of another one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.errors import DataError
from selectra.spec import Run, Spec, Train
from selectra.train import job


def image_run(out: Path, **train: Any) -> Run:
    settings = {"steps": 2, "batch_size": 8, "device": "cpu", **train}
    shape = {"dims": (8, 16), "depths": (1, 1), "d_state": 2, "patch_size": 4}
    return Run(
        model=Spec("vmamba_smoke", **shape), data=Spec("images", path="shapes", per_class=4, val=0.1),
        task=Spec("classification"), train=Train(**settings),
    )  # fmt: skip


def test_weights_to_start_from_on_other_classes(tmp_path, capsys):
    console = Console(width=300)
    job.train_job(image_run(tmp_path), tmp_path / "one", console)
    path = str(tmp_path / "one" / "model.safetensors")
    run = image_run(tmp_path, pretrained=path, freeze="all")
    pytest.importorskip("sklearn")
    other = run.model_copy(update={"data": Spec("images", path="digits", in_channels=3, img_size=32, per_class=4)})
    job.train_job(other, tmp_path / "two", console)
    assert "starting afresh: head.bias, head.weight" in capsys.readouterr().out
    from safetensors.torch import load_file

    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert torch.equal(one["layers.0.blocks.0.mixer.out_proj.weight"], two["layers.0.blocks.0.mixer.out_proj.weight"])
    # Evaluation and going on need the file no more.
    (tmp_path / "one" / "model.safetensors").unlink()
    job.evaluate_job(tmp_path / "two", "test", None)
    job.train_job(other, tmp_path / "two", console)
    with pytest.raises(DataError, match=r"there is no file"):
        job.train_job(other, tmp_path / "three", console)


def test_positions_of_no_square_are_resized_from_a_trainings_file(tmp_path, capsys):
    """Such a file says its rows and columns."""
    console = Console(width=300)
    shape = Spec("vim_smoke", d_model=8, depth=1, d_state=2)
    run = image_run(tmp_path).model_copy(update={"model": shape})
    job.train_job(
        run.model_copy(update={"data": Spec("images", img_size=(24, 32), per_class=4)}), tmp_path / "one", console
    )
    train = run.train.model_copy(update={"pretrained": str(tmp_path / "one" / "model.safetensors")})
    for out, size in (("two", (24, 48)), ("three", (48, 16))):
        other = {"data": Spec("images", img_size=size, per_class=4), "train": train}
        job.train_job(run.model_copy(update=other), tmp_path / out, console)
        assert "(resized: pos_embed)" in capsys.readouterr().out
