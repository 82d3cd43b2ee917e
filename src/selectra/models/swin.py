"""Swin Transformer, timm's own: attention inside windows that move (Liu et al. 2021, arXiv:2103.14030).

Departures: images of any size of a patch or more are taken, with zeros below and on the right up to whole patches.
"""

from itertools import pairwise

from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.image import Size
from selectra.models.baseline import Baseline, require_patch, require_rate, require_stages, timm_class
from selectra.registry import models


@models.register(
    "swin",
    kind="image",
    source="arXiv:2103.14030",
    smoke={"dims": (8, 16), "depths": (1, 1), "n_heads": (1, 2), "window_size": 4},
    tiny={},
    small={"depths": (2, 2, 18, 2)},
    base={"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "n_heads": (4, 8, 16, 32)},
)
class Swin(Baseline):
    """Swin Transformer: attention inside windows that move.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        img_size: Pixels of the images' sides, or height and width.
        patch_size: Pixels of a patch's side.
        dims: Width of every stage; each is twice the one before.
        depths: Blocks of every stage.
        n_heads: Attention heads of every stage.
        window_size: Tokens of a window's side.
        mlp_ratio: Inner width of the MLPs over that of their stage.
        drop_path: Rate at which the last block's branches are left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: Size = 224,
        patch_size: int = 4,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        n_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        require_stages(dims, depths, n_heads)
        if any(after != 2 * before for before, after in pairwise(dims)):
            raise ConfigError(f"dims={dims}: each width must be twice the one before")
        require_patch(img_size, patch_size)
        body = timm_class("models.swin_transformer", "SwinTransformer")(
            img_size=img_size, patch_size=patch_size, in_chans=in_channels, num_classes=0, embed_dim=dims[0],
            depths=depths, num_heads=n_heads, window_size=window_size, always_partition=True, strict_img_size=False,
            mlp_ratio=mlp_ratio, drop_path_rate=require_rate(drop_path),
        )  # fmt: skip
        super().__init__(body, n_classes, in_channels, range(len(dims)), patch_size)
        self.patch_size = patch_size

    def prepared(self, x: Tensor) -> Tensor:
        """Images of whole patches: zeros below and on the right."""
        x = super().prepared(x)
        below, right = (-side % self.patch_size for side in x.shape[2:])
        return nn.functional.pad(x, (0, right, 0, below)) if below or right else x

    def units(self) -> list[nn.Module]:
        return list(self.body.layers)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.body.layers for block in stage.blocks]
