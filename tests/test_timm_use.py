"""Selectra's models in the hands of timm's users: the README's script, segmentation, wrong words, compilation."""

import re
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import timm
import torch

import selectra.timm
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Spec

README = (Path(__file__).parents[1] / "README.md").read_text()
PYRAMID: dict[str, Any] = {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}
STACK: dict[str, Any] = {"d_model": 16, "depth": 4, "d_state": 2, "img_size": 64}
VIM, VMAMBA = "selectra_vim_tiny", "selectra_vmamba_tiny_s1l8"


def test_the_readmes_script():
    """Ten lines of timm and segmentation-models-pytorch alone, at the models' real sizes."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "smp.Unet" in block]
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 14 and len([line for line in lines if not line.startswith("import")]) <= 10
    assert all("selectra." not in line for line in lines if not line.startswith("import"))
    names: dict[str, Any] = {}
    with torch.no_grad():
        exec(code, names)
    assert names["scores"].shape == (2, 21) and names["scores"].isfinite().all()
    assert [grid.shape for grid in names["grids"]] == [(2, 192, 16, 12), (2, 384, 8, 6), (2, 768, 4, 3)]
    for masks in (names["masks"], names["others"]):
        assert masks.shape == (2, 6, 128, 96) and masks.isfinite().all()


@pytest.mark.parametrize("head", ["Unet", "FPN", "UPerNet", "Segformer", "MAnet"])
def test_pyramids_below_segmentation_heads(head):
    model = getattr(smp, head)(f"tu-{VMAMBA}", encoder_weights=None, in_channels=4, classes=3, **PYRAMID)
    masks = model(torch.randn(2, 4, 64, 96))
    assert masks.shape == (2, 3, 64, 96)
    masks.square().mean().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


@pytest.mark.parametrize("name", ["vim_tiny", "rsmamba_small", "videomamba_tiny"])
def test_plain_stacks_below_dpt(name):
    """They have one resolution, for which other heads of segmentation-models-pytorch have no place."""
    options: dict[str, Any] = {
        "encoder_weights": None,
        "in_channels": 4,
        "classes": 3,
        "d_model": 16,
        "d_state": 2,
        "img_size": 64,
    }
    model = smp.DPT(f"tu-selectra_{name}", decoder_readout="ignore", **options)
    assert model(torch.randn(2, 4, 64, 96)).shape == (2, 3, 64, 96)
    with pytest.raises(ValueError, match="Unsupported model downsampling pattern"):
        smp.Unet(f"tu-selectra_{name}", **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (VIM, {"num_heads": 3}, "'vim_tiny' takes no argument 'num_heads'"),
        (VIM, {"d_modl": 3}, "'vim_tiny' takes no argument 'd_modl'.* Did you mean 'd_model'"),
        (VMAMBA, {"output_stride": 16}, "output_stride=16: takes 32"),
        (VMAMBA, {"global_pool": "token"}, "global_pool='token': takes '', 'avg', 'max', 'avgmax'"),
        (VIM, {"pool": "mean", "global_pool": "token"}, "global_pool='token': takes '', 'avg', 'max', 'avgmax'"),
        (VIM, {"global_pool": ""}, "num_classes=1000, global_pool='': takes 0 without pooling"),
        (VIM, {"drop_rate": 1.0}, "drop_rate=1.0: must be at least 0 and less than 1"),
        (VIM, {"drop_path_rate": -0.1}, "drop_path=-0.1"),
        (VIM, {"img_size": 8}, "img_size=8 is smaller than patch_size=16"),
        (VIM, {"in_chans": 0}, "in_channels=0"),
        (VIM, {"num_classes": -1}, "num_classes=-1"),
        (VIM, {"features_only": True, "out_indices": (0, 4)}, r"indices=\(0, 4\): takes numbers from -4 to 3"),
        (VMAMBA, {"features_only": True, "out_indices": (0, 1, 2, 3, 4)}, "takes numbers from -4 to 3"),
    ],
)
def test_wrong_words_are_named(name, options, message):
    sizes = STACK if name == VIM else PYRAMID
    with pytest.raises(ConfigError, match=message):
        timm.create_model(name, **{**sizes, **options})


def test_wrong_words_of_a_call_are_named():
    model: Any = timm.create_model(VIM, **STACK)
    x = torch.randn(1, 3, 64, 64)
    for options, message in (
        ({"output_fmt": "CHW"}, "output_fmt='CHW': takes 'NCHW', 'NHWC', 'NLC'"),
        ({"indices": 5}, "indices=5: takes numbers from -4 to 3, or how many of the last 4"),
        ({"indices": 0}, "indices=0"),
        ({"indices": []}, r"indices=\[\]"),
        ({"indices": [-5]}, r"indices=\[-5\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            model.forward_intermediates(x, **options)
    with pytest.raises(ConfigError, match="global_pool='mean': takes '', 'avg', 'max', 'avgmax', 'token'"):
        model.reset_classifier(3, "mean")
    with pytest.raises(ConfigError, match=r"the image has shape \(1, 4, 64, 64\).*in_channels = 3"):
        model(torch.randn(1, 4, 64, 64))
    with pytest.raises(ConfigError, match="the image is 8 x 64 pixels"):
        model(torch.randn(1, 3, 8, 64))


def test_timm_is_asked_for_when_it_is_needed():
    code = """
