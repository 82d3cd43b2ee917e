"""xT: images of any size in regions, whose features see each other, Gupta et al. 2024, arXiv:2403.01915.

An image is cut into regions; a region encoder, any image model here, makes grids of each; the coarsest ones, side by
side as one long sequence, go through a context encoder: Mambas, HyperAttention, or attention in chunks with a memory
of the chunk before (Transformer-XL, arXiv:1901.02860). A class token at the end is read.

Source: github.com/bair-climate-initiative/xT, 4e79e41: `xt/models/decoders/decoder.py` and `context_encoders`.

Departures, paper and official code against each other and against this:
  residual     in the official code, and here, the residual of a Mamba layer is the normalised sequence
  direction    even Mamba layers run from the end, so that their class token, which stands at the end, sees nothing
               there; so does this
  sizes        the official code takes squares of whole regions; here any image, padded by the mean colour
  memory       the official Transformer-XL throws its memory away and reads the shape of a tensor as a number; here
               each layer sees its inputs of the chunk before, without gradient, and chunks do not overlap; class tokens
               of all chunks are averaged, as there
  gradients    with `grad_ratio` below 1 the official code puts regions back in another order than it took them; here
               they keep their places
  draws        HyperAttention (above 4,096 tokens) samples keys anew at every call in the official code; here it does in
               training, and has a fixed sample in evaluation, and fixed directions of its hash
  naive        the official attention of this name gets its arguments shifted and cannot be built; left out
  encoders     the paper's are Swin V2 and Hiera with weights of ImageNet; here any, such as `swin_tiny`
  dense tasks  the released code has none; here `features` gives the regions' grids side by side, the coarsest one
               behind the context encoder, so that any decoder stands above it (`Spec("upernet", backbone=Spec("xt"))`)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import require_image, start_linear
from selectra.layers.norm import LayerNorm
from selectra.layers.positions import GridPositions
from selectra.mixers import S6
from selectra.mixers.hyper import HyperAttention
from selectra.mixers.sizes import require_sizes
from selectra.official import Official, mixer_options, reads
from selectra.registry import models
from selectra.spec import Spec

ContextKind = Literal["mamba", "hyper", "xl", "none"]
# Channels of an attention head.
D_HEAD = 128
USUAL_DEPTH = {"mamba": 4, "hyper": 2, "xl": 2, "none": 0}


class MambaLayer(nn.Module):
    """A Mamba added to its normalised input, from the start or from the end of the sequence."""

    def __init__(self, mixer: S6, norm: nn.Module, reverse: bool, drop_path: float = 0.0) -> None:
        super().__init__()
        self.mixer, self.norm, self.reverse, self.drop_path = mixer, norm, reverse, DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x = self.norm(x)
        y = self.mixer(x.flip(1)).flip(1) if self.reverse else self.mixer(x)
        return x + self.drop_path(y)


class GatedMLP(nn.Module):
    """`down(gelu(gate(x)) up(x))`."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.up_proj = nn.Linear(d_model, d_hidden, bias=False)
        self.down_proj = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x))


