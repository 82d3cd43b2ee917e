"""MLP-Mixer, timm's own: MLPs along tokens and along channels (Tolstikhin et al. 2021, arXiv:2105.01601)."""

from torch import Tensor

from selectra.errors import ConfigError
from selectra.layers.image import Size, sides
from selectra.mixers.sizes import require_sizes
from selectra.models.baseline import PlainBaseline, require_patch, require_rate, timm_class
from selectra.registry import models


@models.register(
    "mlp_mixer",
    kind="image",
    source="arXiv:2105.01601",
    smoke={"d_model": 16, "depth": 2, "patch_size": 8, "img_size": 32},
    small={},
    base={"d_model": 768, "depth": 12},
)
class MLPMixer(PlainBaseline):
    """MLP-Mixer: MLPs along tokens and along channels, for images of one size.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        img_size: Pixels of the images' sides.
        patch_size: Pixels of a patch's side.
        d_model: Width of a token.
        depth: Number of blocks.
        mlp_ratios: Inner width of the MLPs along tokens and along channels over `d_model`.
        drop_path: Rate at which the last block's branches are left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: Size = 224,
        patch_size: int = 16,
        d_model: int = 512,
        depth: int = 8,
        mlp_ratios: tuple[float, float] = (0.5, 4.0),
        drop_path: float = 0.0,
    ) -> None:
        require_sizes(d_model=d_model, depth=depth, patch_size=patch_size)
        require_patch(img_size, patch_size)
        body = timm_class("models.mlp_mixer", "MlpMixer")(
            img_size=img_size, in_chans=in_channels, num_classes=0, patch_size=patch_size, num_blocks=depth,
            embed_dim=d_model, mlp_ratio=mlp_ratios, drop_path_rate=require_rate(drop_path),
        )  # fmt: skip
        super().__init__(body, n_classes, in_channels, patch_size)
        self.size = sides(img_size)

    def prepared(self, x: Tensor) -> Tensor:
        x = super().prepared(x)
        if tuple(x.shape[2:]) != self.size:
            raise ConfigError(
                f"the image is {x.shape[2]} x {x.shape[3]} pixels, and this model was built for "
                f"{self.size[0]} x {self.size[1]}, which its maps along tokens fix: resize it, or set img_size."
            )
        return x