import sys
import selectra, selectra.models, selectra.pretrained
assert not {"timm", "torchvision"} & sys.modules.keys()
sys.modules["timm"] = None
import selectra.timm
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert b"selectra.timm needs timm" in run.stderr and b"pip install 'selectra[vision]'" in run.stderr


@pytest.mark.parametrize("pool", ["middle", "head", "double", "mean", "max"])
def test_what_vim_reads_and_what_timm_may_ask_for(pool):
    model: Any = timm.create_model(VIM, pool=pool, num_classes=3, **STACK).eval()
    x = torch.randn(2, 3, 64, 64)
    tokens = model.forward_features(x)
    grid = model.features(x)[-1].flatten(1, 2)
    assert tokens.shape[1] - grid.shape[1] == {"double": 2, "mean": 0, "max": 0}.get(pool, 1)
    if pool == "max":
        assert torch.equal(model(x), model.head(grid).amax(1))
    elif pool == "double":
        assert torch.allclose(model(x), model.head((tokens[:, 0] + tokens[:, -1]) / 2))
    elif pool != "mean":
        assert torch.equal(model(x), model.head(tokens[:, {"middle": 8, "head": 0}[pool]]))
    model.reset_classifier(4, "avg")
    assert torch.allclose(model(x), model.head(grid.mean(1)), atol=1e-6)
    model.reset_classifier(4, "avgmax")
    assert torch.allclose(model(x), model.head((grid.mean(1) + grid.amax(1)) / 2), atol=1e-6)


def test_two_heads_of_token_labels_are_exchanged_together():
    options: dict[str, Any] = {"d_stem": 4, "mlp_ratios": (2,) * 4, "d_state": 2, "token_labels": True, **PYRAMID}
    model: Any = timm.create_model("selectra_simba_small_mlp", num_classes=3, **options).eval()
    head, aux_head = model.get_classifier()
    assert (head.out_features, aux_head.out_features) == (3, 3)
    model.reset_classifier(6)
    x = torch.randn(2, 3, 64, 64)
    grid = model.forward_features(x)
    scores = model.aux_head(model.features(x)[-1].flatten(1, 2)).amax(1)
    assert torch.allclose(model(x), model.head(model.forward_head(grid, pre_logits=True)) + scores / 2, atol=1e-6)
    model.reset_classifier(0)
    assert model.get_classifier() is model.head and model(x).shape == (2, 32)


def test_copies_are_whole():
    """A fit to other names goes with a copy and means the copy."""
    model: Any = timm.create_model(VIM, num_classes=3, **STACK)
    copy = deepcopy(model)
    copy.load_state_dict({f"module.{key}": value + 1 for key, value in model.state_dict().items()})
    assert torch.equal(copy.head.bias, model.head.bias + 1)


@pytest.mark.compile
@pytest.mark.parametrize("name", [VIM, VMAMBA])
def test_compiled_models_and_features(name):
    """In one graph, with checkpointing in training."""
    torch.compiler.reset()
    sizes: dict[str, Any] = {**STACK, "depth": 1} if name == VIM else {"dims": (8, 16), "depths": (1, 1)}
    model: Any = timm.create_model(name, num_classes=3, **sizes).train()
    net: Any = timm.create_model(name, features_only=True, **sizes).eval()
    x = torch.randn(2, 3, 32, 32)
    for grid, expected in zip(torch.compile(net, fullgraph=True, backend="eager")(x), net(x), strict=True):
        assert torch.allclose(grid, expected, rtol=1e-4, atol=1e-5)
    model.set_grad_checkpointing()
    y, expected = torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x)
    parameters = list(model.parameters())
    gradients, wanted = (torch.autograd.grad(output.square().sum(), parameters) for output in (y, expected))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("name", [VIM, VMAMBA, "selectra_videomamba_tiny", "selectra_rsmamba_base", "convnext", "xt"])
def test_exported_models_take_batches_of_any_size(name):
    """What `torch.export` gives of one batch, with that axis left open."""
    stack: dict[str, Any] = {"d_model": 8, "depth": 1, "d_state": 2, "img_size": 32}
    if name.startswith("selectra_"):
        model: Any = timm.create_model(name, num_classes=3, **(PYRAMID if name == VMAMBA else stack))
    else:
        model = models.build(Spec(f"{name}_smoke", n_classes=3), {"img_size": 32, "in_channels": 3})
    model.eval()
    axes = {"x": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), dynamic_shapes=axes).module()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 32, 32)
        assert torch.allclose(exported(x), model(x), atol=1e-5)


def test_modules_of_the_registry_are_the_librarys_own():
    model: Any = timm.create_model(VMAMBA, **PYRAMID)
    assert type(model) is selectra.timm.ENTRIES[VMAMBA].target