class AttentionLayer(nn.Module):
    """Causal attention and a gated MLP, each behind an RMS norm and added to its input."""

    def __init__(self, d_model: int, mlp_ratio: int = 4, drop_path: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.attn = HyperAttention(d_model, max(1, d_model // D_HEAD), seed=seed)
        self.input_layernorm = nn.RMSNorm(d_model, eps=1e-5)
        self.post_attention_layernorm = nn.RMSNorm(d_model, eps=1e-5)
        self.mlp, self.drop_path = GatedMLP(d_model, mlp_ratio * d_model), DropPath(drop_path)

    def forward(
        self, x: Float[Tensor, "b l d"], memory: Float[Tensor, "b m d"] | None = None
    ) -> Float[Tensor, "b l d"]:
        """Mix positions, which see those of the memory, too."""
        seen = x if memory is None else torch.cat([memory, x], 1)
        x = x + self.drop_path(self.attn(self.input_layernorm(seen), queries=x.shape[1]))
        return x + self.drop_path(self.mlp(self.post_attention_layernorm(x)))


class Context(nn.Module):
    """Features of all regions as a sequence, through layers in which they see each other, and a class token.

    Args:
        kind: Of the layers.
        d_in: Width of the features.
        d_model: Width of the layers.
        depth: Layers.
        d_state: State size per channel of the Mambas.
        chunk: Tokens that "xl" sees at once, beside as many of the chunk before.
        drop_path: Rate at which the last layer's branches are left out in training; earlier ones less often.
    """

    def __init__(
        self, kind: ContextKind, d_in: int, d_model: int, depth: int, d_state: int = 16, chunk: int = 256,
        drop_path: float = 0.0, mlp_ratio: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        require_sizes(d_in=d_in, d_model=d_model, depth=depth, chunk=chunk)
        self.kind, self.chunk, self.d_model = kind, chunk, d_model
        self.input_proj, self.positions = nn.Linear(d_in, d_model), GridPositions(d_model)
        rates = rising_rates(drop_path, depth)
        self.layers = nn.ModuleList(
            MambaLayer(S6(d_model, d_state), LayerNorm(d_model), i % 2 == 0, rate)
            if kind == "mamba"
            else AttentionLayer(d_model, mlp_ratio, rate, seed=i)
            for i, rate in enumerate(rates)
        )
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.empty(1, 1, d_model))
        nn.init.normal_(self.cls_token, std=1e-6)

    no_decay: tuple[str, ...] = ("cls_token",)

    def forward(self, grid: Float[Tensor, "b h w c"]) -> tuple[Float[Tensor, "b h w d"], Float[Tensor, "b d"] | None]:
        """The grid and the class token behind the last layer."""
        height, width = grid.shape[1:3]
        x = self.input_proj(grid)
        x = (x + self.positions(height, width, x.device).to(x)).flatten(1, 2)
        tokens, cls = self._in_chunks(x) if self.kind == "xl" else self._at_once(x)
        return tokens.unflatten(1, (height, width)), cls

    def _at_once(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self._with_class(x)
        for layer in self.layers:
            x = layer(x)
        return (x, None) if self.cls_token is None else (x[:, :-1], x[:, -1])

    def _in_chunks(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        memory: list[Tensor | None] = [None] * len(self.layers)
        tokens, classes = [], []
        for part in x.split(self.chunk, 1):
            y = self._with_class(part)
            for i, layer in enumerate(self.layers):
                before, memory[i] = memory[i], y[:, : part.shape[1]].detach()
                y = layer(y, before)
            tokens.append(y[:, : part.shape[1]])
            classes.append(y[:, part.shape[1] :])
        cls = None if self.cls_token is None else torch.cat(classes, 1).mean(1)
        return torch.cat(tokens, 1), cls

    def _with_class(self, x: Tensor) -> Tensor:
        if self.cls_token is None:
            return x
        return torch.cat([x, self.cls_token.to(x.dtype).expand(x.shape[0], -1, -1)], 1)


def side_by_side(grids: Float[Tensor, "n h w d"], rows: int, columns: int) -> Float[Tensor, "b rh cw d"]:
    """Grids of regions, those of an image by rows one behind the other, as a grid of each image."""
    return grids.unflatten(0, (-1, rows, columns)).permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2)


@models.register(
    "xt",
    kind="image",
    source="arXiv:2403.01915",
    smoke={"backbone": Spec("vmamba_smoke"), "region": 16, "d_model": 8, "depth": 2, "d_state": 2},
    base={},
)
class XT(nn.Module):
    """xT: regions through any image model, and what they have of each other.

    Args:
        backbone: An image model that encodes each region.
        n_classes: Classes.
        in_channels: Channels of the image, as of the region encoder.
        region: Pixels of a region's sides.
        context: What lets regions see each other; "none" averages them.
        d_model: Width of the context encoder.
        depth: Its layers; None for the paper's number.
        d_state: State size per channel of its Mambas.
        chunk: Tokens that "xl" sees at once, beside as many of the chunk before.
        at_once: Regions that are encoded together; in training those of the others are computed again in the backward
            pass. None encodes all together.
        grad_ratio: Share of the regions, drawn anew each time, that train the region encoder.
        drop_path: Rate at which the last context layer's branches are left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        backbone: nn.Module = Spec("swin_tiny"),  # pyright: ignore[reportArgumentType] # noqa: B008
        n_classes: int = 1000,
        in_channels: int = 3,
        region: int = 256,
        context: ContextKind = "mamba",
        d_model: int = 768,
        depth: int | None = None,
        d_state: int = 16,
        chunk: int = 256,
        at_once: int | None = None,
        grad_ratio: float = 1.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, in_channels=in_channels, region=region)
        if context not in get_args(ContextKind):
            raise ConfigError(f"context={context!r}: takes {', '.join(map(repr, get_args(ContextKind)))}")
        if not 0 < grad_ratio <= 1 or (at_once is not None and at_once < 1):
            raise ConfigError(f"grad_ratio={grad_ratio}, at_once={at_once}: a share above 0 and up to 1; at least 1")
        encoder: Any = backbone
        if not hasattr(encoder, "keep_features"):
            raise ConfigError(f"backbone is a {type(backbone).__name__}; it must be an image model, such as swin_tiny")
        encoder.keep_features()
        if region % encoder.feature_strides[-1]:
            raise ConfigError(
                f"region={region}: needs a multiple of the region encoder's stride {encoder.feature_strides[-1]}"
            )
        self.backbone, self.in_channels, self.region = encoder, in_channels, region
        self.at_once, self.grad_ratio = at_once, grad_ratio
        d_last = encoder.feature_dims[-1]
        self.context: Context | None = None
        if context == "none":
            wide = 4 * d_last
            self.norm_head: nn.Module | None = nn.Sequential(nn.Linear(d_last, wide), nn.GELU(), LayerNorm(wide))
        else:
            depth = USUAL_DEPTH[context] if depth is None else depth
            self.context = Context(context, d_last, d_model, depth, d_state, chunk, drop_path)
            self.norm_head, wide, d_last = LayerNorm(d_model), d_model, d_model
        self.head: nn.Module = nn.Linear(wide, n_classes)
        start_linear([self.head])
        self.feature_dims = (*encoder.feature_dims[:-1], d_last)
        self.feature_strides = tuple(encoder.feature_strides)
        self.pruned: set[str] = set()

    @staticmethod
    def facts_within(facts: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """What holds for the region encoder, whose images are regions."""
        return {**facts, "img_size": values["region"]}

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b n_classes"]:
        """Scores of the classes, before a softmax."""
        return self.head(self.embed(x))

    def embed(self, x: Float[Tensor, "b c H W"]) -> Tensor:
        """What the head reads."""
        assert self.norm_head is not None
        last = self.encoded(x)[-1]
        token = last.mean((1, 2)) if self.context is None else self.context(last)[1]
        return self.norm_head(token)

    def features(self, x: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b h w d"]]:
        """The regions' grids side by side, finest first; the coarsest is the context encoder's."""
        grids = self.encoded(x)
        return grids if self.context is None else [*grids[:-1], self.context(grids[-1])[0]]

    def encoded(self, x: Float[Tensor, "b c H W"]) -> list[Float[Tensor, "b h w d"]]:
        """The regions' grids side by side, without what they have of each other."""
        require_image(x, self.in_channels)
        b, c, height, width = x.shape
        side = self.region
        rows, columns = self.counts((height, width))
        x = F.pad(x, (0, columns * side - width, 0, rows * side - height))
        regions = x.view(b, c, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, side, side)
        grids = []
        for grid, stride in zip(self._each(regions), self.feature_strides, strict=True):
            whole = side_by_side(grid, rows, columns)
            grids.append(whole[:, : -(-height // stride), : -(-width // stride)])
        return grids

    def counts(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the regions of an image of this height and width."""
        return -(-size[0] // self.region), -(-size[1] // self.region)

    def _each(self, regions: Tensor) -> Sequence[Tensor]:
        """Grids of regions, some at once; those that do not train the encoder without a gradient."""
        if not self.training or self.grad_ratio == 1 or not torch.is_grad_enabled():
            return self._some(regions)
        order = torch.randperm(len(regions), device=regions.device)
        count = math.ceil(self.grad_ratio * len(regions))
        trained = self._some(regions[order[:count]])
        with torch.no_grad():
            others = self._some(regions[order[count:]])
        back = order.argsort()
        return [torch.cat(pair)[back] for pair in zip(trained, others, strict=True)]

    def _some(self, regions: Tensor) -> Sequence[Tensor]:
        if self.at_once is None or len(regions) <= self.at_once:
            return self.backbone.features(regions)
        keep = torch.is_grad_enabled()
        parts = [
            checkpoint(self.backbone.features, part, use_reentrant=False) if keep else self.backbone.features(part)
            for part in regions.split(self.at_once)
        ]
        return [torch.cat(grids) for grids in zip(*parts, strict=True)]

    def keep_features(self) -> None:
        """Drop, for good, what `features` does not need."""
        before = self.state_dict().keys()
        self.head, self.norm_head = nn.Identity(), None
        if self.context is not None:
            self.context.cls_token = None
            self.context.no_decay = ()
        self.pruned |= before - self.state_dict().keys()

    def units(self) -> list[nn.Module]:
        """The region encoder's stages or blocks, then the context's layers."""
        own = self.backbone.units() if hasattr(self.backbone, "units") else self.backbone.level_list()
        return [*own, *(self.context.layers if self.context is not None else ())]

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return [*self.backbone.blocks(), *(self.context.layers if self.context is not None else ())]


class ContextHead(nn.Module):
    """The official classification decoder: a context encoder, and a classifier of its class token."""

    def __init__(self, context: Context, n_classes: int) -> None:
        super().__init__()
        self.context, self.cls = (
            context,
            nn.Sequential(LayerNorm(context.d_model), nn.Linear(context.d_model, n_classes)),
        )

    def forward(self, grid: Float[Tensor, "b h w c"]) -> Float[Tensor, "b n_classes"]:
        return self.cls(self.context(grid)[1])


class OfficialDecoder(Official):
    """The classifier of a grid, channels first."""

    def forward(self, feat: Float[Tensor, "b c h w"]) -> tuple[Tensor]:
        return (self.model(feat.permute(0, 2, 3, 1)),)


def _decoder_keys(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # Directions of hashes are made from a seed.
    kept = {key: value for key, value in state.items() if ".attn.lsh." not in key}
    return {key if key.startswith("cls.") else f"context.{key}": value for key, value in kept.items()}


@reads("bair-climate-initiative/xT:LLMClassificationDecoder")
def read_decoder(
    *,
    in_dim: int,
    num_classes: int,
    mlp_ratio: int = 4,
    use_checkpoint: bool = False,
    hidden_size: int = 768,
    num_heads: int = 8,
    n_layers: int = 2,
    attention_method: Literal["hyper", "mamba"] = "mamba",
    in_context_patches: int = -1,
) -> OfficialDecoder:
    """The classification decoder; `num_heads` has no effect in the official code, `use_checkpoint` none on outputs."""
    if in_context_patches > 0:
        raise ConfigError(
            f"option 'in_context_patches' is {in_context_patches}; the official code loses its memory of earlier "
            "chunks, so there is nothing to compute as it does: give -1, or build XT(context='xl')."
        )
    context = Context(attention_method, in_dim, hidden_size, n_layers, mlp_ratio=mlp_ratio)
    return OfficialDecoder(ContextHead(context, num_classes), _decoder_keys)


@reads("bair-climate-initiative/xT:Block")
def read_block(
    *,
    d_model: int,
    ssm_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: Literal[False] = False,
    layer_idx: int | None = None,
    reverse: bool | None = None,
    is_2d: bool = False,
    drop_rate: float = 0.1,
    drop_path_rate: float = 0.1,
    use_mlp: Literal[False] = False,
    transpose: Literal[False] = False,
    split_head: Literal[False] = False,
    use_nd: bool = False,
    downsample: Literal[False] = False,
) -> Official:
    """What `create_block` makes; options that the official block reads and does not use have no effect here either."""
    mixer = S6(d_model, **{"d_state": 16, **mixer_options("ssm_cfg", ssm_cfg)})
    norm = nn.RMSNorm(d_model, eps=norm_epsilon) if rms_norm else LayerNorm(d_model, eps=norm_epsilon)
    return Official(MambaLayer(mixer, norm, bool(reverse), drop_path_rate))
