"""Vision Mamba (Vim): a plain stack of two-directional Mambas, Zhu et al. 2024, arXiv:2401.09417.

Patches of an image become tokens; a class token stands in their middle; positions are learned and added; every block
scans the tokens forwards and backwards. The class token is read at the end.

Source: github.com/hustvl/Vim, dd0358a: `vim/models_mamba.py`, `mamba-1p1p1/mamba_ssm/modules/mamba_simple.py`.
Glossary: M depth, D d_model, E d_inner, N d_state (Sec. 3.4); J the tokens.

Departures, paper and official code against each other and against this:
  average       Alg. 1 adds the two directions; all released models halve the sum (`if_divide_out`), and so does this
  start         of the backward direction's steps the official code keeps PyTorch's start, with the bias set to 0; here
                both directions start as Mamba does
  positions     official code that resizes them takes the class token's to be the first, while it is the middle one;
                here it stays with its token, and grids are resized by themselves, when an image has another size
  CPU path      of the official mixer leaves the backward direction out (`use_fast_path=False`): it is not rebuilt
  results       the paper's last version has 80.3 and 81.4 % for S and S+, the repository 80.5 and 81.6 %; users did not
                find the published gain in speed and memory in S and B (hustvl/Vim#17)
  precision     official training is float32; users report not-a-numbers under autocast (hustvl/Vim#30). Here scan and
                residual stream are float32 inside, whatever the activations are
  training      the paper's weight decay is 0.05, the script of Ti has 0.1; its fine-tuning at stride 8 has a rate of
                1e-5, the script 5e-6
  B bar         the paper prints (delta A)^-1 (exp(delta A) - I) delta B; all code, this too, has delta B
  not built     rotary positions, flipped sequences, pairs of layers (`if_bidirectional`): no released weights have them
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import (
    PatchEmbed,
    Size,
    insert_token,
    quarters,
    resize_positions,
    start_linear,
)
from selectra.layers.image_model import Plain
from selectra.layers.norm import AddNorm, PreNorm, run_blocks
from selectra.mixers import S6, Bidirectional
from selectra.mixers.s6 import at_least_float32, require_input
from selectra.mixers.sizes import require_sizes
from selectra.official import Official, OfficialMamba, bidirectional_key, mixer_options, reads
from selectra.ops import selective_scan
from selectra.registry import models

Pool = Literal["middle", "head", "double", "mean", "max"]


class Halved(Bidirectional):
    """The mean of both directions instead of their sum."""

    mean = True


class SharedBidirectional(S6):
    """Vim's first mixer ("v1"): both directions share everything but A, also the forward convolution's output."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.A_b_log = nn.Parameter(self.A_log.detach().clone())

    no_decay = (*S6.no_decay, "A_b_log")

    def forward(self, x: Float[Tensor, "b l d_model"]) -> Float[Tensor, "b l d_model"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        require_input(x, self.d_model, None)
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u, _ = self.convolve(u)
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = nn.functional.linear(dt, self.dt_proj.weight)
        ys = [
            selective_scan(
                u,
                delta,
                -at_least_float32(A_log).exp(),
                B,
                C,
                self.D,
                z,
                self.dt_proj.bias,
                delta_softplus=True,
                reverse=reverse,
            )
            for A_log, reverse in ((self.A_log, False), (self.A_b_log, True))
        ]
        return self.out_proj(ys[0] + ys[1])


@models.register(
    "vim",
    kind="image",
    source="arXiv:2401.09417",
    smoke={"d_model": 16, "depth": 2, "d_state": 4, "patch_size": 8},
    tiny={},
    small={"d_model": 384},
    base={"d_model": 768},
    tiny_stride8={"stride": 8},
    small_stride8={"d_model": 384, "stride": 8},
    base_stride8={"d_model": 768, "stride": 8},
)
class Vim(Plain):
    """Vim's classifier; positions are learned for `img_size` and resized for images of another size.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        img_size: Pixels of the images' sides, or height and width.
        patch_size: Pixels of a patch's side.
        stride: Pixels from one patch to the next; by default patches do not overlap.
        d_model: Width of a token.
        depth: Number of blocks.
        d_state: State size per channel.
        d_conv: Width of the short convolutions.
        expand: Width between the mixers' projections over `d_model`.
        pool: What the head reads: a class token in the middle of the others, before them, or the mean of one at
            either end; or the tokens' mean; or their greatest scores.
        drop_path: Rate at which the last block's output is left out in training; earlier ones less often.
    """

    def __init__(
        self,
        *,
        n_classes: int = 1000,
        in_channels: int = 3,
        img_size: Size = 224,
        patch_size: int = 16,
        stride: int | None = None,
        d_model: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int | float = 2,
        pool: Pool = "middle",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, depth=depth)
        if pool not in get_args(Pool):
            raise ConfigError(f"pool={pool!r}: takes {', '.join(map(repr, get_args(Pool)))}")
        self.kind: Pool = pool
        self.patch_embed = PatchEmbed(in_channels, d_model, patch_size, stride)
        self.grid = self.patch_embed.grid(img_size)
        n_tokens = self.grid[0] * self.grid[1]
        extra = len(self.slots(n_tokens))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model)) if extra else None
        self.cls_token_tail = nn.Parameter(torch.zeros(1, 1, d_model)) if extra > 1 else None
        self.no_decay = ("pos_embed", "cls_token", "cls_token_tail")[: 1 + extra]
        self.pos_embed = nn.Parameter(torch.zeros(1, n_tokens + extra, d_model))
        self.layers = nn.ModuleList(
            PreNorm(AddNorm(d_model), Halved(d_model, d_state, d_conv, expand)) for _ in range(depth)
        )
        self.drops = nn.ModuleList(map(DropPath, rising_rates(drop_path, depth)))
        self.norm_f = AddNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)
        self._start()
        read = {"mean": "avg", "max": "scores"}.get(pool, "token")
        self.describe(in_channels, [d_model] * depth, [self.patch_embed.stride] * depth, quarters(depth), read)

    def slots(self, n_tokens: int) -> tuple[int, ...]:
        """Where the class tokens stand among `n_tokens` others, counted with those before them."""
        return {"middle": (n_tokens // 2,), "head": (0,), "double": (0, n_tokens + 1)}.get(self.kind, ())

    def forward_head(self, x: Float[Tensor, "b l d"], pre_logits: bool = False) -> Tensor:
        """Scores of the classes; with `pool="max"` the greatest of all tokens', which the classifier reads all."""
        y = super().forward_head(x, pre_logits)
        return y.amax(1) if self.global_pool == "scores" and not pre_logits else y

    def pool(self, x: Float[Tensor, "b l d"]) -> Tensor:
        return x if self.global_pool == "scores" else super().pool(x)

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return _rename(state, "v2")

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return list(self.layers)

    def run(
        self, x: Float[Tensor, "b c H W"], after: Collection[int]
    ) -> tuple[list[tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]], tuple[int, ...]]:
        """What is to be added and the stream behind some of the blocks, and the grid's sides."""
        x = self.patch_embed(x)
        grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        slots = self.slots(x.shape[1])
        for token, slot in zip((self.cls_token, self.cls_token_tail), slots, strict=False):
            assert token is not None
            x = insert_token(x, token, slot)
        # Some official configurations have no positions.
        if self.pos_embed is not None:
            x = x + resize_positions(self.pos_embed, self.grid, grid, self.slots(self.grid[0] * self.grid[1]), slots)
        return run_blocks(self.layers, self.drops, x, after, self.through), grid

    def _start(self) -> None:
        """As in the official code; the output projections are scaled down by the root of the depth."""
        start_linear([self.head])
        weight = self.patch_embed.proj.weight
        # Of a normal distribution cut at twice its deviation this is the part of the deviation that is left.
        std = weight[0].numel() ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        assert self.patch_embed.proj.bias is not None
        nn.init.zeros_(self.patch_embed.proj.bias)
        for token in (self.pos_embed, self.cls_token, self.cls_token_tail):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        for block in self.layers:
            with torch.no_grad():
                block.mixer.out_proj.weight.div_(len(self.layers) ** 0.5)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


class OfficialVim(Official):
    """The official classifier, which can be asked for what its head reads.

    Beside a class token the official "max" is over the scores of the classes, so that one is left of an image.
    """

    model: Vim

    def __init__(self, model: Vim, rename: Callable[[dict[str, Tensor]], dict[str, Tensor]], greatest: bool) -> None:
        super().__init__(model, rename)
        self.greatest = greatest

    def forward(self, x: Float[Tensor, "b c H W"], return_features: bool = False) -> tuple[Tensor]:
        y = self.model.embed(x) if return_features else self.model(x)
        return (y.amax(1) if self.greatest and not return_features else y,)


BimambaType = Literal["none", "v1", "v2"]


@reads("hustvl/Vim:VisionMamba")
def read_vim(
    *,
    img_size: Size = 224,
    patch_size: int = 16,
    stride: int = 16,
    depth: int = 24,
    embed_dim: int = 192,
    d_state: int = 16,
    channels: int = 3,
    num_classes: int = 1000,
    ssm_cfg: dict[str, int | float | bool | str] | None = None,
    drop_rate: Literal[0] = 0,
    drop_path_rate: float = 0.1,
    norm_epsilon: float = 1e-5,
    rms_norm: bool = True,
    initializer_cfg: None = None,
    fused_add_norm: bool = True,
    residual_in_fp32: bool = True,
    device: None = None,
    dtype: None = None,
    ft_seq_len: None = None,
    pt_hw_seq_len: int = 14,
    if_bidirectional: Literal[False] = False,
    final_pool_type: Literal["none", "mean", "max"] = "none",
    if_abs_pos_embed: bool = True,
    if_rope: Literal[False] = False,
    if_rope_residual: Literal[False] = False,
    flip_img_sequences_ratio: float = -1.0,
    if_bimamba: bool = False,
    bimamba_type: BimambaType = "v2",
    if_cls_token: bool = True,
    if_divide_out: bool = True,
    init_layer_scale: None = None,
    use_double_cls_token: bool = False,
    use_middle_cls_token: bool = True,
    if_devide_out: bool = True,
) -> OfficialVim:
    """The classifier. `fused_add_norm` chooses a kernel, `pt_hw_seq_len` is for rotary positions: without effect.

    So is `if_devide_out`, which the official base model is given; the option that counts there keeps its default.
    """
    if flip_img_sequences_ratio > 0:
        raise ConfigError(f"option 'flip_img_sequences_ratio' is {flip_img_sequences_ratio}; it takes at most 0")
    if not if_cls_token and final_pool_type == "none":
        raise ConfigError("option 'final_pool_type' is 'none' without a class token; it takes 'mean' and 'max' there")
    if if_cls_token:
        pool = "double" if use_double_cls_token else "middle" if use_middle_cls_token else "head"
    else:
        pool = "mean" if final_pool_type == "mean" else "max"
    model = Vim(
        n_classes=max(num_classes, 1),
        in_channels=channels,
        img_size=img_size,
        patch_size=patch_size,
        stride=stride,
        d_model=embed_dim,
        depth=depth,
        d_state=d_state,
        pool=pool,
        drop_path=drop_path_rate,
    )
    if num_classes < 1:
        model.reset_classifier(0)
    kind, own = "v1" if if_bimamba else bimamba_type, mixer_options("ssm_cfg", ssm_cfg)
    if "d_state" in own:
        raise ConfigError("option 'ssm_cfg' has 'd_state', which is an option of its own")
    for block in model.layers:
        assert isinstance(block, PreNorm)
        if kind != "v2" or not if_divide_out or own:
            block.mixer = _mixer(kind, if_divide_out)(embed_dim, d_state, **own)
    if not if_abs_pos_embed:
        model.register_parameter("pos_embed", None)
        model.no_decay = model.no_decay[1:]
    for block in [*model.layers, model]:
        name = "norm_f" if block is model else "norm"
        norm = AddNorm(embed_dim, norm_epsilon, "rms" if rms_norm else "layer", residual_in_fp32)
        setattr(block, name, norm)
    return OfficialVim(model, partial(_rename, kind=kind), if_cls_token and final_pool_type == "max")


def _mixer(kind: BimambaType, divide: bool) -> type[nn.Module]:
    """The class of the official `bimamba_type`; only the second type's sum can be halved."""
    return {"none": S6, "v1": SharedBidirectional, "v2": Halved if divide else Bidirectional}[kind]


@reads("hustvl/Vim:Mamba")
def read_mixer(
    *,
    d_model: int,
    d_state: int = 16,
    d_conv: int = 4,
    expand: int | float = 2,
    dt_rank: int | Literal["auto"] = "auto",
    dt_min: float = 0.001,
    dt_max: float = 0.1,
    dt_init: Literal["random", "constant"] = "random",
    dt_scale: float = 1.0,
    dt_init_floor: float = 1e-4,
    conv_bias: bool = True,
    bias: bool = False,
    use_fast_path: Literal[True] = True,
    layer_idx: int | None = None,
    device: None = None,
    dtype: None = None,
    bimamba_type: BimambaType = "none",
    if_divide_out: bool = False,
    init_layer_scale: None = None,
) -> Official:
    """The mixer alone; what says how its steps start has no effect on loaded ones."""
    model = _mixer(bimamba_type, if_divide_out)(
        d_model, d_state, d_conv, expand, dt_rank, conv_bias=conv_bias, bias=bias
    )
    if isinstance(model, S6) and bimamba_type == "none":
        return OfficialMamba(model, layer_idx)
    return Official(model, partial(_rename, kind=bimamba_type))


def _rename(state: dict[str, Tensor], kind: BimambaType) -> dict[str, Tensor]:
    named = {key.replace("cls_token_head", "cls_token"): value for key, value in state.items()}
    return {bidirectional_key(key): value for key, value in named.items()} if kind == "v2" else named
