"""Image models to compare with: ViT, DeiT, Swin, ConvNeXt, MLP-Mixer and ResNet, timm's own classes behind our door.

Each is timm's backbone without its classifier (`body`) and a linear map (`head`), so that features, embedding and head
are those of every image model here. Weights of timm's files load through `selectra.pretrained.load_pretrained`.

Sources: ViT arXiv:2010.11929, DeiT arXiv:2012.12877, Swin arXiv:2103.14030, ConvNeXt arXiv:2201.03545, MLP-Mixer
arXiv:2105.01601, ResNet arXiv:1512.03385; github.com/huggingface/pytorch-image-models.

Departures: images of any size of a patch or more are taken (timm's "dynamic" options), but by MLP-Mixer, whose maps
along tokens fix their number; ResNet can start with one convolution of side 3 in place of side 7 and pooling, as for
small images (arXiv:1512.03385, Sec. 4.2); ConvNeXt's patches of 2 pixels are that, where timm's class halves the grid
once more behind them.
"""

import importlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.image import Size, quarters, require_image, sides, start_linear
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

Stem = Literal["imagenet", "small"]


def timm_class(module: str, name: str) -> Any:
    """A class of timm, which is imported when the first baseline is built.

    Raises:
        ConfigError: timm is not installed.
    """
    try:
        return getattr(importlib.import_module(f"timm.{module}"), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this model is timm's, and {error.name} is not installed: pip install 'selectra[vision]'."
        ) from error


