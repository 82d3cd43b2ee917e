"""Samba: an encoder of Mambas for the segmentation of remote-sensing images, Zhu et al. 2024, arXiv:2404.01705.

A convolutional stem makes a grid of tokens; in four stages, with halved sides between them, blocks mix the tokens by a
Mamba, row by row, and their channels by an MLP with a depthwise convolution. Each stage's grid is normalised, is what
the next one reads, and is what a decoder sees: UPerNet in the paper (`Spec("upernet_samba")`).

Source: github.com/zhuqinfeng1999/Samba, 229687b: `mmseg/models/backbones/Samba.py`.
Glossary: D d_model, N d_state; the paper has one size.

Departures, paper and official code against each other and against this:
  the same blocks  are SiMBA-S's with the MLP, but all norms have an eps of 1e-5; weights of that model load here
  classes          the official code computes a mean token behind the last norm and throws it away (it is returned with
                   `token_label=False`); here a linear map reads it, so that the encoder is a classifier, too
  MixToken         in training the official code replaces a box of each image's tokens by those of another one of the
                   batch and leaves the labels as they are, which the paper does not say; here nothing is mixed
  start            the official code draws the steps' projections anew and zeroes their bias, so that all steps start at
                   0.69; here they start as Mamba does (`start="shipped"` for the other)
  no effect        `num_classes` and `sr_ratios` of the official constructor
"""

from itertools import pairwise
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.conv_stages import (
    ConvMlp,
    ConvStem,
    NormedPyramid,
    NormedStage,
    rename_stages,
    start_convolutions,
)
from selectra.layers.drop import rising_rates
from selectra.layers.image import ConvNorm, start_linear
from selectra.layers.image_model import pooled
from selectra.mixers import S6, RowBlock
from selectra.mixers.sizes import require_sizes
from selectra.official import NormLayer, Official, OfficialRowBlock, norm_eps, reads
from selectra.registry import models

EPS = 1e-5
# Of a whole segmentation network's state, and of SiMBA's: what is not the encoder's.
OTHERS = ("decode_head.", "auxiliary_head.", "post_network.", "head.", "aux_head.")


@models.register(
    "samba",
    kind="image",
    source="arXiv:2404.01705",
    smoke={"d_stem": 4, "dims": (8, 16), "depths": (1, 1), "mlp_ratios": (2, 2), "d_state": 4},
    base={},
)
class Samba(NormedPyramid):
    """Samba's encoder, for images of any size, with a linear classifier of the tokens' mean.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        d_stem: Width inside the stem.
        dims: Width of every stage.
        depths: Blocks of every stage.
        mlp_ratios: Inner width of the MLP over the width of each stage.
        d_state: State size per channel of the Mambas.
        d_conv: Width of their short convolutions.
        expand: Their inner width over the width of their stage.
        patch_size: Pixels of a token's side behind the stem; the official one is 4.
        drop_path: Rate at which the last block's branches are left out in training; earlier ones less often.
        start: The steps' projections at the start as Mamba has them, or as the official code.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        d_stem: int = 32,
        dims: tuple[int, ...] = (64, 128, 320, 448),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        mlp_ratios: tuple[int | float, ...] = (8, 8, 4, 4),
        d_state: int = 64,
        d_conv: int = 4,
        expand: int | float = 2,
        patch_size: int = 4,
        drop_path: float = 0.0,
        start: Literal["mamba", "shipped"] = "mamba",
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, in_channels=in_channels, d_stem=d_stem, patch_size=patch_size)
        if not dims or not len(dims) == len(depths) == len(mlp_ratios):
            raise ConfigError(f"dims={dims}, depths={depths}, mlp_ratios={mlp_ratios}: needs one of each for a stage")
        embeds = [
            ConvStem(in_channels, d_stem, dims[0], patch_size),
            *(ConvNorm(*widths, 3, 2, 1) for widths in pairwise(dims)),
        ]
        rates = iter(rising_rates(drop_path, sum(depths)))

        def block(d_model: int, ratio: int | float) -> RowBlock:
            mamba = S6(d_model, d_state, d_conv, expand)
            return RowBlock(d_model, mamba, ConvMlp(d_model, int(ratio * d_model)), next(rates), EPS)

        self.stages = nn.ModuleList(
            NormedStage(embed, [block(d, ratio) for _ in range(depth)], d, EPS)
            for embed, d, depth, ratio in zip(embeds, dims, depths, mlp_ratios, strict=True)
        )
        self.head = nn.Linear(dims[-1], n_classes)
        mambas = [module for module in self.modules() if isinstance(module, S6)]
        start_linear(self.modules(), () if start == "shipped" else (mamba.dt_proj for mamba in mambas))
        start_convolutions(self.modules())
        self.describe(in_channels, dims, [patch_size * 2**i for i in range(len(dims))], range(len(dims)), "avg")

    def pool(self, x: Float[Tensor, "b d h w"]) -> Tensor:
        last, grid = len(self.stages) - 1, x.permute(0, 2, 3, 1)
        if not self.global_pool:
            return self.normed(grid, last).permute(0, 3, 1, 2)
        token = pooled(grid.flatten(1, 2), self.global_pool)
        return self.normed(token[:, None, None], last)[:, 0, 0]

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The encoder of an official network, or of a SiMBA with MLPs, under our keys."""
        own = {key.removeprefix("backbone."): value for key, value in state.items()}
        return rename_stages({key: value for key, value in own.items() if not key.startswith(OTHERS)})

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return [module for module in self.modules() if isinstance(module, RowBlock)]


