"""Detection and instance segmentation: a backbone of ours, its four grids, and torchvision's detectors above them.

RetinaNet (Lin et al. 2017, arXiv:1708.02002), FCOS (Tian et al. 2019, arXiv:1904.01355), Faster R-CNN (Ren et al. 2015,
arXiv:1506.01497) and Mask R-CNN (He et al. 2017, arXiv:1703.06870) are torchvision's own, as is the feature pyramid
(arXiv:1612.03144) between.

Departures from torchvision: `norm="group"`, the default, has group norms in the pyramid, RetinaNet's head and Mask
R-CNN's masks, which trainings from scratch need (He et al. 2018, "Rethinking ImageNet Pre-training", arXiv:1811.08883;
FCOS' head always has them); anchors follow the grids' strides; images come standardised by the data, and training sees
them in the size that the data gives them.
"""

from collections.abc import Sequence
from math import gcd, log2
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.levels import FourLevels
from selectra.mixers.sizes import require_sizes
from selectra.models.detector_parts import Found, by_image, counting, sizes, tv, wide, widened
from selectra.registry import models
from selectra.spec import Spec

Norm = Literal["group", "none"]
# Group norms have so many groups, or fewer, so that each has two channels or more: coarse grids have one position.
GROUPS = 32
# Height over width of anchors.
RATIOS = (0.5, 1.0, 2.0)


