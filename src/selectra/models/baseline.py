"""What image models to compare with share: timm's own classes behind our door.

Each is timm's backbone without its classifier (`body`) and a linear map (`head`), so that features, embedding and head
are those of every image model here. Weights of timm's files load through `selectra.pretrained.load_pretrained`.

Source: github.com/huggingface/pytorch-image-models.
"""

import importlib
import math
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.image import Size, quarters, require_image, sides, start_linear
from selectra.mixers.sizes import require_sizes


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
        count, x = x.shape[0], self.prepared(x)
        grids = self.body.forward_intermediates(x, indices=self.seen, intermediates_only=True, output_fmt="NCHW")
        return [grid[:count].permute(0, 2, 3, 1) for grid in grids]

    def embed(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b d"]:
        """What the head reads."""
        count, x = x.shape[0], self.prepared(x)
        return self.body.forward_head(self.body.forward_features(x), pre_logits=True)[:count]

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n_classes"]:
        """Scores of the classes, before a softmax."""
        return self.head(self.embed(x))

    def keep_features(self) -> None:
        """Drop, for good, what `features` does not need."""
        before = self.state_dict().keys()
        self.body.prune_intermediate_layers(self.seen, prune_norm=True, prune_head=True)
        self.head = nn.Identity()
        self.pruned = before - self.state_dict().keys()

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

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of learned positions."""
        size = getattr(getattr(self.body, "patch_embed", None), "grid_size", None)
        return None if size is None or getattr(self.body, "pos_embed", None) is None else (size[0], size[1])

    def fit_weight(self, key: str, value: Tensor, own: Tensor, grid: tuple[int, int] | None = None) -> Tensor | None:
        """A weight of another grid, square unless its sides are given, at ours; None where it has no place."""
        if key == "body.pos_embed" and value.dim() == 3 and value.shape[2] == own.shape[2]:
            resize = timm_class("layers", "resample_abs_pos_embed")
            prefix = self.body.num_prefix_tokens
            n_tokens = value.shape[1] - prefix
            side = math.isqrt(max(n_tokens, 0))
            rows, columns = grid or (side, side)
            if n_tokens < 1 or rows * columns != n_tokens:
                return None
            new = list(self.body.patch_embed.grid_size)
            return resize(value.float(), new, [rows, columns], num_prefix_tokens=prefix)
        return None

    def prepared(self, x: Tensor) -> Tensor:
        """The images, if they fit; of an empty batch, which timm's classes do not take, one that is cut off later."""
        require_image(x, self.in_channels, self.least)
        return x if x.shape[0] else x.new_zeros(1, *x.shape[1:])


class PlainBaseline(Baseline):
    """Blocks at one resolution."""

    def __init__(self, body: Any, n_classes: int, in_channels: int, patch_size: int) -> None:
        seen = quarters(len(body.blocks))
        super().__init__(body, n_classes, in_channels, seen, patch_size)

    def units(self) -> list[nn.Module]:
        return list(self.body.blocks)


def require_patch(img_size: Size, patch_size: int) -> None:
    if min(sides(img_size)) < patch_size:
        raise ConfigError(f"img_size={img_size} is smaller than patch_size={patch_size}")


def require_rate(drop_path: float) -> float:
    """The rate, if it is one."""
    if not 0 <= drop_path < 1:
        raise ConfigError(f"drop_path={drop_path}: must be at least 0 and less than 1")
    return drop_path


def require_stages(
    dims: Sequence[int], depths: Sequence[int], n_heads: Sequence[int] | None = None, n_stages: int | None = None
) -> None:
    """Raise unless every stage has one of each; timm's ConvNeXt and ResNet have four stages."""
    given = {"dims": dims, "depths": depths} | ({} if n_heads is None else {"n_heads": n_heads})
    lengths = {len(each) for each in given.values()}
    if not dims or len(lengths) > 1 or lengths != {n_stages or len(dims)}:
        said = ", ".join(f"{name}={tuple(each)}" for name, each in given.items())
        raise ConfigError(f"{said}: needs one of each for every stage" + (f", {n_stages} in all" if n_stages else ""))
