"""What timm promises of its models, over every model that `selectra.timm` registers, with small widths and depths."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import pytest
import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.layers.format import Format
from timm.models._features import FeatureInfo
from timm.models._manipulate import group_parameters
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

import selectra.timm
from selectra.layers.drop import DropPath
from selectra.layers.image_model import ImageModel, Plain
from selectra.models import RSMamba, Samba, Simba, VideoMamba, Vim, ViM2, VMamba
from selectra.models.baseline import Baseline
from selectra.registry import models

NAMES = timm.list_models("selectra_*")
EVERY = pytest.mark.parametrize("name", NAMES)
DIMS = (8, 16, 24, 32)
STACK: dict[str, Any] = {"d_model": 16, "depth": 5, "d_state": 4, "img_size": (48, 64)}
SMALL: dict[type, dict[str, Any]] = {
    Vim: STACK,
    VideoMamba: STACK,
    RSMamba: STACK,
    VMamba: {"dims": DIMS, "depths": (1, 2, 1, 1)},
    ViM2: {"dims": DIMS, "depths": (1, 1, 2, 1), "channel_dims": (16,) * 4, "channel_group": 8, "d_state": 4},
    Simba: {"d_stem": 4, "dims": DIMS, "depths": (1, 2, 1, 1), "mlp_ratios": (2,) * 4, "d_state": 4, "n_blocks": 2},
    Samba: {"d_stem": 4, "dims": DIMS, "depths": (1, 2, 1, 1), "mlp_ratios": (2,) * 4, "d_state": 4},
}


def _kinds() -> list[str]:
    """One name of those that differ in width and depth alone, and so are one model when small."""
    kinds: dict[Any, str] = {}
    for name in NAMES:
        entry = selectra.timm.ENTRIES[name]
        rest = {key: value for key, value in entry.defaults.items() if key not in SMALL[entry.target]}  # pyright: ignore[reportArgumentType]
        kinds.setdefault((entry.target, str(sorted(rest.items()))), name)
    return list(kinds.values())


KINDS = _kinds()
EACH = pytest.mark.parametrize("name", KINDS)
# Parameters of recurrences that reach what is read as its first token, so that nothing recurs.
ONE_TOKEN = ("class_block.mamba.A_log", "layers.4.mixer.ahead.A_log")


def small(name: str, **options: Any) -> Any:
    """A model of few parameters that all matter: what starts at 0 or 1 is moved away from there."""
    family: Any = selectra.timm.ENTRIES[name].target
    model = timm.create_model(name, **{**SMALL[family], **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model.eval()


def image(batch: int = 2, channels: int = 3, height: int = 48, width: int = 64) -> Tensor:
    return torch.randn(batch, channels, height, width)


def is_plain(name: str) -> bool:
    return issubclass(selectra.timm.ENTRIES[name].target, Plain)  # pyright: ignore[reportArgumentType]


def test_every_image_model_is_registered():
    families = {name.removeprefix("selectra_").split("_")[0] for name in NAMES}
    assert families == {"vim", "vmamba", "vim2", "simba", "samba", "rsmamba", "videomamba"} and len(NAMES) == 36
    assert len(KINDS) == 12 and {name.removeprefix("selectra_").split("_")[0] for name in KINDS} == families
    assert set(timm.list_models(module="timm", filter="selectra_*")) == set(NAMES)
    assert not timm.list_models("selectra_*", pretrained=True)
    # docs/timm.md gives the reason for each that is not.
    targets = [(name.split("_")[0], models.entry(name).target) for name in models.names("image")]
    assert {name for name, target in targets if not issubclass(cast(type, target), Baseline)} - families == {"xt"}


@EVERY
def test_forward_with_classes_channels_and_sizes(name):
    model = small(name, num_classes=7, in_chans=13)
    assert isinstance(model, ImageModel) and model.num_classes == 7 and model.in_chans == 13
    for size in ((48, 64), (33, 79)):
        y = model(image(1, 13, *size))
        assert y.shape == (1, 7) and y.isfinite().all()


@EVERY
def test_every_parameter_gets_a_finite_gradient(name):
    model = small(name, num_classes=5).train()
    y = model(image())
    assert y.shape == (2, 5)
    y.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert {key for key, p in model.named_parameters() if not p.grad.any()} <= set(ONE_TOKEN)


@EVERY
def test_default_cfg(name):
    model, x = small(name), image()
    cfg, state = model.default_cfg, model.state_dict()
    assert cfg is model.pretrained_cfg and cfg["architecture"] == name and cfg["num_classes"] == 1000
    assert f"{cfg['first_conv']}.weight" in state and f"{cfg['classifier']}.weight" in state
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0] == 3
    assert cfg["mean"] == (0.485, 0.456, 0.406) and cfg["paper_ids"].startswith("arXiv:")
    assert resolve_model_data_config(model)["input_size"][0] == 3
    features = model.forward_features(x)
    assert features.shape[2 if is_plain(name) else 1] == model.num_features
    if not is_plain(name):
        assert Format(model.output_fmt) is Format.NCHW and features.shape[2:] == (-(-48 // 32), 2)
        assert cfg["pool_size"] == (224 // 32, 224 // 32)


@EACH
def test_the_classifier_can_be_exchanged_and_left_out(name):
    model, x = small(name), image()
    features = model.forward_features(x)
    assert torch.equal(model(x), model.forward_head(features))
    read = model.forward_head(features, pre_logits=True)
    assert read.shape == (2, model.head_hidden_size) and model.head_hidden_size == model.num_features
    assert torch.equal(model.get_classifier()(read), model(x))
    model.reset_classifier(4)
    assert model.num_classes == 4 and model(x).shape == (2, 4)
    model.reset_classifier(0)
    assert torch.equal(model(x), read)
    for pool in ("max", "avgmax", "avg"):
        model.reset_classifier(3, pool)
        assert model(x).shape == (2, 3) and model.global_pool == pool
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    for options, shape in (({"global_pool": ""}, features.shape), ({}, read.shape)):
        other = small(name, num_classes=0, **options)
        assert other(x).shape == shape and isinstance(other.get_classifier(), nn.Identity)


@EACH
def test_intermediates(name):
    model, x = small(name), image(1, 3, 50, 70)
    info = FeatureInfo(model.feature_info, len(model.feature_info))
    final, grids = model.forward_intermediates(x)
    assert torch.equal(final, model.forward_features(x))
    assert len(grids) == len(info.channels()) == (5 if is_plain(name) else 4)
    for grid, d, stride in zip(grids, info.channels(), info.reduction(), strict=True):
        assert grid.shape[:2] == (1, d)
        for side, pixels in zip(grid.shape[2:], (50, 70), strict=True):
            assert side in (pixels // stride - 1, pixels // stride, -(-pixels // stride))
    strides = [model.feature_strides[0]] * 5 if is_plain(name) else [4, 8, 16, 32]
    assert info.reduction() == strides

    def taken(**options: Any) -> list[Tensor]:
        return model.forward_intermediates(x, intermediates_only=True, **options)

    for indices, numbers in ((2, [-2, -1]), ([0, -2], [0, -2]), (None, range(len(grids)))):
        for stop_early in (False, True):
            got = taken(indices=indices, stop_early=stop_early)
            assert all(torch.equal(one, grids[i]) for one, i in zip(got, numbers, strict=True))
    whole, first = model.forward_intermediates(x, [0])
    assert torch.equal(whole, final) and len(first) == 1 and torch.equal(first[0], grids[0])
    early, first = model.forward_intermediates(x, [0], stop_early=True)
    assert torch.equal(first[0], grids[0]) and early.shape[-1 if is_plain(name) else 1] == info.channels()[0]
    assert torch.equal(taken(output_fmt="NHWC")[1], grids[1].permute(0, 2, 3, 1))
    assert torch.equal(taken(output_fmt="NLC")[1], grids[1].flatten(2).transpose(1, 2))
    normed = taken(norm=True)
    changed = [not torch.equal(one, other) for one, other in zip(normed, grids, strict=True)]
    assert changed == ([True] * 5 if is_plain(name) else [False, False, False, True])


@EACH
def test_features_equal_intermediates(name):
    model, x = small(name), image(1, 3, 50, 70)
    net = small(name, features_only=True)
    net.load_state_dict(model.state_dict())
    grids = net(x)
    expected = model.features(x)
    assert len(grids) == len(net.feature_info.channels()) == len(expected) == 4
    for grid, other, d in zip(grids, expected, net.feature_info.channels(), strict=True):
        assert torch.equal(grid, other.permute(0, 3, 1, 2)) and grid.shape[1] == d
    numbers = (0, 2)
    some = small(name, features_only=True, out_indices=numbers)
    some.load_state_dict(model.state_dict())
    normed = model.forward_intermediates(x, numbers, norm=model.normed_features, intermediates_only=True)
    assert all(torch.equal(*pair) for pair in zip(some(x), normed, strict=True))
    torch.stack([grid.square().sum() for grid in some(x)]).sum().backward()
    without = [key for key, p in some.named_parameters() if p.grad is None]
    assert without == [] and len(list(some.parameters())) < len(list(model.parameters()))


@EACH
def test_batch_elements_do_not_see_each_other(name):
    model, x = small(name), image(3)
    together = model(x)
    assert torch.allclose(model(x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)


@EACH
def test_weights_are_saved_and_loaded(name, tmp_path):
    model, x = small(name, num_classes=3), image()
    torch.save({"state_dict": model.state_dict()}, tmp_path / "own.pth")
    family: Any = selectra.timm.ENTRIES[name].target
    options = {**SMALL[family], "num_classes": 3}
    for source in ({"checkpoint_path": str(tmp_path / "own.pth")}, {"pretrained": tmp_path / "own.pth"}):
        other = timm.create_model(name, **source, **options).eval()
        assert torch.equal(other(x), model(x))


@EACH
def test_checkpointing_changes_no_gradient(name):
    model, x = small(name, drop_path_rate=0.3).train(), image(4)

    def gradients() -> list[Tensor]:
        torch.manual_seed(3)
        return list(torch.autograd.grad(model(x).square().sum(), list(model.parameters())))

    expected = gradients()
    model.set_grad_checkpointing()
    with saved_bytes() as kept:
        got = gradients()
    model.set_grad_checkpointing(False)
    with saved_bytes() as all_kept:
        gradients()
    assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    assert kept[0] < all_kept[0] / 2


@contextmanager
def saved_bytes() -> Iterator[list[int]]:
    """Counts what autograd keeps."""
    count = [0]

    def pack(tensor: Tensor) -> Tensor:
        count[0] += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield count


@EACH
def test_bfloat16_autocast_trains(name):
    model, x = small(name).train(), image()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    y.float().square().sum().backward()
    assert y.isfinite().all() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@EACH
def test_groups_of_parameters(name):
    model = small(name)
    names = {key for key, _ in model.named_parameters()}
    kept = model.no_weight_decay()
    assert kept <= names and {key for key in names if key.endswith(("A_log", "pos_embed", "cls_token"))} <= kept
    groups = param_groups_weight_decay(model, 0.05, no_weight_decay_list=kept)
    assert sum(len(group["params"]) for group in groups) == len(names)
    for coarse in (False, True):
        layers = group_parameters(model, model.group_matcher(coarse), reverse=True)
        assert set(layers) == names
        last = max(layers.values())
        assert min(layers.values()) == layers[f"{model.default_cfg['first_conv']}.weight"] == 0
        assert all((number == last) == key.startswith("head.") or coarse for key, number in layers.items())
        order = [layers[key] for key in layers if key.startswith(f"{model.level_name}.")]
        assert len(set(order)) >= 4
    rates = {group["lr_scale"] for group in param_groups_layer_decay(model, 0.05, kept, layer_decay=0.5)}
    assert max(rates) == 1 and len(rates) >= 5


@EACH
def test_rates_of_what_is_left_out(name):
    model, x = small(name, drop_rate=0.4, drop_path_rate=0.2), image()
    assert max(m.rate for m in model.modules() if isinstance(m, DropPath)) == pytest.approx(0.2)
    assert torch.equal(model(x), model(x))
    features = model.forward_features(x)
    read = model.train().forward_head(features, pre_logits=True)
    assert not read.all() and model.eval().forward_head(features, pre_logits=True).all()


@EACH
def test_real_sizes_without_weights(name):
    """Counts of the other sizes are with the tests of each model, or in the next one."""
    with torch.device("meta"):
        model: Any = timm.create_model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == COUNTS[name]
    net = selectra.timm.Features(model)
    assert net.feature_info.reduction() == ([model.patch_embed.stride] * 4 if is_plain(name) else [4, 8, 16, 32])
    assert 0 < sum(p.numel() for p in net.parameters()) < count


# For 1,000 classes. Of the official code, but for monarchs, ViM2 and RSMamba's small one, which have none that counts.
COUNTS = {
    f"selectra_{name}": count
    for name, count in {
        **{"vim_tiny": 7_148_008, "vim_small": 25_796_584, "vim_base": 97_598_440},
        **{"vim_tiny_stride8": 7_250_344, "vim_small_stride8": 26_001_256, "vim_base_stride8": 98_007_784},
        **{"videomamba_tiny": 7_148_008, "videomamba_small": 25_796_584},
        **{"videomamba_middle": 74_217_448, "videomamba_base": 97_598_440},
        **{"vmamba_tiny": 22_893_448, "vmamba_small": 44_417_416, "vmamba_base": 76_254_056},
        **{"vmamba_tiny_s2l5": 30_705_832, "vmamba_small_s2l15": 50_147_752, "vmamba_base_s2l15": 88_557_800},
        **{"vmamba_tiny_s1l8": 30_249_064, "vmamba_small_s1l20": 49_012_840, "vmamba_base_s1l20": 86_614_504},
        **{"vim2_tiny": 22_467_052, "vim2_small": 40_384_528, "vim2_base": 69_701_968},
        **{"simba_small": 14_860_104, "simba_base": 22_306_984, "simba_large": 36_128_264},
        **{"simba_small_mlp": 26_142_088, "simba_base_mlp": 39_696_744, "simba_large_mlp": 66_249_512},
        **{"simba_small_monarch": 17_265_544, "simba_base_monarch": 26_004_840, "simba_large_monarch": 42_569_512},
        # 21 classes have 979 (d_model + 1) fewer: 6,381,141, 16,246,549 and 33,053,141; the encoder alone 449,000.
        **{"rsmamba_small": 4_544_104, "rsmamba_base": 6_570_088},
        **{"rsmamba_large": 16_498_152, "rsmamba_huge": 33_367_400, "samba_base": 23_099_720},
    }.items()
}


def test_every_model_has_a_count():
    assert COUNTS.keys() == set(NAMES)


@pytest.mark.parametrize("family", ["vim2", "simba_large", "simba_*_monarch", "rsmamba"])
def test_sizes_that_no_models_own_test_counts(family):
    names = set(timm.list_models(f"selectra_{family}*")) - set(KINDS)
    assert names
    for name in names:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