def norm_layer(norm: Norm) -> Any:
    """What makes a norm of so many channels; None for no norms."""

    def group(width: int) -> nn.GroupNorm:
        count = gcd(GROUPS, width)
        return nn.GroupNorm(count if count < width else max(1, count // 2), width)

    return None if norm == "none" else group


class Grids(nn.Module):
    """What torchvision calls a backbone: an image model, its four grids, and the feature pyramid.

    Args:
        body: An image model; its classifier is dropped.
        d_pyramid: Width of every grid.
        first: Number of the finest of the four grids that is used.
        extra: What makes coarser grids of the last, by the width.
        norm: Norms in the pyramid.

    Attributes:
        strides: Pixels from one position to the next of the grids that come from the backbone.
        out_channels: Width of every grid.
    """

    def __init__(self, body: Any, d_pyramid: int, first: int, extra: Any, norm: Norm) -> None:
        super().__init__()
        if not hasattr(body, "keep_features"):
            raise ConfigError(f"backbone is a {type(body).__name__}; it must be an image model, such as vmamba_tiny")
        body.keep_features()
        self.body, self.first, self.out_channels = body, first, d_pyramid
        self.levels = FourLevels(body.feature_dims, body.feature_strides)
        if self.levels.plain:
            # Those that are not used would have no gradient.
            for i in range(first):
                self.levels.ways[i] = nn.Identity()
        self.strides, self.coarsest = self.levels.strides[first:], self.levels.strides[-1]
        pyramid = tv("ops").FeaturePyramidNetwork
        self.pyramid = pyramid(list(self.levels.dims[first:]), d_pyramid, extra(d_pyramid), norm_layer(norm))

    def forward(self, x: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, "b d _ _"]]:
        grids = self.levels(self.body.features(x))[self.first :]
        return wide(self.pyramid({str(i): grid for i, grid in enumerate(grids)}))


class Detector(nn.Module):
    """A backbone and one of torchvision's detectors, for images of any size.

    Args:
        grids: The backbone with its pyramid.
        network: torchvision's detector above it.
        short_side: Evaluation: pixels of the shorter side that images are brought to; None leaves them.
        long_side: Evaluation: most pixels of the longer side then.
        first_label: Number of the first class in the network: two-stage detectors keep 0 for the background.
    """

    masks: ClassVar[bool] = False
    """Whether it finds instances' masks."""

    def __init__(
        self, grids: Grids, network: Any, short_side: int | None, long_side: int | None, first_label: int
    ) -> None:
        super().__init__()
        if short_side is None and long_side is not None:
            raise ConfigError(f"long_side={long_side} without short_side has no effect; give both")
        require_sizes(short_side=short_side or 1, long_side=long_side or 1)
        network.transform = sizes(short_side, long_side, grids.coarsest)
        self.network, self.first_label = network, first_label

    @property
    def backbone(self) -> Any:
        """The image model."""
        return self.network.backbone.body

    def forward(
        self,
        images: Sequence[Float[Tensor, "c _ _"]],
        targets: Sequence[Found] | None = None,
        counted: bool = False,
    ) -> Found | list[Found] | tuple[Found, Found]:
        """In training, the losses by name; else of every image "boxes", "labels", "scores" and, of Mask R-CNN, "masks".

        Args:
            images: Standardised.
            targets: Training: "boxes" (n, 4) as left, top, right, bottom in pixels, "labels" (n,) from 0, and for Mask
                R-CNN "masks" (n, h, w). Where images are a part of a batch, also "key" (), a whole number from which
                what is drawn for the image is drawn, and "least" (2,), height and width of the batch's largest sides.
            counted: Training: give, beside the losses, over how many positions or proposals each is the mean; those
                without a count are means over images.

        Raises:
            ConfigError: It trains masks, and there are none.
        """
        if not self.training:
            return self._found(images)
        targets = targets or ()
        if self.masks and not all("masks" in target for target in targets):
            raise ConfigError(
                "Mask R-CNN learns from instances' masks, and the data gives none: data.masks=true, where the "
                "annotations have them."
            )
        self._follow(targets)
        losses = self.network(
            list(images), [{**target, "labels": target["labels"] + self.first_label} for target in targets]
        )
        return (losses, self.counts()) if counted else losses

    def _found(self, images: Sequence[Tensor]) -> list[Found]:
        """Of each image what would be found if it were alone: together are those that are padded alike."""
        sizes = [self.network.transform.padded(image) for image in images]
        found: dict[int, Found] = {}
        for size in dict.fromkeys(sizes):
            rows = [i for i, other in enumerate(sizes) if other == size]
            found |= zip(rows, self.network([images[i] for i in rows]), strict=True)
        return [{**found[i], "labels": found[i]["labels"] - self.first_label} for i in range(len(images))]

    def _follow(self, targets: Sequence[Found]) -> None:
        """Let sizes and draws be those that the targets say."""
        keyed = bool(targets) and all("key" in target for target in targets)
        keys = torch.stack([target["key"] for target in targets]).tolist() if keyed else []
        for sampler in self.samplers():
            sampler.keys = keys
        least = [target["least"] for target in targets if "least" in target]
        self.network.transform.least = tuple(torch.stack(least).amax(0).tolist()) if least else (0, 0)

    def samplers(self) -> list[Any]:
        """What draws positions or proposals at random."""
        return []

    def counts(self) -> Found:
        """Over how many positions or proposals the last losses are means."""
        return {}

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return self.backbone.blocks()

    def units(self) -> list[nn.Module]:
        """The backbone's stages, or its blocks where all have one resolution."""
        return list(self.backbone.units() if hasattr(self.backbone, "units") else self.backbone.level_list())


def anchors(strides: Sequence[int], sides: Sequence[float], ratios: Sequence[float]) -> Any:
    """Boxes at every position: sides are in strides."""
    per_grid = tuple(tuple(int(stride * side) for side in sides) for stride in strides)
    return tv("models.detection.anchor_utils").AnchorGenerator(per_grid, (tuple(ratios),) * len(per_grid))


def _five(grids: Grids) -> tuple[int, ...]:
    """Strides of the pyramid's grids with the coarser ones that it adds."""
    last = grids.strides[-1]
    return (*grids.strides, *(last * 2**i for i in range(1, 6 - len(grids.strides))))


def _coarser(width: int) -> Any:
    """Two grids more, by convolutions of stride 2."""
    return tv("ops.feature_pyramid_network").LastLevelP6P7(width, width)


def _pooled(width: int) -> Any:
    """One grid more, every second position of the last."""
    return tv("ops.feature_pyramid_network").LastLevelMaxPool()


BASE = {"backbone": Spec("vmamba_tiny_s1l8")}
SMOKE = {"backbone": Spec("vmamba_smoke"), "d_pyramid": 8}


@models.register("retinanet", kind="detection", source="arXiv:1708.02002", smoke=SMOKE, base=BASE)
class RetinaNet(Detector):
    """RetinaNet: one stage, anchors on grids of stride 8 to 128, focal loss.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_pyramid: Width of the pyramid and the heads.
        norm: Group norms in the pyramid and the heads, or none.
        anchor: Side of the smallest anchor of each grid in strides; two others are a third of an octave apart.
        short_side: Evaluation: pixels of the shorter side that images are brought to; None leaves them.
        long_side: Evaluation: most pixels of the longer side then.
        threshold: Least score of what is found.
        most: Most objects found on an image.
    """

    def __init__(
        self, *, backbone: nn.Module, n_classes: int, d_pyramid: int = 256, norm: Norm = "group", anchor: float = 4.0,
        short_side: int | None = None, long_side: int | None = None, threshold: float = 0.05, most: int = 100,
    ) -> None:  # fmt: skip
        require_sizes(n_classes=n_classes, d_pyramid=d_pyramid, most=most)
        module = tv("models.detection.retinanet")
        grids = Grids(backbone, d_pyramid, 1, _coarser, norm)
        boxes = anchors(_five(grids), [anchor * 2 ** (i / 3) for i in range(3)], RATIOS)
        head = module.RetinaNetHead(d_pyramid, 3 * len(RATIOS), n_classes, norm_layer=norm_layer(norm))
        network = module.RetinaNet(
            grids, n_classes, anchor_generator=boxes, head=widened(head), score_thresh=threshold,
            detections_per_img=most,
        )  # fmt: skip
        super().__init__(grids, network, short_side, long_side, first_label=0)


@models.register("fcos", kind="detection", source="arXiv:1904.01355", smoke=SMOKE | {"d_pyramid": 64}, base=BASE)
class FCOS(Detector):
    """FCOS: one stage, distances to the four sides at every position of grids of stride 8 to 128.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_pyramid: Width of the pyramid and the heads, a multiple of 64.
        norm: Group norms in the pyramid, or none; the heads always have them.
        short_side: Evaluation: pixels of the shorter side that images are brought to; None leaves them.
        long_side: Evaluation: most pixels of the longer side then.
        threshold: Least score of what is found.
        most: Most objects found on an image.
    """

    def __init__(
        self, *, backbone: nn.Module, n_classes: int, d_pyramid: int = 256, norm: Norm = "group",
        short_side: int | None = None, long_side: int | None = None, threshold: float = 0.05, most: int = 100,
    ) -> None:  # fmt: skip
        require_sizes(n_classes=n_classes, most=most)
        if d_pyramid < 1 or d_pyramid % (2 * GROUPS):
            raise ConfigError(f"d_pyramid={d_pyramid}: FCOS' group norms need a multiple of {2 * GROUPS}")
        grids = Grids(backbone, d_pyramid, 1, _coarser, norm)
        boxes, module = anchors(_five(grids), (1.0,), (1.0,)), tv("models.detection.fcos")
        head = widened(counting(module.FCOSHead)(d_pyramid, 1, n_classes))
        network = module.FCOS(
            grids, n_classes, anchor_generator=boxes, head=head, score_thresh=threshold, detections_per_img=most
        )
        super().__init__(grids, network, short_side, long_side, first_label=0)

    def counts(self) -> Found:
        return dict.fromkeys(("classification", "bbox_regression", "bbox_ctrness"), self.network.head.count)


def _pool(grids: Grids, side: int) -> Any:
    """What cuts proposals out of the grids.

    torchvision guesses the grids' scales from the first images that it sees, and keeps them: wrong by two where these
    were small and their padding wide. Here they are the strides'.
    """
    module = tv("ops.poolers")
    pool = module.MultiScaleRoIAlign([str(i) for i in range(len(grids.strides))], side, sampling_ratio=2)
    pool.scales = [1 / stride for stride in grids.strides]
    finest, coarsest = (int(log2(grids.strides[i])) for i in (0, -1))
    pool.map_levels = module.initLevelMapper(finest, coarsest)
    return pool


def _two_stages(
    grids: Grids, n_classes: int, anchor: float, d_box: int, threshold: float, most: int, **more: Any
) -> Any:
    """Faster R-CNN, or Mask R-CNN where `more` has the masks' head."""
    faster, rpn = tv("models.detection.faster_rcnn"), tv("models.detection.rpn")
    head = rpn.RPNHead(grids.out_channels, len(RATIOS))
    if more:
        more["mask_roi_pool"] = _pool(grids, 14)
    build = tv("models.detection.mask_rcnn").MaskRCNN if more else faster.FasterRCNN
    network = build(
        grids,
        rpn_anchor_generator=anchors(_five(grids), (anchor,), RATIOS),
        rpn_head=widened(head),
        box_roi_pool=_pool(grids, 7),
        box_head=faster.TwoMLPHead(grids.out_channels * 7**2, d_box),
        box_predictor=widened(faster.FastRCNNPredictor(d_box, n_classes + 1)),
        box_score_thresh=threshold,
        box_detections_per_img=most,
        **more,
    )
    for salt, part in enumerate((network.rpn, network.roi_heads), start=1):
        part.fg_bg_sampler = by_image(part.fg_bg_sampler, salt)
    return network


@models.register("faster_rcnn", kind="detection", source="arXiv:1506.01497", smoke=SMOKE | {"d_box": 16}, base=BASE)
class FasterRCNN(Detector):
    """Faster R-CNN: proposals on grids of stride 4 to 64, and a classifier of what stands in them.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_pyramid: Width of the pyramid.
        d_box: Width of the boxes' head.
        norm: Group norms in the pyramid, or none.
        anchor: Side of each grid's anchors in strides.
        short_side: Evaluation: pixels of the shorter side that images are brought to; None leaves them.
        long_side: Evaluation: most pixels of the longer side then.
        threshold: Least score of what is found.
        most: Most objects found on an image.
    """

    def __init__(
        self, *, backbone: nn.Module, n_classes: int, d_pyramid: int = 256, d_box: int = 1024, norm: Norm = "group",
        anchor: float = 8.0, short_side: int | None = None, long_side: int | None = None, threshold: float = 0.05,
        most: int = 100,
    ) -> None:  # fmt: skip
        require_sizes(n_classes=n_classes, d_pyramid=d_pyramid, d_box=d_box, most=most)
        grids = Grids(backbone, d_pyramid, 0, _pooled, norm)
        network = _two_stages(grids, n_classes, anchor, d_box, threshold, most)
        super().__init__(grids, network, short_side, long_side, first_label=1)

    def samplers(self) -> list[Any]:
        return [self.network.rpn.fg_bg_sampler, self.network.roi_heads.fg_bg_sampler]

    def counts(self) -> Found:
        positions, proposals = self.samplers()
        return {
            **dict.fromkeys(("loss_objectness", "loss_rpn_box_reg"), positions.count),
            **dict.fromkeys(("loss_classifier", "loss_box_reg"), proposals.count),
        }


@models.register(
    "mask_rcnn", kind="detection", source="arXiv:1703.06870", smoke=SMOKE | {"d_box": 16, "d_mask": 8}, base=BASE
)
class MaskRCNN(FasterRCNN):
    """Mask R-CNN: Faster R-CNN with the mask of every object beside its class.

    Args:
        backbone: An image model; its classifier is dropped.
        n_classes: Classes.
        d_pyramid: Width of the pyramid.
        d_box: Width of the boxes' head.
        d_mask: Width of the masks' head.
        norm: Group norms in the pyramid and the masks' head, or none.
        anchor: Side of each grid's anchors in strides.
        short_side: Evaluation: pixels of the shorter side that images are brought to; None leaves them.
        long_side: Evaluation: most pixels of the longer side then.
        threshold: Least score of what is found.
        most: Most objects found on an image.
    """

    masks = True

    def __init__(
        self, *, backbone: nn.Module, n_classes: int, d_pyramid: int = 256, d_box: int = 1024, d_mask: int = 256,
        norm: Norm = "group", anchor: float = 8.0, short_side: int | None = None, long_side: int | None = None,
        threshold: float = 0.05, most: int = 100,
    ) -> None:  # fmt: skip
        require_sizes(n_classes=n_classes, d_pyramid=d_pyramid, d_box=d_box, d_mask=d_mask, most=most)
        module = tv("models.detection.mask_rcnn")
        grids = Grids(backbone, d_pyramid, 0, _pooled, norm)
        head = module.MaskRCNNHeads(d_pyramid, (d_mask,) * 4, 1, norm_layer=norm_layer(norm))
        predictor = widened(module.MaskRCNNPredictor(d_mask, d_mask, n_classes + 1))
        network = _two_stages(
            grids, n_classes, anchor, d_box, threshold, most, mask_head=head, mask_predictor=predictor
        )
        Detector.__init__(self, grids, network, short_side, long_side, first_label=1)

    def counts(self) -> Found:
        return {**super().counts(), "loss_mask": self.network.roi_heads.fg_bg_sampler.positive}