class Baseline(nn.Module):
    """A backbone of timm's and a classifier.

    Args:
        body: The backbone, without a classifier.
        n_classes: Classes.
        in_channels: Channels of the image.
        seen: Numbers of timm's features that `features` gives.
        least: Pixels that each side must have.
    """

    # Where filters see the image's channels.
    first_filters = ("body.patch_embed.", "body.stem.0.", "body.conv1.")

    def __init__(self, body: Any, n_classes: int, in_channels: int, seen: Sequence[int], least: int) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, in_channels=in_channels)
        self.body, self.in_channels, self.least, self.seen = body, in_channels, least, list(seen)
        self.head = nn.Linear(body.num_features, n_classes)
        start_linear([self.head])
        self.feature_dims = tuple(body.feature_info[i]["num_chs"] for i in seen)
        self.feature_strides = tuple(body.feature_info[i]["reduction"] for i in seen)
        asked = body.no_weight_decay() if hasattr(body, "no_weight_decay") else ()
        self.no_decay = tuple(f"body.{name}" for name, _ in body.named_parameters() if name in asked)

    def features(self, x: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b h w d"]]:
        """The grid behind every stage, or behind each quarter of the blocks, finest first."""
        count, x = len(x), self._prepared(x)
        grids = self.body.forward_intermediates(x, indices=self.seen, intermediates_only=True, output_fmt="NCHW")
        return [grid[:count].permute(0, 2, 3, 1) for grid in grids]

    def embed(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        """What the head reads."""
        count, x = len(x), self._prepared(x)
        return self.body.forward_head(self.body.forward_features(x), pre_logits=True)[:count]

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n_classes"]:
        """Scores of the classes, before a softmax."""
        return self.head(self.embed(x))

    def units(self) -> list[nn.Module]:
        """What stands one behind the other: stages, or blocks where all have one resolution."""
        raise NotImplementedError

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return self.units()

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A state of timm's under our keys."""
        heads = ("head.fc.", "head.", "fc.")
        renamed = {}
        for key, value in state.items():
            prefix = next((head for head in heads if key in (f"{head}weight", f"{head}bias")), None)
            renamed[f"body.{key}" if prefix is None else f"head.{key.removeprefix(prefix)}"] = value
        return renamed

    def fit_weight(self, key: str, value: Tensor, own: Tensor) -> Tensor | None:
        """A weight of another grid or of other channels at ours; None where it has no place."""
        if key == "body.pos_embed" and value.dim() == 3 and value.shape[2] == own.shape[2]:
            resize = timm_class("layers", "resample_abs_pos_embed")
            prefix = self.body.num_prefix_tokens
            n_tokens = value.shape[1] - prefix
            if n_tokens < 1 or math.isqrt(n_tokens) ** 2 != n_tokens:
                return None
            return resize(value.float(), list(self.body.patch_embed.grid_size), num_prefix_tokens=prefix)
        return None

    def _prepared(self, x: Tensor) -> Tensor:
        """The images, if they fit; of an empty batch, which timm's classes do not take, one that is cut off later."""
        require_image(x, self.in_channels, self.least)
        return x if len(x) else x.new_zeros(1, *x.shape[1:])


class _Plain(Baseline):
    """Blocks at one resolution."""

    def __init__(self, body: Any, n_classes: int, in_channels: int, patch_size: int) -> None:
        seen = quarters(len(body.blocks))
        super().__init__(body, n_classes, in_channels, seen, patch_size)

    def units(self) -> list[nn.Module]:
        return list(self.body.blocks)


def _vit(size: Size, patch_size: int, options: dict[str, Any]) -> Any:
    sized = {"img_size": size, "patch_size": patch_size, "dynamic_img_size": True, "dynamic_img_pad": True}
    return timm_class("models.vision_transformer", "VisionTransformer")(num_classes=0, **sized, **options)


@models.register(
    "vit",
    kind="image",
    source="arXiv:2010.11929",
    smoke={"d_model": 16, "depth": 2, "n_heads": 2, "patch_size": 8},
    tiny={},
    small={"d_model": 384, "n_heads": 6},
    base={"d_model": 768, "n_heads": 12},
)
class ViT(_Plain):
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
class DeiT(_Plain):
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


def _require_vit(img_size: Size, patch_size: int, d_model: int, depth: int, n_heads: int) -> None:
    require_sizes(d_model=d_model, depth=depth, n_heads=n_heads, patch_size=patch_size)
    if d_model % n_heads:
        raise ConfigError(f"d_model={d_model} does not divide among n_heads={n_heads}")
    _require_patch(img_size, patch_size)


def _require_patch(img_size: Size, patch_size: int) -> None:
    if min(sides(img_size)) < patch_size:
        raise ConfigError(f"img_size={img_size} is smaller than patch_size={patch_size}")


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


def require_rate(drop_path: float) -> float:
    """The rate, if it is one."""
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path={drop_path}: must be at least 0 and less than 1")
    return drop_path


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
        _require_patch(img_size, patch_size)
        body = timm_class("models.swin_transformer", "SwinTransformer")(
            img_size=img_size, patch_size=patch_size, in_chans=in_channels, num_classes=0, embed_dim=dims[0],
            depths=depths, num_heads=n_heads, window_size=window_size, always_partition=True, strict_img_size=False,
            mlp_ratio=mlp_ratio, drop_path_rate=require_rate(drop_path),
        )  # fmt: skip
        super().__init__(body, n_classes, in_channels, range(len(dims)), patch_size)
        self.patch_size = patch_size

    def _prepared(self, x: Tensor) -> Tensor:
        """Images of whole patches: zeros below and on the right."""
        x = super()._prepared(x)
        below, right = (-side % self.patch_size for side in x.shape[2:])
        return nn.functional.pad(x, (0, right, 0, below)) if below or right else x

    def units(self) -> list[nn.Module]:
        return list(self.body.layers)

    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.body.layers for block in stage.blocks]


def require_stages(
    dims: Sequence[int], depths: Sequence[int], n_heads: Sequence[int] | None = None, n_stages: int | None = None
) -> None:
    """Raise unless every stage has one of each; timm's ConvNeXt and ResNet have four stages."""
    given = {"dims": dims, "depths": depths} | ({} if n_heads is None else {"n_heads": n_heads})
    lengths = {len(each) for each in given.values()}
    if not dims or len(lengths) > 1 or lengths != {n_stages or len(dims)}:
        said = ", ".join(f"{name}={tuple(each)}" for name, each in given.items())
        raise ConfigError(f"{said}: needs one of each for every stage" + (f", {n_stages} in all" if n_stages else ""))


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


@models.register(
    "mlp_mixer",
    kind="image",
    source="arXiv:2105.01601",
    smoke={"d_model": 16, "depth": 2, "patch_size": 8, "img_size": 32},
    small={},
    base={"d_model": 768, "depth": 12},
)
class MLPMixer(_Plain):
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
        _require_patch(img_size, patch_size)
        body = timm_class("models.mlp_mixer", "MlpMixer")(
            img_size=img_size, in_chans=in_channels, num_classes=0, patch_size=patch_size, num_blocks=depth,
            embed_dim=d_model, mlp_ratio=mlp_ratios, drop_path_rate=require_rate(drop_path),
        )  # fmt: skip
        super().__init__(body, n_classes, in_channels, patch_size)
        self.size = sides(img_size)

    def _prepared(self, x: Tensor) -> Tensor:
        x = super()._prepared(x)
        if tuple(x.shape[2:]) != self.size:
            raise ConfigError(
                f"the image is {x.shape[2]} x {x.shape[3]} pixels, and this model was built for "
                f"{self.size[0]} x {self.size[1]}, which its maps along tokens fix: resize it, or set img_size."
            )
        return x


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
