"""timm's classes behind our door: their own sizes, weights and outputs, and what the door adds."""

from typing import Any

import pytest
import torch

import selectra.models  # noqa: F401
from selectra.errors import ConfigError, DataError
from selectra.models import baseline
from selectra.pretrained import load_pretrained
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.depth import depths
from selectra.train.optim import without_decay

timm = pytest.importorskip("timm")
# Our names, timm's, and what timm's have otherwise.
SAME = {
    "deit_tiny": ("deit_tiny_patch16_224", {}),
    "deit_base": ("deit_base_patch16_224", {}),
    "vit_small": ("vit_small_patch16_224", {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "swin_tiny": ("swin_tiny_patch4_window7_224", {}),
    "swin_base": ("swin_base_patch4_window7_224", {}),
    "convnext_tiny": ("convnext_tiny", {}),
    "convnext_base": ("convnext_base", {}),
    "mlp_mixer_base": ("mixer_b16_224", {}),
    "resnet_18": ("resnet18", {}),
    "resnet_50": ("resnet50", {}),
}


@pytest.mark.parametrize("name", SAME)
def test_published_sizes_have_timms_parameters(name):
    theirs, options = SAME[name]
    with torch.device("meta"):
        ours = models.build(Spec(name))
        wanted = timm.create_model(theirs, **options)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in wanted.parameters())


SMALL: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "deit_tiny": ("deit_tiny_patch16_224", {"img_size": 64}, {"img_size": 64, "depth": 2}),
    "swin_tiny": ("swin_tiny_patch4_window7_224",
                  {"img_size": 56, "depths": (1, 1), "dims": (96, 192), "n_heads": (3, 6)},
                  {"img_size": 56, "depths": (1, 1), "num_heads": (3, 6)}),
    "convnext_tiny": ("convnext_tiny", {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
                      {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)}),
    "mlp_mixer_small": ("mixer_s16_224", {"img_size": 64}, {"img_size": 64}),
    "resnet_18": ("resnet18", {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SMALL)
def test_timms_weights_load_and_give_timms_scores(name):
    theirs, ours, options = SMALL[name]
    torch.manual_seed(0)
    wanted = timm.create_model(theirs, num_classes=7, **options).eval()
    for p in wanted.parameters():
        p.data += 0.02 * torch.randn_like(p)
    depth = {"depth": 2} if "deit" in name else {}
    model = models.build(Spec(name, n_classes=7, **ours, **depth)).eval()
    loaded = load_pretrained(model, wanted.state_dict())
    assert loaded == ((), ())
    x = torch.randn(2, 3, *[ours.get("img_size", 64)] * 2)
    with torch.no_grad():
        assert torch.allclose(model(x), wanted(x), rtol=1e-4, atol=1e-5)


def test_weights_of_another_grid_and_of_other_channels():
    torch.manual_seed(0)
    small = models.build(Spec("deit_smoke", img_size=32, n_classes=5))
    large = models.build(Spec("deit_smoke", img_size=64, n_classes=3, in_channels=1))
    loaded = load_pretrained(large, small.state_dict())
    assert loaded.resized == ("body.patch_embed.proj.weight", "body.pos_embed")
    assert loaded.fresh == ("head.bias", "head.weight")
    assert torch.equal(large.body.pos_embed[:, 0], small.body.pos_embed[:, 0])
    with pytest.raises(DataError, match=r"does not fit this DeiT"):
        load_pretrained(large, models.build(Spec("vit_smoke", img_size=32)).state_dict())


@pytest.mark.parametrize(
    ("name", "n"), [("vit_smoke", 2), ("swin_smoke", 2), ("convnext_smoke", 4), ("resnet_smoke", 4)]
)
def test_depth(name, n):
    model = models.build(Spec(name, n_classes=2), {"img_size": 32})
    by_name, units = depths(model)
    assert units == n and by_name["head.weight"] == n + 1
    assert min(by_name.values()) == 0 and set(by_name.values()) == set(range(n + 2))


def test_positions_do_not_decay():
    model = models.build(Spec("deit_smoke", img_size=32))
    left_out = without_decay(model)
    assert {id(model.body.pos_embed), id(model.body.cls_token)} <= left_out


def test_patches_of_two_pixels_are_that_in_convnext():
    model = models.build(Spec("convnext_smoke"))
    assert model.feature_strides == (2, 4, 8, 16)
    assert [tuple(grid.shape[1:3]) for grid in model.features(torch.randn(1, 3, 32, 32))] == [
        (16,) * 2,
        (8,) * 2,
        (4,) * 2,
        (2,) * 2,
    ]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny", {"n_heads": 5}, r"d_model=192 does not divide among n_heads=5"),
        ("vit_tiny", {"img_size": 8}, r"img_size=8 is smaller than patch_size=16"),
        ("swin_tiny", {"dims": (96, 200, 400, 800)}, r"each width must be twice"),
        ("convnext_tiny", {"dims": (8, 16), "depths": (1, 1)}, r"needs one of each for every stage, 4 in all"),
        ("resnet_18", {"stem": "large"}, r"stem"),
        ("convnext_tiny", {"drop_path": 1.0}, r"drop_path=1.0"),
    ],
)
def test_what_does_not_fit_is_refused(name, arguments, message):
    with pytest.raises(ConfigError, match=message):
        models.build(Spec(name, **arguments))


def test_without_timm_the_extra_is_named(monkeypatch):
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named '{name}'", name="timm")

    monkeypatch.setattr(baseline.importlib, "import_module", absent)
    with pytest.raises(ConfigError, match=r"timm is not installed: pip install 'selectra\[vision\]'"):
        models.build(Spec("vit_smoke"))
