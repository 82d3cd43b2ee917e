"""ResNet, timm's own (He et al. 2015, arXiv:1512.03385).

Departures: it can start with one convolution of side 3 in place of side 7 and pooling, as for small images (Sec. 4.2).
"""

from typing import Literal, get_args

from torch import nn

from selectra.errors import ConfigError
from selectra.mixers.sizes import require_sizes
from selectra.models.baseline import Baseline, require_rate, require_stages, timm_class
from selectra.registry import models

Stem = Literal["imagenet", "small"]


@models.register(
    "resnet",
    kind="image",
    source="arXiv:1512.03385",
    smoke={"dims": (8, 8, 8, 16), "depths": (1, 1, 1, 1), "stem": "small"},
    **{"18": {}, "34": {"depths": (3, 4, 6, 3)}, "50": {"depths": (3, 4, 6, 3), "block": "bottleneck"}},
)
class ResNet(Baseline):
    """ResNet: convolutions of side 3 with batch norm, added to their input.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        dims: Width of every stage; a bottleneck's output is four times as wide.
        depths: Blocks of every stage.
        block: Two convolutions of side 3, or one between two of side 1.
        stem: A convolution of side 7 and pooling, together with stride 4; or one of side 3 for small images.
        stride: Stride of the small stem.
        drop_path: Rate at which the last block's branch is left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        dims: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (2, 2, 2, 2),
        block: Literal["basic", "bottleneck"] = "basic",
        stem: Stem = "imagenet",
        stride: int = 1,
        drop_path: float = 0.0,
    ) -> None:
        require_stages(dims, depths, n_stages=4)
        if stem not in get_args(Stem):
            raise ConfigError(f"stem={stem!r}: takes {', '.join(map(repr, get_args(Stem)))}")
        kind = {"basic": "BasicBlock", "bottleneck": "Bottleneck"}[block]
        body = timm_class("models.resnet", "ResNet")(
            timm_class("models.resnet", kind), layers=depths, channels=dims, num_classes=0, in_chans=in_channels,
            drop_path_rate=require_rate(drop_path),
        )  # fmt: skip
        if stem == "small":
            require_sizes(stride=stride)
            body.conv1 = nn.Conv2d(in_channels, body.conv1.out_channels, 3, stride, 1, bias=False)
            nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
            body.maxpool = nn.Identity()
            for info in body.feature_info:
                info["reduction"] = info["reduction"] * stride // (2 if info["module"] == "act1" else 4)
        # The first of timm's features is the stem's.
        super().__init__(body, n_classes, in_channels, range(1, len(dims) + 1), 1)

    def units(self) -> list[nn.Module]:
        return [getattr(self.body, f"layer{i + 1}") for i in range(len(self.feature_dims))]

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.units() for block in stage.children()]
