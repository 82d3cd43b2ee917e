"""ConvNeXt, timm's own: convolutions of side 7 for each channel, and MLPs (Liu et al. 2022, arXiv:2201.03545).

Departures: patches of 2 pixels are that, where timm's class halves the grid once more behind them.
"""

from torch import nn

from selectra.models.baseline import Baseline, require_rate, require_stages, timm_class
from selectra.registry import models


@models.register(
    "convnext",
    kind="image",
    source="arXiv:2201.03545",
    smoke={"dims": (8, 8, 8, 16), "depths": (1, 1, 1, 1), "patch_size": 2},
    tiny={},
    small={"depths": (3, 3, 27, 3)},
    base={"depths": (3, 3, 27, 3), "dims": (128, 256, 512, 1024)},
)
class ConvNeXt(Baseline):
    """ConvNeXt: convolutions of side 7 for each channel, and MLPs.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        patch_size: Pixels of a patch's side.
        dims: Width of every stage.
        depths: Blocks of every stage.
        d_conv: Side of the convolutions.
        scale: First value of the branches' learned scales.
        drop_path: Rate at which the last block's branch is left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        patch_size: int = 4,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (3, 3, 9, 3),
        d_conv: int = 7,
        scale: float = 1e-6,
        drop_path: float = 0.0,
    ) -> None:
        require_stages(dims, depths, n_stages=4)
        body = timm_class("models.convnext", "ConvNeXt")(
            in_chans=in_channels, num_classes=0, depths=depths, dims=dims, kernel_sizes=d_conv, patch_size=patch_size,
            ls_init_value=scale, drop_path_rate=require_rate(drop_path),
        )  # fmt: skip
        if patch_size == 2:
            # timm takes these for half of a stem and halves the grid again.
            body.stages[0].downsample = nn.Identity()
            for info in body.feature_info:
                info["reduction"] //= 2
        # The norm behind the pooling belongs to the embedding, and stays.
        super().__init__(body, n_classes, in_channels, range(len(dims)), 8 * patch_size)

    def units(self) -> list[nn.Module]:
        return list(self.body.stages)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.body.stages for block in stage.blocks]
