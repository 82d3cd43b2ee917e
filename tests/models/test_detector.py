"""torchvision's detectors above every image model."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.models.detector import MaskRCNN, RetinaNet, wide
from selectra.pretrained import load_pretrained
from selectra.registry import models
from selectra.spec import Spec

FACTS: dict[str, Any] = {"n_classes": 5, "in_channels": 3, "img_size": (64, 64)}
BACKBONES = [name for name in models.names("image") if name.endswith("_smoke")]
DETECTORS = [name for name in models.names("detection") if name.endswith("_smoke")]
ONE_SIZE = {"mlp_mixer_smoke"}


def build(detector: str = "retinanet_smoke", backbone: str = "vmamba_smoke", **arguments: Any) -> Any:
    return models.build(Spec(detector, backbone=Spec(backbone), **arguments), FACTS)


def targets(masks: bool = True) -> list[dict[str, Tensor]]:
    """Two objects on the first image, none on the second."""
    found = [
        {"boxes": torch.tensor([[4.0, 6, 40, 50], [20.0, 3, 60, 30]]), "labels": torch.tensor([0, 4])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)},
    ]
    for each in found if masks else ():
        each["masks"] = torch.zeros(len(each["labels"]), 64, 64, dtype=torch.uint8)
        for mask, (left, top, right, bottom) in zip(each["masks"], each["boxes"].long().tolist(), strict=True):
            mask[top:bottom, left:right] = 1
    return found


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_learns_below_a_detector(backbone):
    model = build("retinanet_smoke", backbone).train()
    sizes = ((64, 64), (64, 64)) if backbone in ONE_SIZE else ((64, 64), (45, 60))
    losses = model([torch.randn(3, *size) for size in sizes], targets(masks=False))
    torch.stack(list(losses.values())).sum().backward()
    # What the classifier of the backbone needed is gone, and so are grids that are not used.
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("backbone", ["vim_smoke", "resnet_smoke"])
def test_every_detector_learns_and_finds(detector, backbone):
    model = build(detector, backbone, threshold=0.0).train()
    x = [torch.randn(3, 64, 64), torch.randn(3, 64, 64)]
    losses = model(x, targets())
    torch.stack(list(losses.values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    with torch.no_grad():
        for image, found in zip(x, model.eval()(x), strict=True):
            count = len(found["scores"])
            assert found["boxes"].shape == (count, 4) and 0 < count <= 100
            assert set(found["labels"].tolist()) <= set(range(5))
            assert found["boxes"].min() >= 0 and found["boxes"].max() <= 64
            assert ("masks" in found) == isinstance(model, MaskRCNN)
            assert "masks" not in found or found["masks"].shape == (count, 1, *image.shape[1:])


def test_anchors_are_torchvisions_for_its_strides():
    """With strides of 4 to 32 and the default sides, sizes are those of torchvision's builders."""
    retina = build(backbone="resnet_18").network.anchor_generator.sizes
    assert retina == tuple((x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))) for x in (32, 64, 128, 256, 512))
    faster = build("faster_rcnn_smoke", "resnet_18").network.rpn.anchor_generator.sizes
    assert faster == ((32,), (64,), (128,), (256,), (512,))
    fcos = build("fcos_smoke", "resnet_18").network.anchor_generator.sizes
    assert fcos == ((8,), (16,), (32,), (64,), (128,))


@pytest.mark.parametrize("detector", ["retinanet_smoke", "mask_rcnn_smoke"])
def test_boxes_come_back_to_the_images_own_pixels(detector):
    model = build(detector, short_side=32, long_side=60, threshold=0.0).eval()
    image = torch.randn(3, 64, 128)
    with torch.no_grad():
        (found,) = model([image])
        small = F.interpolate(image[None], (30, 60), mode="bilinear", antialias=True)[0]
        model.network.transform = build(detector).network.transform
        (same,) = model.eval()([small])
    assert torch.allclose(found["boxes"], same["boxes"] * torch.tensor([128 / 60, 64 / 30] * 2), atol=1e-3)
    assert torch.equal(found["scores"], same["scores"])
    assert "masks" not in found or found["masks"].shape[2:] == (64, 128)


@pytest.mark.parametrize("detector", ["retinanet_smoke", "mask_rcnn_smoke"])
def test_what_is_beside_an_image_does_not_move_what_is_found(detector):
    """Images of any size stand together, in any order, and each gives what it gives alone."""
    model = build(detector, threshold=0.0).eval()
    images = [torch.randn(3, *size) for size in ((64, 64), (64, 96), (40, 50), (60, 64))]
    with torch.no_grad():
        for image, found in zip(images, model(images), strict=True):
            (alone,) = model([image])
            assert len(alone["scores"]) > 0 and found.keys() == alone.keys()
            assert all(torch.allclose(value, alone[name], atol=1e-4) for name, value in found.items())


