"""Decoders above every image model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.errors import ConfigError, DataError
from selectra.models.segmenter import UPerNet
from selectra.pretrained import load_pretrained
from selectra.registry import models
from selectra.spec import Spec

FACTS: dict[str, Any] = {"n_classes": 7, "in_channels": 3, "img_size": (64, 64)}
BACKBONES = [name for name in models.names("image") if name.endswith("_smoke")]
HEADS = [name for name in models.names("segmentation") if name.endswith("_smoke")]
ONE_SIZE = {"mlp_mixer_smoke"}


def build(head: str = "upernet_smoke", backbone: str = "samba_smoke", **arguments: Any) -> Any:
    return models.build(Spec(head, backbone=Spec(backbone), **arguments), FACTS)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_below_every_decoder(head, backbone):
    model = build(head, backbone).eval()
    for size in ((64, 64),) if backbone in ONE_SIZE else ((64, 64), (45, 70)):
        assert model(torch.randn(2, 3, *size)).shape == (2, 7, *size)
    found = model.train()(torch.randn(2, 3, 64, 64))
    outputs = found if isinstance(found, tuple) else (found,)
    assert len(outputs) == (2 if model.aux_head is not None else 1)
    torch.stack([output.square().sum() for output in outputs]).sum().backward()
    # What the classifier of the backbone needed is gone.
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_the_papers_size():
    """Samba's encoder, UPerNet's head and FCN's auxiliary head, as OpenMMLab builds them for seven classes."""
    with torch.device("meta"):
        model = models.build(Spec("upernet_samba"), {"n_classes": 7})
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count["backbone"] == 22_650_720 and sum(count.values()) == 52_602_478
    assert sum(count.values()) - count["aux_head"] == 51_862_887


def test_norms_before_the_decoder_are_a_choice():
    with torch.device("meta"):
        plain, normed = (
            models.build(Spec("upernet_samba", normed=normed), {"n_classes": 7}) for normed in (False, True)
        )
    more = sum(p.numel() for p in normed.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == 2 * (64 + 128 + 320 + 448)


def test_padding_is_cut_off_and_sees_the_mean_colour():
    model, x = build().double().eval(), torch.randn(1, 3, 45, 70).double()
    padded = torch.zeros(1, 3, 64, 96).double()
    padded[:, :, :45, :70] = x
    assert torch.allclose(model(x), model(padded)[..., :45, :70], atol=1e-12)


def test_a_training_batch_of_one_image():
    model, x = build().train(), torch.randn(1, 3, 64, 64)
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.p = 0.0
    main, aux = model(x)
    assert main.shape == aux.shape == (1, 7, 64, 64)
    both, _ = model(torch.cat([x, x]))
    assert torch.allclose(main, both[:1], atol=1e-5)


def test_samples_do_not_see_each_other():
    model, x = build(backbone="vim_smoke").eval(), torch.randn(3, 3, 40, 64)
    together = model(x)
    for i in range(3):
        assert torch.allclose(model(x[i : i + 1]), together[i : i + 1], rtol=1e-4, atol=1e-5)


def test_the_command_lines_way_to_another_backbone():
    model = models.build(models.typed(Spec("upernet_smoke", backbone="vmamba_smoke")), FACTS)
    assert type(model.backbone).__name__ == "VMamba"
    with pytest.raises(ConfigError, match=r"there is no model 'vmambo_smoke'.*Did you mean 'vmamba_smoke'"):
        models.build(Spec("upernet_smoke", backbone=Spec("vmambo_smoke")), FACTS)
    with pytest.raises(ConfigError, match="backbone is a Linear; it must be an image model"):
        UPerNet(backbone=nn.Linear(2, 2), n_classes=3)


@pytest.mark.parametrize(
    ("head", "arguments", "message"),
    [
        ("fpn_smoke", {"d_decoder": 40}, "d_decoder=40: FPN's group norms need a multiple of 32"),
        ("upernet_smoke", {"dropout": 1.0}, "dropout=1.0"),
        ("upernet_smoke", {"d_aux": -1}, "d_aux=-1"),
        ("segformer_smoke", {"d_decoder": 0}, "d_decoder=0: needs at least 1"),
    ],
)
def test_what_cannot_be_is_named(head, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(head, **arguments)


@pytest.mark.parametrize("backbone", ["vmamba_smoke", "convnext_smoke", "vit_smoke", "simba_smoke"])
def test_weights_of_a_classifier_begin_the_backbone(backbone):
    classifier = models.build(Spec(backbone, n_classes=4), {"in_channels": 3, "img_size": (64, 64)})
    model = build(backbone=backbone)
    before = model.head.weight.clone()
    load_pretrained(model, classifier.state_dict())
    own = model.backbone.state_dict()
    theirs = classifier.state_dict()
    assert own and all(torch.equal(value, theirs[name]) for name, value in own.items())
    assert torch.equal(model.head.weight, before)
    whole = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    load_pretrained(model, whole)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())
    with pytest.raises(DataError, match="does not fit"):
        load_pretrained(model, {"stages.0.nothing": torch.ones(1)})


@pytest.mark.parametrize("backbone", ["vim_smoke", "vit_smoke"])
def test_a_whole_networks_positions_are_fitted(backbone):
    """Weights of the same network for crops of another size, and with other channels."""
    spec = Spec("upernet_smoke", backbone=Spec(backbone))
    model: Any = models.build(spec, {"n_classes": 3, "in_channels": 3, "img_size": 48})
    other: Any = models.build(spec, {"n_classes": 3, "in_channels": 5, "img_size": 32})
    loaded = load_pretrained(other, model.state_dict())
    assert len(loaded.resized) == 2 and all(key.startswith("backbone.") for key in loaded.resized)
    assert {key.rpartition(".")[2] for key in loaded.resized} == {"pos_embed", "weight"}
    assert other.eval()(torch.randn(1, 5, 40, 32)).shape == (1, 3, 40, 32)


def test_units_are_the_backbones():
    model = build(backbone="vim_smoke")
    assert model.units() == list(model.backbone.layers)
    model = build(backbone="convnext_smoke")
    assert model.units() == list(model.backbone.body.stages) and model.blocks()


@pytest.mark.compile
def test_it_compiles_into_one_graph():
    torch.compiler.reset()
    model, x = build("segformer_smoke", "convnext_smoke").eval(), torch.randn(2, 3, 40, 64)
    y: Tensor = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert torch.allclose(y, model(x), rtol=1e-4, atol=1e-5)