class OfficialSamba(Official):
    """The grids behind every stage, channels first; without token labels the mean token."""

    model: Samba

    def __init__(self, model: Samba, token_label: bool) -> None:
        super().__init__(model, rename_stages)
        self.token_label = token_label

    def forward(self, x: Float[Tensor, "b c H W"]) -> tuple[Tensor, ...]:
        if not self.token_label:
            return (self.model.embed(x),)
        return tuple(grid.permute(0, 3, 1, 2) for grid in self.model.features(x))


@reads("zhuqinfeng1999/Samba:Samba")
def read_samba(
    *,
    in_chans: int = 3,
    num_classes: int = 1000,
    stem_hidden_dim: int = 32,
    embed_dims: tuple[int, ...] = (64, 128, 320, 448),
    mlp_ratios: tuple[int | float, ...] = (8, 8, 4, 4),
    drop_path_rate: float = 0.0,
    norm_layer: NormLayer = nn.LayerNorm,
    depths: tuple[int, ...] = (3, 4, 6, 3),
    sr_ratios: tuple[int, ...] = (4, 2, 1, 1),
    num_stages: int = 4,
    token_label: bool = True,
) -> OfficialSamba:
    """The encoder; `num_classes` and `sr_ratios` have no effect in the official code either."""
    given = {"embed_dims": embed_dims, "mlp_ratios": mlp_ratios, "depths": depths, "sr_ratios": sr_ratios}
    short = [name for name, each in given.items() if len(each) < num_stages]
    if num_stages < 1 or short:
        raise ConfigError(f"option 'num_stages' is {num_stages}; {', '.join(short) or 'it'} needs one for each stage")
    used, described = sum(depths[:num_stages]), sum(depths)
    model = Samba(
        in_channels=in_chans,
        d_stem=stem_hidden_dim,
        dims=embed_dims[:num_stages],
        depths=depths[:num_stages],
        mlp_ratios=mlp_ratios[:num_stages],
        # The official rates rise over all described blocks, of which the last may not exist.
        drop_path=drop_path_rate * (used - 1) / max(1, described - 1),
    )
    eps = norm_eps(norm_layer)
    for module in model.modules():
        if isinstance(module, RowBlock) and module.norm2 is not None:
            module.norm2.eps = eps
        if isinstance(module, NormedStage):
            assert module.norm is not None
            module.norm.eps = eps
    # The official encoder has no classifier.
    model.reset_classifier(0, "avg")
    return OfficialSamba(model, token_label)


@reads("zhuqinfeng1999/Samba:Block_mamba")
def read_block(
    *,
    dim: int,
    mlp_ratio: int | float,
    drop_path: float = 0.0,
    norm_layer: NormLayer = nn.LayerNorm,
    sr_ratio: int = 1,
    H: int | None = None,
    W: int | None = None,
) -> OfficialRowBlock:
    """One block; H and W are those of the official forward, `sr_ratio` has no effect there either."""
    channel = ConvMlp(dim, int(dim * mlp_ratio))
    return OfficialRowBlock(RowBlock(dim, S6(dim, 64), channel, drop_path, norm_eps(norm_layer)), H, W)