@pytest.mark.parametrize("detector", DETECTORS)
def test_autocast_rounds_neither_boxes_nor_losses(detector):
    model = build(detector, threshold=0.0)
    x = [torch.randn(3, 64, 64)] * 2
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.train()(x, targets())
        with torch.no_grad():
            found = model.eval()(x)[0]
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert found["boxes"].dtype == torch.float32
    # Of bfloat16's numbers beyond 32 none lies between two quarters.
    boxes = found["boxes"][(found["boxes"] > 32) & (found["boxes"] < 64)]
    assert (boxes * 4 != (boxes * 4).round()).any()


@pytest.mark.parametrize("detector", DETECTORS)
def test_what_was_seen_first_changes_nothing(detector):
    model = build(detector, threshold=0.0).eval()
    other = build(detector, threshold=0.0).eval()
    other.load_state_dict(model.state_dict())
    small, large = torch.randn(3, 35, 40), torch.randn(3, 64, 64)
    with torch.no_grad():
        model([large])
        (after,), (alone,) = model([small]), other([small])
    assert torch.equal(after["scores"], alone["scores"]) and torch.equal(after["boxes"], alone["boxes"])


def test_proposals_are_cut_out_where_they_are():
    """A grid whose values are their own columns in pixels: the middle of what is cut out is the box's."""
    network = build("faster_rcnn_smoke", "resnet_18").network
    grids = {}
    for i, stride in enumerate((4, 8, 16, 32)):
        columns = (torch.arange(128 // stride) + 0.5) * stride
        grids[str(i)] = columns.expand(1, 1, 128 // stride, -1).clone()
    boxes = [torch.tensor([[20.0, 20, 90, 100], [40, 48, 60, 66]])]
    cut = network.roi_heads.box_roi_pool(grids, boxes, [(35, 40)])
    assert torch.allclose(cut.mean((1, 2, 3)), torch.tensor([55.0, 50.0]), atol=2)


def test_wide_keeps_what_it_packs():
    given = {"a": [torch.ones(2, dtype=torch.bfloat16)], "b": (torch.ones(1).double(), torch.ones(1).long())}
    found = wide(given)
    assert found["a"][0].dtype == torch.float32 and [each.dtype for each in found["b"]] == [torch.float64, torch.int64]


def test_group_norms_have_two_channels_or_more():
    for width in (8, 9, 32, 256):
        for module in build(d_pyramid=width).modules():
            if isinstance(module, nn.GroupNorm):
                assert module.num_channels % module.num_groups == 0
                assert module.num_channels // module.num_groups > 1
    assert not any(isinstance(module, nn.GroupNorm) for module in build(norm="none").network.head.modules())


def test_weights_of_a_classifier_begin_the_backbone():
    classifier = models.build(Spec("vmamba_smoke", n_classes=4), {"in_channels": 3, "img_size": (64, 64)})
    model = build()
    head = model.network.head.classification_head.cls_logits.weight.clone()
    load_pretrained(model, classifier.state_dict())
    theirs, own = classifier.state_dict(), model.backbone.state_dict()
    assert own and all(torch.equal(value, theirs[name]) for name, value in own.items())
    assert torch.equal(model.network.head.classification_head.cls_logits.weight, head)
    whole = {name: value + 1 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    load_pretrained(model, whole)
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("detector", "arguments", "message"),
    [
        ("fcos_smoke", {"d_pyramid": 32}, "d_pyramid=32: FCOS' group norms need a multiple of 64"),
        ("retinanet_smoke", {"d_pyramid": 0}, "d_pyramid=0: needs at least 1"),
        ("retinanet_smoke", {"long_side": 64}, "long_side=64 without short_side has no effect"),
        ("mask_rcnn_smoke", {"d_mask": 0}, "d_mask=0: needs at least 1"),
    ],
)
def test_what_cannot_be_is_named(detector, arguments, message):
    with pytest.raises(ConfigError, match=message):
        build(detector, **arguments)


def test_other_backbones_and_absent_masks_are_named():
    with pytest.raises(ConfigError, match="backbone is a Linear; it must be an image model"):
        RetinaNet(backbone=nn.Linear(2, 2), n_classes=3)
    with pytest.raises(ConfigError, match=r"learns from instances' masks.*data\.masks=true"):
        build("mask_rcnn_smoke").train()([torch.randn(3, 64, 64)] * 2, targets(masks=False))


def test_an_absent_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision.ops", None)
    with pytest.raises(ConfigError, match=r"detectors are torchvision's.*pip install 'selectra\[vision\]'"):
        build()
