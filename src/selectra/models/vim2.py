"""ViM2: MambaMixer for images, selective mixers of tokens and of channels, Behrouz et al. 2024, arXiv:2403.19888v1.

A grid of patches passes four stages with halved sides between them. In a stage selective token mixers scan the grid
along four routes, selective channel mixers scan each token's channels in both directions, and each of them hears a
learned weighted sum of everything that came before it in the stage.

Source: the first version of the paper, its equations and the table of sizes in its appendix; no code and no weights
were ever released, and the second version replaces all methods.
Glossary: L layers of a stage; y_Token, y_Channel, alpha, beta, theta, gamma as in Sec. 3.2 (`WeightedAverage`).

Departures, all of them our choices where the paper is silent or contradicts itself; most can be switched off:
  y^(0)          the text has y_Token^(0) twice for the inputs of a stage; the second is read as y_Channel^(0)
  gate           its sign is called a non-linearity; here it multiplies by an activated map of the input, as in Mamba.
                 The figure has an output projection, the equations none; here there is one
  routes         the paper names top left to bottom right, its reverse, and top right to bottom left and its reverse;
                 VMamba, which it says these come from, goes by rows, by columns and backwards; so does this
  selection      the equations select B, C and the step from the input, VMamba's code from the convolution's output; so
                 does this, and so it equals `vmamba` without channel mixers, as the paper says it should
  residuals      the equations have none, norms are not mentioned: here each mixer stands behind a LayerNorm and is
                 added to its input, which the same equality asks for
  averaging      no start is given: here the plain chain, from which skips are learned (`averaging=False` keeps it).
                 The memory that the paper states makes its weights scalars, not normalised; so they are here. Others'
                 readings differ: a vector per token divided by the number of terms (samba-mixer), a softmax (a
                 replication of TSM2)
  layers         the table has two token mixers for each channel mixer, the equations one: here a layer is one token
                 mixer, and every second layer, or the last, has a channel mixer (`channel_every`); others hand on
                 what it would have heard
  channel mixer  "CW-Linear c, CW-S6 c, CW-Linear c" with the table's widths c, which are not those of the stage. A
                 linear map along all tokens would have 32 M parameters in the first stage alone, against the 20 M
                 published, so maps act on channels. S6 scans each token's channels in groups of `channel_group`,
                 with the same parameters for all tokens (`channel_mixer="mlp"` or `"none"` instead). One section
                 has two directions along the channels, another "the same scans as the token mixer"; here there are two
  stem           4 x 4 patches give 56 x 56 tokens of 224 pixels, the table prints 112 x 112
  parameters     22.5, 40.4 and 69.7 M here for tiny, small and base; the paper prints 20, 43 and 74 M, which its own
                 table cannot give: the token mixers, the ways between stages and the head alone have 19.3 M in tiny,
                 which leaves 0.7 M for the same channel mixers that would have 9.3 M in small
  B bar          is printed as exp(delta A - I); as in Mamba's code it is delta B here
  results        are "preliminary" in the paper, without FLOPs; its row of ViM-T for COCO has box figures in the columns
                 of masks
"""

from collections.abc import Callable, Collection
from typing import Any, Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import Mlp, NormedPatches, PatchMerging, start_linear
from selectra.layers.image_model import LAST, Pyramid
from selectra.layers.norm import LayerNorm
from selectra.mixers import CrossScan2d, SelectiveChannel, SelectivePath, WeightedAverage
from selectra.mixers.sizes import require_sizes
from selectra.registry import models

TokenMixer = Literal["selective", "none"]
ChannelMixer = Literal["selective", "mlp", "none"]


class GridChannels(nn.Module):
    """Mix the channels of each token by a selective scan over groups of them, both ways, between two linear maps.

    Args:
        d_model: Width of a token.
        d_channels: Width between the maps.
        group: Channels that are one step of the scan.
        d_state: State size.
    """

    def __init__(self, d_model: int, d_channels: int, group: int, d_state: int) -> None:
        super().__init__()
        require_sizes(d_channels=d_channels, group=group)
        if d_channels % group:
            raise ConfigError(f"channel_dims has {d_channels}: needs multiples of channel_group={group}")
        self.group = group
        self.in_proj, self.out_proj = nn.Linear(d_model, d_channels), nn.Linear(d_channels, d_model)
        self.mixer = SelectiveChannel(group, d_state, expand=1)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        u = self.in_proj(x)
        steps = u.flatten(0, 2).unflatten(1, (-1, self.group))
        return self.out_proj(self.mixer(steps).reshape(u.shape))


class Residual(nn.Module):
    """A mixer behind a norm, added to its input."""

    def __init__(self, d_model: int, mixer: nn.Module, drop_path: float) -> None:
        super().__init__()
        self.norm, self.mixer, self.drop_path = LayerNorm(d_model), mixer, DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        return x + self.drop_path(self.mixer(self.norm(x)))


