"""Official weights of SiMBA: what reads the options of the official classes."""

import re
from typing import Any, Literal

from torch import nn

from selectra.errors import ConfigError
from selectra.layers.conv_stages import ConvMlp, NormedStage
from selectra.mixers import S6, RowBlock
from selectra.models.simba import EPS, ChannelMixer, Simba, make_channel_mixer, rename
from selectra.official import NormLayer, Official, OfficialRowBlock, norm_eps, reads

OfficialMixer = Literal["mlp", "EinFFT"]


@reads("badripatro/simba:SiMBA")
def read_simba(
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
    cm_type: OfficialMixer = "mlp",
) -> Official:
    """The classifier; `cm_type` is what the official code changes by hand, `sr_ratios` has no effect there either."""
    if not num_stages == len(embed_dims) == len(depths) == len(mlp_ratios):
        raise ConfigError(f"option 'num_stages' is {num_stages}; embed_dims, depths and mlp_ratios need one for each")
    if num_classes < 1 and token_label:
        raise ConfigError(f"option 'num_classes' is {num_classes} with 'token_label'; it takes 1 or more there")
    model = Simba(
        n_classes=max(num_classes, 1),
        in_channels=in_chans,
        d_stem=stem_hidden_dim,
        dims=embed_dims,
        depths=depths,
        channel_mixer=_mixer_kind(cm_type),
        mlp_ratios=mlp_ratios,
        token_labels=token_label,
        drop_path=drop_path_rate,
    )
    if num_classes < 1:
        model.reset_classifier(0)
    _set_eps(model, norm_layer)
    return Official(model, rename)


@reads("badripatro/simba:Block_mamba")
def read_block(
    *,
    dim: int,
    mlp_ratio: int | float,
    drop_path: float = 0.0,
    norm_layer: NormLayer = nn.LayerNorm,
    sr_ratio: int = 1,
    cm_type: OfficialMixer = "mlp",
    H: int | None = None,
    W: int | None = None,
    mamba: str = "d_state=64,d_conv=4,expand=2",
) -> OfficialRowBlock:
    """One block; H and W are those of the official forward, `mamba` the sizes that its Mamba was given."""
    sizes: dict[str, Any] = {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", mamba)}
    if set(sizes) - {"d_state", "d_conv", "expand"}:
        raise ConfigError(f"option 'mamba' is {mamba!r}; it takes d_state=, d_conv= and expand=")
    channel = make_channel_mixer(_mixer_kind(cm_type), dim, int(dim * mlp_ratio), 4, ConvMlp)
    block = RowBlock(dim, S6(dim, **{"d_state": 64, **sizes}), channel, drop_path, EPS)
    _set_eps(block, norm_layer)
    return OfficialRowBlock(block, H, W)


def _mixer_kind(cm_type: OfficialMixer) -> ChannelMixer:
    return "mlp" if cm_type == "mlp" else "einfft"


def _set_eps(model: nn.Module, norm_layer: NormLayer) -> None:
    """Give the norms that the official class takes as an argument its eps."""
    eps = norm_eps(norm_layer)
    for module in model.modules():
        if isinstance(module, RowBlock) and module.norm2 is not None:
            module.norm2.eps = eps
        if isinstance(module, NormedStage):
            assert module.norm is not None
            module.norm.eps = eps
