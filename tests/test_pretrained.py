"""Weights from files into image models."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from selectra.errors import DataError
from selectra.models import RSMamba, Simba, VideoMamba, Vim, VMamba
from selectra.pretrained import fit_channels, load_pretrained, read_state
from selectra.registry import models
from selectra.spec import Spec

SMALL: dict[str, Any] = {"d_model": 8, "depth": 2, "d_state": 2, "patch_size": 8, "img_size": 32, "n_classes": 5}
BACK = {"A_log": "A_b_log", "D": "D_b", "conv1d": "conv1d_b", "x_proj": "x_proj_b", "dt_proj": "dt_proj_b"}


def vim(**changes: Any) -> Vim:
    return Vim(**{**SMALL, **changes}).eval()


def official(model: Vim | VideoMamba) -> dict[str, Tensor]:
    """As the official code names it."""
    state = {}
    for key, value in model.state_dict().items():
        before, back, name = key.partition(".back.")
        first, dot, rest = name.partition(".")
        state[f"{before}.{BACK[first]}{dot}{rest}" if back else key.replace(".ahead.", ".")] = value
    return state


def image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("names", ["ours", "official"])
def test_files_of_both_names_are_read(suffix, names, tmp_path: Path):
    model, x, path = vim(), image(), tmp_path / f"weights{suffix}"
    state = model.state_dict() if names == "ours" else official(model)
    if suffix == ".pth":
        torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    else:
        save_file(state, path)
    other = vim()
    assert not torch.allclose(other(x), model(x))
    loaded = load_pretrained(other, path)
    assert torch.equal(other(x), model(x)) and loaded == ((), ())


def test_positions_heads_and_channels_are_fitted():
    model = vim()
    with torch.no_grad():
        model.pos_embed.normal_()
    other: Any = vim(img_size=(48, 40), n_classes=3, in_channels=1)
    head = other.head.weight.clone()
    loaded = load_pretrained(other, official(model))
    assert loaded.resized == ("patch_embed.proj.weight", "pos_embed")
    assert loaded.fresh == ("head.bias", "head.weight") and torch.equal(other.head.weight, head)
    assert torch.equal(other.pos_embed[:, 15], model.pos_embed[:, 8])
    x = torch.randn(1, 1, 48, 40)
    with torch.no_grad():
        # On one gray image in all channels both see the same, at any size.
        assert torch.allclose(other.embed(x), model.embed(x.expand(-1, 3, -1, -1)), atol=1e-5)


@pytest.mark.parametrize("family", ["vim_smoke", "vit_smoke"])
@pytest.mark.parametrize("size", [(24, 72), (48, 16), (24, 32)])
def test_trainings_files_say_rows_and_columns(family, size, tmp_path: Path):
    """Positions of no square are resized, and those of as many, but other rows too."""
    path = tmp_path / "model.safetensors"

    def make(img_size: tuple[int, int]) -> Any:
        return models.build(Spec(family, n_classes=3, img_size=img_size, patch_size=8)).eval()

    model, other, key = make((24, 32)), make(size), "pos_embed" if family == "vim_smoke" else "body.pos_embed"
    state = model.state_dict()
    state[key] = torch.randn_like(state[key])
    save_file(state, path, {"grid": "3,4"})
    assert load_pretrained(other, path).resized == ((key,) if size != (24, 32) else ())
    again = make(size)
    load_pretrained(again, state, grid=(3, 4))
    assert torch.equal(other.state_dict()[key], again.state_dict()[key])
    if family == "vim_smoke":
        slot, own = other.slots(other.grid[0] * other.grid[1])[0], model.slots(12)[0]
        assert torch.equal(other.pos_embed[:, slot], state[key][:, own])
    if size == (48, 16):
        assert state[key].shape == other.state_dict()[key].shape and not torch.equal(
            state[key], again.state_dict()[key]
        )


def test_channels_keep_their_sum():
    weight = torch.rand(4, 3, 2, 2)
    for c in (1, 2, 4, 13):
        y = fit_channels(weight, c)
        assert y.shape == (4, c, 2, 2)
    assert torch.allclose(fit_channels(weight, 6).sum(1), weight.sum(1))
    assert torch.allclose(fit_channels(weight, 1), weight.sum(1, keepdim=True))


def test_clips_of_another_length():
    model, other = (VideoMamba(**SMALL, n_frames=n) for n in (4, 8))
    with torch.no_grad():
        assert model.time_embed is not None and other.time_embed is not None
        model.time_embed.copy_(torch.arange(4.0)[None, :, None].expand_as(model.time_embed))
    state = {key.replace("time_embed", "temporal_pos_embedding"): value for key, value in official(model).items()}
    assert load_pretrained(other, state).resized == ("time_embed",)
    assert torch.allclose(other.time_embed[0, 1:-1, 0].diff(), torch.tensor(0.5))


@pytest.mark.parametrize(
    "make",
    [
        lambda: VMamba(dims=(8, 12), depths=(1, 1), d_state=2, n_classes=5),
        lambda: Simba(d_stem=4, dims=(8, 16), depths=(1, 1), mlp_ratios=(2, 2), d_state=2, n_classes=5),
        lambda: RSMamba(**{**SMALL, "stride": 4}),
        lambda: VideoMamba(**SMALL),
    ],
)
def test_every_model_reads_its_own(make, tmp_path: Path):
    model, other, x = make().eval(), make().eval(), image()
    torch.save(model.state_dict(), tmp_path / "own.pt")
    assert load_pretrained(other, tmp_path / "own.pt") == ((), ())
    assert torch.equal(other(x), model(x))


def test_a_checkpoint_of_another_model_is_named():
    with pytest.raises(DataError, match=r"does not fit this Vim: it lacks .*; it has unknown .*another model"):
        load_pretrained(vim(), VMamba(dims=(8,), depths=(1,)).state_dict())
    with pytest.raises(DataError, match=r"shapes differ: 'cls_token' \(1, 1, 16\) for \(1, 1, 8\).* more"):
        load_pretrained(vim(), vim(d_model=16).state_dict())
    with pytest.raises(DataError, match=r"it lacks layers\.1\."):
        load_pretrained(vim(), vim(depth=1).state_dict())
    state = vim().state_dict()
    state["pos_embed"] = torch.zeros(1, 13, 8)
    with pytest.raises(DataError, match=r"'pos_embed' \(1, 13, 8\) for \(1, 17, 8\)"):
        load_pretrained(vim(), state)


class Malicious:
    """Would run a command when unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def test_a_malicious_pickle_runs_nothing(tmp_path: Path):
    path, mark = tmp_path / "bad.pth", tmp_path / "ran"
    torch.save({"model": {"weight": torch.zeros(1)}, "evil": Malicious(mark)}, path)
    with pytest.raises(DataError, match=rf"could run its code: it asks for {os.system.__module__}.system\. Save the"):
        load_pretrained(vim(), path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_any_age_are_told_from_damage(protocol, tmp_path: Path):
    path, mark = tmp_path / "bad.pth", tmp_path / "ran"
    path.write_bytes(pickle.dumps({"evil": Malicious(mark)}, protocol=protocol))
    with pytest.raises(DataError, match=r"could run its code: it asks for \w+\.system") as caught:
        read_state(path)
    assert "weights_only" not in str(caught.value) and not mark.exists()
    torch.save(torch.nn.Linear(2, 2), path, _use_new_zipfile_serialization=protocol > 0)
    with pytest.raises(DataError, match=r"it asks for torch\.nn\.modules\.linear\.Linear.*state_dict"):
        read_state(path)


def test_the_readmes_example(tmp_path: Path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "load_pretrained" in block]
    names: dict[str, Any] = {"images": torch.randn(1, 13, 256, 192)}
    (file,) = re.findall(r'"([\w.]+\.pth)"', code)
    torch.save({"model": official(Vim())}, tmp_path / file)
    exec(code.replace(file, str(tmp_path / file)), names)
    assert names["scores"].shape == (1, 21) and names["grids"][0].shape == (1, 16, 12, 192)


def test_files_that_hold_no_weights_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="there is no file"):
        read_state(tmp_path / "nowhere.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no weights")
        with pytest.raises(DataError, match=name):
            read_state(tmp_path / name)
    with pytest.raises(DataError, match=r"is a folder; name a file of weights in it, such as 'text\.pth'"):
        read_state(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="is a folder; name a file of weights; it holds none"):
        read_state(tmp_path / "empty")
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(DataError, match="holds no state"):
        read_state(tmp_path / "list.pt")


def test_damaged_files_are_called_damaged(tmp_path: Path):
    path, generator = tmp_path / "rnd.pth", np.random.default_rng(0)
    whole, old = tmp_path / "whole.pth", tmp_path / "old.pth"
    torch.save({"weight": torch.zeros(1000)}, whole)
    torch.save({"weight": torch.zeros(1000)}, old, _use_new_zipfile_serialization=False)
    contents = [b"", b"<!DOCTYPE html>", b"version https://git-lfs.github.com/spec/v1", b'{"a": 1}']
    contents += [generator.bytes(4096) for _ in range(30)]
    contents += [each.read_bytes()[:size] for each in (whole, old) for size in (100, 200, 300, 2000)]
    # Long enough for PyTorch's reader to look for the end of an archive.
    torch.save({str(i): torch.zeros(100) for i in range(30)}, whole)
    contents += [whole.read_bytes()[:size] for size in (5000, 9000)]
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"is damaged, cut short, or not what torch\.save writes") as caught:
            read_state(path)
        assert "weights_only" not in str(caught.value) and "code" not in str(caught.value)
