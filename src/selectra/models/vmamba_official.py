"""Official weights of VMamba: what reads the options of the official classes."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.models.vmamba import VMamba, rename
from selectra.official import Official, reads, with_options_of
from selectra.spec import nearest


class Backbone(nn.Module):
    """VMamba's grids, each with a norm of its own, channels first: what the official detectors are built on."""

    def __init__(self, backbone: VMamba, out_indices: Sequence[int]) -> None:
        super().__init__()
        # The official code goes through the stages and asks of each whether it is wanted.
        self.backbone, self.out_indices = backbone, tuple(sorted(set(out_indices)))
        del backbone.norm, backbone.head
        for i in self.out_indices:
            if not 0 <= i < len(backbone.feature_dims):
                raise ConfigError(f"option 'out_indices' has {i}; there are {len(backbone.feature_dims)} stages")
            self.add_module(f"outnorm{i}", nn.LayerNorm(backbone.feature_dims[i]))

    def forward(self, x: Float[Tensor, "b c H W"]) -> tuple[Float[Tensor, "b d h w"], ...]:
        grids = self.backbone.features(x)
        return tuple(self.get_submodule(f"outnorm{i}")(grids[i]).permute(0, 3, 1, 2) for i in self.out_indices)


# Official forward types that compute the same: they differ in kernels, in their precision and in the layout; "_noz" is
# for no gate.
FIRST_TYPES, CORES = ("v0", "v0seq"), ("v01", "v02", "v03", "v04", "v05", "v2", "v3")
FORWARD_TYPES = (*FIRST_TYPES, *(core + end for core in CORES for end in ("", "_noz", "_no32", "_noz_no32")))
NormLayer = Literal["ln", "ln2d", "LN", "LN2D"]


@reads("MzeroMiko/VMamba:VSSM")
def read_vssm(
    *,
    patch_size: int = 4,
    in_chans: int = 3,
    num_classes: int = 1000,
    depths: tuple[int, ...] = (2, 2, 9, 2),
    dims: int | tuple[int, ...] = (96, 192, 384, 768),
    ssm_d_state: int = 16,
    ssm_ratio: float = 2.0,
    ssm_dt_rank: int | Literal["auto"] = "auto",
    ssm_act_layer: Literal["silu"] = "silu",
    ssm_conv: int = 3,
    ssm_conv_bias: bool = True,
    ssm_drop_rate: float = 0.0,
    ssm_init: Literal["v0", "v1", "v2"] = "v0",
    forward_type: str = "v2",
    mlp_ratio: float = 4.0,
    mlp_act_layer: Literal["gelu"] = "gelu",
    mlp_drop_rate: float = 0.0,
    gmlp: Literal[False] = False,
    drop_path_rate: float = 0.1,
    patch_norm: Literal[True] = True,
    norm_layer: NormLayer = "LN",
    downsample_version: Literal["v1", "v2", "v3"] = "v2",
    patchembed_version: Literal["v1", "v2"] = "v1",
    use_checkpoint: bool = False,
    posembed: Literal[False] = False,
    imgsize: int = 224,
) -> Official:
    """The classifier. `ssm_init`, `use_checkpoint`, `imgsize` and the norm's layout have no effect on what it computes.

    Checkpoints of the first and of the second version are taken, with their own names for the parameters.
    """
    require_no_rate(ssm_drop_rate=ssm_drop_rate, mlp_drop_rate=mlp_drop_rate)
    if forward_type not in FORWARD_TYPES:
        raise ConfigError(
            f"option 'forward_type' is {forward_type!r}; it takes {', '.join(map(repr, FORWARD_TYPES))}."
            f"{nearest(forward_type, FORWARD_TYPES)}"
        )
    if forward_type in FIRST_TYPES:
        # That type has a convolution of its own, whatever these options say.
        ssm_conv, ssm_conv_bias = 3, True
    if ssm_conv < 3 or ssm_conv % 2 == 0:
        raise ConfigError(f"option 'ssm_conv' is {ssm_conv}; it takes odd numbers from 3 on")
    if num_classes < 1:
        raise ConfigError(f"option 'num_classes' is {num_classes}; it takes 1 or more")
    model = VMamba(
        n_classes=num_classes,
        in_channels=in_chans,
        dims=tuple(dims * 2**i for i in range(len(depths))) if isinstance(dims, int) else dims,
        depths=depths,
        d_state=ssm_d_state,
        expand=ssm_ratio,
        dt_rank=ssm_dt_rank,
        gate="_noz" not in forward_type,
        conv_bias=ssm_conv_bias,
        d_conv=ssm_conv,
        mlp_ratio=max(mlp_ratio, 0.0),
        stem="patches" if patchembed_version == "v1" else "convolutions",
        downsample={"v1": "merge", "v2": "conv2", "v3": "conv3"}[downsample_version],  # pyright: ignore[reportArgumentType]
        patch_size=patch_size,
        drop_path=drop_path_rate,
    )
    return Official(model, partial(rename, model=model))


@reads("MzeroMiko/VMamba:Backbone_VSSM")
@with_options_of(read_vssm)
def read_backbone(*, out_indices: tuple[int, ...] = (0, 1, 2, 3), pretrained: None = None, **options: Any) -> Official:
    """The grids of the stages `out_indices`, normalised, channels first, in the order of the stages."""
    if not out_indices:
        raise ConfigError("option 'out_indices' is empty; it takes the numbers of one stage or more")
    model = read_vssm(**options).model
    assert isinstance(model, VMamba)
    return Official(Backbone(model, out_indices), partial(_rename_backbone, model=model))


def require_no_rate(**rates: float) -> None:
    """Raise unless each official dropout rate is 0."""
    for name, rate in rates.items():
        if rate != 0:
            raise ConfigError(f"option '{name}' is {rate}; it takes 0, no released model has another")


def _rename_backbone(state: dict[str, Tensor], model: VMamba) -> dict[str, Tensor]:
    own = {key: value for key, value in state.items() if key.startswith("outnorm")}
    rest = rename({key: value for key, value in state.items() if key not in own}, model)
    return {**own, **{f"backbone.{key}": value for key, value in rest.items()}}