class Stage(nn.Module):
    """Layers of a token mixer and a channel mixer, each fed by a weighted sum of all that was before.

    Args:
        tokens: A token mixer for every layer.
        channels: A channel mixer, or what hands its input on, for every layer.
        downsample: The way to the next stage.
        averaging: Whether sums are learned; without them each mixer hears what the one before it gave.
    """

    def __init__(
        self, tokens: list[nn.Module], channels: list[nn.Module], downsample: nn.Module | None, averaging: bool
    ) -> None:
        super().__init__()
        self.tokens, self.channels, self.downsample = nn.ModuleList(tokens), nn.ModuleList(channels), downsample
        self.average = WeightedAverage(len(tokens)) if averaging else None

    def forward(
        self, x: Float[Tensor, "b h w d"], through: Callable[..., Any] | None = None
    ) -> Float[Tensor, "b h w d"]:
        """Everything but the way to the next stage; `through` calls a mixer, if given."""
        call = through or (lambda mixer, x: mixer(x))
        tokens, channels = [x], [x]
        for token, channel in zip(self.tokens, self.channels, strict=True):
            tokens.append(call(token, self.average.token_input(tokens, channels) if self.average else channels[-1]))
            channels.append(call(channel, self.average.channel_input(tokens, channels) if self.average else tokens[-1]))
        return channels[-1]


@models.register(
    "vim2",
    kind="image",
    source="arXiv:2403.19888",
    smoke={"dims": (8, 16), "depths": (1, 2), "channel_dims": (16, 16), "d_state": 4, "channel_group": 8},
    tiny={},
    small={"depths": (2, 2, 18, 2)},
    base={"depths": (2, 2, 18, 2), "dims": (128, 256, 512, 1024), "channel_dims": (256, 512, 1024, 1024)},
)
class ViM2(Pyramid):
    """ViM2's classifier; our reading, no code was released. Images of any size of a patch or more.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        dims: Width of every stage.
        depths: Layers of every stage.
        channel_dims: Inner width of every stage's channel mixers.
        token_mixer: What mixes tokens; with "none" only patches and their merging do.
        channel_mixer: What mixes channels: the selective mixer, an MLP, as in the paper's ViM2-MLP, or nothing.
        channel_every: A channel mixer stands in every layer of this number, and in a stage's last.
        channel_group: Channels that are one step of the selective channel mixer.
        averaging: Whether mixers hear learned sums; otherwise each hears the one before.
        d_state: State size of both mixers.
        d_conv: Side of the token mixers' convolutions.
        expand: Their inner width over that of their stage.
        patch_size: Pixels of a patch's side.
        drop_path: Rate at which the last layer's mixers are left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        dims: tuple[int, ...] = (96, 192, 384, 768),
        depths: tuple[int, ...] = (2, 2, 6, 2),
        channel_dims: tuple[int, ...] = (192, 384, 768, 768),
        token_mixer: TokenMixer = "selective",
        channel_mixer: ChannelMixer = "selective",
        channel_every: int = 2,
        channel_group: int = 16,
        averaging: bool = True,
        d_state: int = 16,
        d_conv: int = 3,
        expand: int | float = 2,
        patch_size: int = 4,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, channel_every=channel_every)
        if not dims or not len(dims) == len(depths) == len(channel_dims):
            raise ConfigError(f"dims={dims}, depths={depths}, channel_dims={channel_dims}: needs one of each a stage")
        for name, mixer, kinds in (
            ("token_mixer", token_mixer, get_args(TokenMixer)), ("channel_mixer", channel_mixer, get_args(ChannelMixer))
        ):  # fmt: skip
            if mixer not in kinds:
                raise ConfigError(f"{name}={mixer!r}: takes {', '.join(map(repr, kinds))}")
        self.patch_embed = NormedPatches(in_channels, dims[0], patch_size)
        rates = rising_rates(drop_path, sum(depths))
        self.layers = nn.ModuleList()
        for d_model, depth, d_channels, d_next in zip(dims, depths, channel_dims, [*dims[1:], None], strict=True):
            own, rates = rates[:depth], rates[depth:]
            tokens: list[nn.Module] = [nn.Identity() for _ in own]
            if token_mixer == "selective":
                tokens = [Residual(d_model, CrossScan2d(d_model, d_state, d_conv, expand), rate) for rate in own]
            channels: list[nn.Module] = [nn.Identity() for _ in own]
            for i in [*range(channel_every - 1, depth - 1, channel_every), depth - 1]:
                if channel_mixer == "selective":
                    channels[i] = Residual(d_model, GridChannels(d_model, d_channels, channel_group, d_state), own[i])
                elif channel_mixer == "mlp":
                    channels[i] = Residual(d_model, Mlp(d_model, d_channels), own[i])
            way = None if d_next is None else PatchMerging(d_model, d_next)
            self.layers.append(Stage(tokens, channels, way, averaging))
        self.norm = LayerNorm(dims[-1])
        self.head = nn.Linear(dims[-1], n_classes)
        start_linear(self.modules(), (m.dt_proj for m in self.modules() if isinstance(m, SelectivePath)))
        strides = [patch_size * 2**i for i in range(len(dims))]
        self.describe(in_channels, dims, strides, range(len(dims)), "avg")

    def run(
        self, x: Float[Tensor, "b c H W"], after: Collection[int]
    ) -> tuple[list[Float[Tensor, "b h w d"]], tuple[int, ...]]:
        """The grids behind some stages."""
        x, grids = self.patch_embed(x), []
        for i, stage in enumerate(self.layers):
            assert isinstance(stage, Stage)
            x = stage(x, self.through)
            if i in after:
                grids.append(x)
            if len(grids) == len(after):
                break
            if stage.downsample is not None:
                x = stage.downsample(x)
        return grids, ()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [
            (r"^layers\.(\d+)\.downsample", LAST),
            (r"^layers\.(\d+)\.(?:tokens|channels|average\.\w+)\.(\d+)", None),
            (r"^norm\.", LAST),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return [module for module in self.modules() if isinstance(module, Residual)]
