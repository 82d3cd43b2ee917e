"""Weights from files through timm's doors: official names, other sizes, parts, and what is refused."""

import os
import sys
import types
from argparse import Namespace
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

import selectra.timm  # noqa: F401
from selectra.errors import DataError
from selectra.models import VideoMamba, Vim
from selectra.official import BACK
from selectra.pretrained import load_pretrained, read_state
from tests.golden import Golden

STACK: dict[str, Any] = {"d_model": 16, "depth": 4, "d_state": 2, "num_classes": 5}
DIMS: dict[str, Any] = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1), "num_classes": 5}
VIM, VMAMBA = "selectra_vim_tiny", "selectra_vmamba_tiny_s1l8"


def make(name: str = VIM, **options: Any) -> Any:
    sizes = {**STACK, "img_size": 64} if "vim_" in name else DIMS
    return timm.create_model(name, **{**sizes, **options}).eval()


def official(model: Vim) -> dict[str, Tensor]:
    """As hustvl/Vim names it."""
    state = {}
    for key, value in model.state_dict().items():
        before, back, name = key.partition(".back.")
        first, dot, rest = name.partition(".")
        theirs = {ours: official for official, ours in BACK.items()}
        state[f"{before}.{theirs[first]}{dot}{rest}" if back else key.replace(".ahead.", ".")] = value
    return state


@pytest.fixture
def vim(tmp_path: Path) -> tuple[Any, Path]:
    """A model, and its official file."""
    model, path = make(), tmp_path / "vim.pth"
    torch.nn.init.normal_(model.pos_embed)
    torch.save({"model": official(model), "epoch": 300, "args": Namespace(lr=1e-3)}, path)
    return model, path


