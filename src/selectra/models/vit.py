"""Vision Transformers, timm's own: ViT and DeiT.

ViT (Dosovitskiy et al. 2020, arXiv:2010.11929) is the one whose head reads the tokens' mean; DeiT (Touvron et al. 2020,
arXiv:2012.12877) has a class token, and here no distillation token.

Departures: images of any size of a patch or more are taken, positions are resized (timm's "dynamic" options).
"""

from typing import Any

from selectra.errors import ConfigError
from selectra.layers.image import Size
from selectra.mixers.sizes import require_sizes
from selectra.models.baseline import PlainBaseline, require_patch, require_rate, timm_class
from selectra.registry import models


def _vit(size: Size, patch_size: int, options: dict[str, Any]) -> Any:
    sized = {"img_size": size, "patch_size": patch_size, "dynamic_img_size": True, "dynamic_img_pad": True}
    return timm_class("models.vision_transformer", "VisionTransformer")(num_classes=0, **sized, **options)


def _require_vit(img_size: Size, patch_size: int, d_model: int, depth: int, n_heads: int) -> None:
    require_sizes(d_model=d_model, depth=depth, n_heads=n_heads, patch_size=patch_size)
    if d_model % n_heads:
        raise ConfigError(f"d_model={d_model} does not divide among n_heads={n_heads}")
    require_patch(img_size, patch_size)


def _vit_options(
    in_channels: int, d_model: int, depth: int, n_heads: int, mlp_ratio: float, drop_path: float
) -> dict[str, Any]:
    return {
        "in_chans": in_channels,
        "embed_dim": d_model,
        "depth": depth,
        "num_heads": n_heads,
        "mlp_ratio": mlp_ratio,
        "drop_path_rate": require_rate(drop_path),
    }


@models.register(
    "vit",
    kind="image",
    source="arXiv:2010.11929",
    smoke={"d_model": 16, "depth": 2, "n_heads": 2, "patch_size": 8},
    tiny={},
    small={"d_model": 384, "n_heads": 6},
    base={"d_model": 768, "n_heads": 12},
)
class ViT(PlainBaseline):
    """Vision Transformer: attention over patches; the head reads the tokens' mean.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        img_size: Pixels of the images' sides, or height and width.
        patch_size: Pixels of a patch's side.
        d_model: Width of a token.
        depth: Number of blocks.
        n_heads: Attention heads.
        mlp_ratio: Inner width of the MLPs over `d_model`.
        drop_path: Rate at which the last block's branches are left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: Size = 224,
        patch_size: int = 16,
        d_model: int = 192,
        depth: int = 12,
        n_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        _require_vit(img_size, patch_size, d_model, depth, n_heads)
        options = _vit_options(in_channels, d_model, depth, n_heads, mlp_ratio, drop_path)
        body = _vit(img_size, patch_size, {**options, "class_token": False, "global_pool": "avg", "fc_norm": False})
        super().__init__(body, n_classes, in_channels, patch_size)


@models.register(
    "deit",
    kind="image",
    source="arXiv:2012.12877",
    smoke={"d_model": 16, "depth": 2, "n_heads": 2, "patch_size": 8},
    tiny={},
    small={"d_model": 384, "n_heads": 6},
    base={"d_model": 768, "n_heads": 12},
)
class DeiT(PlainBaseline):
    """DeiT without its distillation token: the Transformer with a class token, which the head reads.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        img_size: Pixels of the images' sides, or height and width.
        patch_size: Pixels of a patch's side.
        d_model: Width of a token.
        depth: Number of blocks.
        n_heads: Attention heads.
        mlp_ratio: Inner width of the MLPs over `d_model`.
        drop_path: Rate at which the last block's branches are left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: Size = 224,
        patch_size: int = 16,
        d_model: int = 192,
        depth: int = 12,
        n_heads: int = 3,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
    ) -> None:
        _require_vit(img_size, patch_size, d_model, depth, n_heads)
        options = _vit_options(in_channels, d_model, depth, n_heads, mlp_ratio, drop_path)
        super().__init__(_vit(img_size, patch_size, options), n_classes, in_channels, patch_size)