@pytest.mark.parametrize("door", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay"])
def test_official_files_are_read_by_every_door(door, vim):
    model, path = vim
    options = {"pretrained": True, door: {"file": str(path), "num_classes": 5}} if "cfg" in door else {door: str(path)}
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(make(**options)(x), model(x))
    net = make(features_only=True, **{**options, "pretrained": options.get("pretrained", False)})
    assert all(torch.equal(a, b.permute(0, 3, 1, 2)) for a, b in zip(net(x), model.features(x), strict=True))


def test_the_classifier_of_a_file_in_an_overlay_is_not_left_out(vim):
    model, path = vim
    loaded = make(pretrained=True, pretrained_cfg_overlay={"file": str(path)})
    assert torch.equal(loaded.head.weight, model.head.weight) and torch.equal(loaded.head.bias, model.head.bias)
    # Of other classes it starts anew, and a model without a classifier takes the file too.
    others = make(pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=3)
    assert others.head.weight.shape == (3, 16)
    bare = make(pretrained=True, pretrained_cfg_overlay={"file": str(path)}, num_classes=0)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(bare(x), model.forward_head(model.forward_features(x), pre_logits=True))


@pytest.mark.parametrize("door", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay"])
def test_other_sizes_channels_and_classes(door, vim):
    model, path = vim
    options = {"pretrained": True, door: {"file": str(path)}} if "cfg" in door else {door: str(path)}
    other = make(num_classes=3, img_size=(96, 128), in_chans=1, **options)
    assert other.num_classes == 3 and other.pos_embed.shape == (1, 6 * 8 + 1, 16)
    assert torch.equal(other.pos_embed[:, 24], model.pos_embed[:, 8])
    weight = model.patch_embed.proj.weight.sum(1, keepdim=True)
    assert torch.allclose(other.patch_embed.proj.weight, weight, atol=1e-6)
    assert torch.equal(other.layers[2].mixer.in_proj.weight, model.layers[2].mixer.in_proj.weight)


def test_both_forms_of_vmambas_names(tmp_path):
    model, x = make(VMAMBA), torch.randn(1, 3, 64, 64)
    old = {
        key.replace("mixer.x_proj", "op.x_proj_weight").replace("mixer.dt_proj", "op.dt_projs_weight"): value
        for key, value in model.state_dict().items()
    }
    names = {"mixer.A_log": "op.A_logs", "mixer.D": "op.Ds", "mixer.dt_bias": "op.dt_projs_bias", ".mixer.": ".op."}
    names |= {"downsample.conv": "downsample.1", "downsample.norm": "downsample.3"}
    names |= {"first.conv": "0", "first.norm": "2", "second.conv": "5", "second.norm": "7"}
    for ours, theirs in names.items():
        old = {key.replace(ours, theirs): value for key, value in old.items()}
    old = {f"classifier.{key}" if key.startswith(("norm.", "head.")) else key: value for key, value in old.items()}
    old = {key: value.flatten(0, 1) if key.endswith(("A_logs", "Ds")) else value for key, value in old.items()}
    new = {
        key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight"): (
            value.flatten(0, 1) if key.endswith("_weight") else value
        )
        for key, value in old.items()
    }
    assert old.keys() != new.keys() != model.state_dict().keys()
    for i, state in enumerate((old, new)):
        torch.save({"model": state}, tmp_path / f"{i}.pth")
        assert torch.equal(make(VMAMBA, checkpoint_path=str(tmp_path / f"{i}.pth"))(x), model(x))
        net = make(VMAMBA, features_only=True, out_indices=(0, 1), checkpoint_path=str(tmp_path / f"{i}.pth"))
        for grid, expected in zip(net(x), model.features(x), strict=False):
            assert torch.equal(grid, expected.permute(0, 3, 1, 2))


def test_settings_in_a_file_are_passed_over(tmp_path, monkeypatch):
    """yacs need not be there when its settings are read."""
    module = types.ModuleType("yacs.config")
    kind = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    module.CfgNode = kind  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    config = kind(lr=1e-3, model=kind(depth=2))
    config.__dict__["frozen"] = True
    model = make(VMAMBA)
    torch.save({"model": model.state_dict(), "config": config, "args": Namespace(a=1)}, tmp_path / "vmamba.pth")
    monkeypatch.undo()
    assert read_state(tmp_path / "vmamba.pth").keys() == model.state_dict().keys()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(make(VMAMBA, pretrained=tmp_path / "vmamba.pth")(x), model(x))


class Malicious:
    """Would run a command when unpickled without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize(
    ("door", "kind", "message"),
    [
        ("pretrained", DataError, "bad.pth' holds more than weights, and reading it could run its code"),
        ("checkpoint_path", RuntimeError, "weights_only=True blocked loading"),
    ],
)
def test_a_malicious_pickle_runs_nothing(door, kind, message, tmp_path):
    path, mark = tmp_path / "bad.pth", tmp_path / "ran"
    torch.save({"model": make().state_dict(), "evil": Malicious(mark)}, path)
    with pytest.raises(kind, match=message):
        make(**{door: str(path)})
    assert not mark.exists()


@pytest.mark.parametrize("door", ["checkpoint_path", "pretrained", "pretrained_cfg_overlay"])
def test_a_file_of_another_model_is_named(door, tmp_path):
    path = tmp_path / "other.pth"
    options = {"pretrained": True, door: {"file": str(path)}} if "cfg" in door else {door: str(path)}
    for state, message in (
        (make(VMAMBA).state_dict(), r"it lacks cls_token, .* and \d+ more; it has unknown layers\.0\.blocks"),
        (make(depth=3).state_dict(), r"it lacks layers\.3\.mixer"),
        (make(depth=5).state_dict(), r"it has unknown layers\.4\.mixer"),
        (make(d_model=32).state_dict(), r"shapes differ: 'cls_token' \(1, 1, 32\) for \(1, 1, 16\)"),
        (timm.create_model("resnet18").state_dict(), "has unknown bn1.bias"),
    ):
        torch.save(state, path)
        with pytest.raises(DataError, match=message):
            make(**options)
        with pytest.raises(DataError, match="does not fit this Vim"):
            make(features_only=True, out_indices=(0, -1), **options)


def test_without_a_file_there_are_no_weights():
    with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {VIM}"):
        make(pretrained=True)
    with pytest.raises(DataError, match=r"there is no file 'nowhere\.pth'"):
        make(pretrained="nowhere.pth")


def test_states_of_parts_and_inside_of_others():
    """A state that is not to be whole may be a part, but of this model; inside of another module nothing is fitted."""
    model = make()
    missing, unexpected = model.load_state_dict({"head.bias": torch.ones(5)}, strict=False)
    assert len(missing) == len(model.state_dict()) - 1 and unexpected == [] and (model.head.bias == 1).all()
    with pytest.raises(DataError, match="has no parameter of this Vim"):
        model.load_state_dict({"conv1.weight": torch.ones(5)}, strict=False)
    second = make()
    whole, other = torch.nn.Sequential(model), torch.nn.Sequential(second)
    other.load_state_dict(whole.state_dict())
    assert torch.equal(second.pos_embed, model.pos_embed)
    with pytest.raises(RuntimeError, match="size mismatch"):
        torch.nn.Sequential(make(img_size=96)).load_state_dict(whole.state_dict())


def test_timms_own_folders(tmp_path):
    """What timm saves for a hub comes back as it was."""
    model = make(img_size=(64, 96), in_chans=2, global_pool="avg")
    timm.models.save_for_hf(model, str(tmp_path), model_args={"d_model": 16, "depth": 4, "d_state": 2})
    other: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(1, 2, 64, 96)
    assert other.global_pool == "avg" and torch.equal(other(x), model(x))


SMALL: dict[str, Any] = {"d_model": 8, "depth": 2, "d_state": 2, "patch_size": 8, "n_classes": 5}


def test_positions_that_are_of_no_square_need_their_grid():
    model, other = Vim(**SMALL, img_size=(16, 48)), Vim(**SMALL, img_size=(48, 16))
    torch.nn.init.normal_(model.pos_embed)
    assert load_pretrained(other, model.state_dict()).resized == ()
    assert load_pretrained(other, model.state_dict(), grid=(2, 6)).resized == ("pos_embed",)
    assert not torch.equal(other.pos_embed, model.pos_embed)
    larger = Vim(**SMALL, img_size=64)
    with pytest.raises(DataError, match=r"'pos_embed' \(1, 13, 8\).*grid=\(rows, columns\)"):
        load_pretrained(larger, model.state_dict())
    assert load_pretrained(larger, model.state_dict(), grid=(2, 6)).resized == ("pos_embed",)


def test_weights_of_images_for_clips():
    """VideoMamba's inflation: at the start a clip of one patch is scored as the image in its middle."""
    sizes = {**SMALL, "img_size": 32}
    model = VideoMamba(**sizes).eval()
    clips: Any = VideoMamba(**sizes, n_frames=3, tubelet=3).eval()
    clips.head.reset_parameters()
    loaded = load_pretrained(clips, model.state_dict())
    assert loaded.resized == ("patch_embed.proj.weight",) and loaded.fresh == ("time_embed",)
    x = torch.randn(1, 3, 3, 32, 32)
    assert torch.allclose(clips(x), model(x[:, :, 1]), atol=1e-5)


GOLDEN = ["vim_v2_midcls_div2", "vim_v2_nocls_meanpool", "vmamba_v05noz_ln2d", "vmamba_v0_ln_n16", "simba_net_mlp"]


@pytest.mark.parametrize("name", [*GOLDEN, "simba_net_einfft", "videomamba_image", "videomamba_video"])
def test_official_states_are_read_as_files(name, golden, tmp_path):
    """What `from_official` makes of a state of the official code, a file of it makes too."""
    stored = Golden.read(golden, name, torch.float32)
    official = stored.module()
    state = {key.removeprefix("state."): value for key, value in stored.tensors.items() if key.startswith("state.")}
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, tmp_path / "official.pth")
    other = deepcopy(official.model)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    assert load_pretrained(other, tmp_path / "official.pth") == ((), ())
    assert torch.equal(other(*stored.inputs()), official(*stored.inputs())[0])
