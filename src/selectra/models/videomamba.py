"""VideoMamba: a plain stack of two-directional Mambas for images and clips, Li et al. 2024, arXiv:2403.06977.

Patches of an image, or of every frame of a clip, become tokens, frame after frame; a class token stands before all of
them; positions in the frame and in time are learned and added; every block scans all tokens forwards and backwards.

Source: github.com/OpenGVLab/VideoMamba, f3427e4: `videomamba/{image_sm,video_sm}/models/videomamba.py`, `mamba/
mamba_ssm/modules/mamba_simple.py`.
Glossary: D d_model, N d_state, T frames; "tubelet" the frames of a patch.

Departures, paper and official code against each other and against this:
  sum          the two directions are added, where Vim, whose parameters have the same names, halves the sum
  class token  stands first, so the last block's forward scan reaches it as one token: its A has no effect
  start        the official code starts the whole model as linear maps do, so that Mamba's start of the steps is lost
               and all of them begin at 0.69; here they start as Mamba's (`start="shipped"` for the other)
  base         is left out of the paper's comparison; it is the last of the released image sizes
  middle       M and B are trained by distillation from S; the zoo's models were fine-tuned without the layer-wise decay
               that the paper names, by a fault since mended (without gain)
  views        on Something-Something are 3 x 3 in the zoo's table, 3 x 2 in the paper's
  positions    of another size or number of frames are resized here; the official code refuses them
"""

from collections.abc import Collection
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, rising_rates
from selectra.layers.image import (
    PatchEmbed,
    Size,
    insert_token,
    quarters,
    require_image,
    resize_positions,
    start_linear,
)
from selectra.layers.image_model import Plain
from selectra.layers.norm import AddNorm, PreNorm, run_blocks
from selectra.mixers import S6, Bidirectional, SelectivePath
from selectra.mixers.sizes import require_sizes
from selectra.official import Official, bidirectional_key, mixer_options, reads
from selectra.registry import models


class TubeletEmbed(PatchEmbed):
    """Each patch of pixels over some frames as a token."""

    def __init__(self, in_channels: int, d_model: int, patch_size: int, tubelet: int) -> None:
        super().__init__(in_channels, d_model, patch_size)
        self.tubelet, sides = tubelet, (tubelet, patch_size, patch_size)
        self.proj = nn.Conv3d(in_channels, d_model, sides, sides)

    def forward(self, x: Float[Tensor, "b c T H W"]) -> Float[Tensor, "b t h w d"]:
        if x.dim() != 5 or x.shape[2] < self.tubelet:
            raise ConfigError(
                f"the clip has shape {tuple(x.shape)}; it must be (b, c, t, h, w) with at least {self.tubelet} frames."
            )
        require_image(x[:, :, 0], self.in_channels, self.patch_size)
        return self.proj(x).permute(0, 2, 3, 4, 1)


SMOKE: dict[str, Any] = {"d_model": 16, "depth": 2, "d_state": 4, "patch_size": 8}
SMALL: dict[str, Any] = {"d_model": 384}
MIDDLE: dict[str, Any] = {"d_model": 576, "depth": 32}


def _clips(size: dict[str, Any]) -> dict[str, Any]:
    return {"n_frames": 8, **size}


@models.register(
    "videomamba_clip",
    kind="video",
    source="arXiv:2403.06977",
    smoke=_clips({**SMOKE, "n_frames": 3}),
    tiny=_clips({}),
    small=_clips(SMALL),
    middle=_clips(MIDDLE),
)
@models.register(
    "videomamba",
    kind="image",
    source="arXiv:2403.06977",
    smoke=SMOKE,
    tiny={},
    small=SMALL,
    middle=MIDDLE,
    base={"d_model": 768},
)
class VideoMamba(Plain):
    """VideoMamba's classifier of images, or, with `n_frames`, of clips; positions are resized to what it is given.

    Args:
        n_classes: Classes.
        in_channels: Channels of the images.
        img_size: Pixels of the images' sides, or height and width.
        patch_size: Pixels of a patch's side.
        stride: Pixels from one patch of an image to the next; by default patches do not overlap.
        d_model: Width of a token.
        depth: Number of blocks.
        d_state: State size per channel.
        d_conv: Width of the short convolutions.
        expand: Width between the mixers' projections over `d_model`.
        n_frames: Frames of a clip; without it the model takes images.
        tubelet: Frames of a patch.
        drop_path: Rate at which the last block's output is left out in training; earlier ones less often.
        start: The steps' projections at the start as Mamba has them, or as the official code.
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
        n_frames: int | None = None,
        tubelet: int = 1,
        drop_path: float = 0.0,
        start: Literal["mamba", "shipped"] = "mamba",
    ) -> None:
        super().__init__()
        require_sizes(n_classes=n_classes, depth=depth, tubelet=tubelet)
        if n_frames is None:
            self.patch_embed = PatchEmbed(in_channels, d_model, patch_size, stride)
        elif stride not in (None, patch_size):
            raise ConfigError(f"stride={stride}: patches of clips do not overlap, it is patch_size={patch_size} there")
        else:
            require_sizes(n_frames=n_frames // tubelet)
            self.patch_embed = TubeletEmbed(in_channels, d_model, patch_size, tubelet)
        self.grid = self.patch_embed.grid(img_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, d_model))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], d_model))
        self.time_embed = None if n_frames is None else nn.Parameter(torch.zeros(1, n_frames // tubelet, d_model))
        self.no_decay = ("cls_token", "pos_embed", "time_embed")[: 2 if n_frames is None else 3]
        self.layers = nn.ModuleList(
            PreNorm(AddNorm(d_model), Bidirectional(d_model, d_state, d_conv, expand)) for _ in range(depth)
        )
        self.drops = nn.ModuleList(map(DropPath, rising_rates(drop_path, depth)))
        self.norm_f = AddNorm(d_model)
        self.head = nn.Linear(d_model, n_classes)
        self._start(start)
        self.describe(in_channels, [d_model] * depth, [self.patch_embed.stride] * depth, quarters(depth), "token")

    def slots(self, n_tokens: int) -> tuple[int, ...]:
        """The class token is the first."""
        return (0,)

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return _rename(state, True)

    def blocks(self) -> list[nn.Module]:
        """What to shard and to checkpoint."""
        return list(self.layers)

    def run(
        self, x: Float[Tensor, "b c *T H W"], after: Collection[int]
    ) -> tuple[list[tuple[Float[Tensor, "b l d"], Float[Tensor, "b l d"]]], tuple[int, ...]]:
        """What is to be added and the stream behind some of the blocks, and the sides of the grid, frames first."""
        x = self.patch_embed(x)
        grid = tuple(x.shape[1:-1])
        positions = resize_positions(self.pos_embed, self.grid, (grid[-2], grid[-1]), (0,), (0,))
        # (b, t, h w, d); an image is a clip of one frame without a time.
        frames = grid[0] if len(grid) == 3 else 1
        x = x.flatten(-3, -2).view(x.shape[0], frames, positions.shape[1] - 1, x.shape[-1]) + positions[:, None, 1:]
        if self.time_embed is not None:
            x = x + _resize_time(self.time_embed, x.shape[1])[:, :, None]
        x = insert_token(x.flatten(1, 2), self.cls_token + positions[:, :1], 0)
        return run_blocks(self.layers, self.drops, x, after, self.through), grid

    def _start(self, start: str) -> None:
        paths = [module for module in self.modules() if isinstance(module, SelectivePath)]
        start_linear(self.modules(), () if start == "shipped" else (path.dt_proj for path in paths))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, Bidirectional):
                module.out_proj.reset_parameters()
                with torch.no_grad():
                    module.out_proj.weight.div_(len(self.layers) ** 0.5)


def _resize_time(table: Float[Tensor, "1 t d"], n_steps: int) -> Float[Tensor, "1 t2 d"]:
    """Positions in time for another number of steps."""
    if table.shape[1] == n_steps:
        return table
    wide = table.to(torch.promote_types(table.dtype, torch.float32)).transpose(1, 2)
    return F.interpolate(wide, n_steps, mode="linear").transpose(1, 2).to(table.dtype)


@reads("OpenGVLab/VideoMamba:image.VisionMamba")
def read_image_model(
    *,
    img_size: Size = 224,
    patch_size: int = 16,
    stride: int = 16,
    depth: int = 24,
    embed_dim: int = 192,
    channels: int = 3,
    num_classes: int = 1000,
    drop_rate: Literal[0] = 0,
    drop_path_rate: float = 0.1,
    ssm_cfg: dict[str, int | float | bool | str] | None = None,
    norm_epsilon: float = 1e-5,
    initializer_cfg: None = None,
    fused_add_norm: bool = True,
    rms_norm: bool = True,
    residual_in_fp32: bool = True,
    bimamba: bool = True,
    device: None = None,
    dtype: None = None,
) -> Official:
    """The classifier of images; `fused_add_norm` chooses a kernel and has no effect."""
    model = VideoMamba(
        n_classes=max(num_classes, 1),
        in_channels=channels,
        img_size=img_size,
        patch_size=patch_size,
        stride=stride,
        d_model=embed_dim,
        depth=depth,
        drop_path=drop_path_rate,
    )
    if num_classes < 1:
        model.reset_classifier(0)
    return _official(model, norm_epsilon, rms_norm, residual_in_fp32, bimamba, mixer_options("ssm_cfg", ssm_cfg))


@reads("OpenGVLab/VideoMamba:video.VisionMamba")
def read_video_model(
    *,
    img_size: Size = 224,
    patch_size: int = 16,
    depth: int = 24,
    embed_dim: int = 192,
    channels: int = 3,
    num_classes: int = 1000,
    drop_rate: Literal[0] = 0,
    drop_path_rate: float = 0.1,
    ssm_cfg: dict[str, int | float | bool | str] | None = None,
    norm_epsilon: float = 1e-5,
    initializer_cfg: None = None,
    fused_add_norm: bool = True,
    rms_norm: bool = True,
    residual_in_fp32: bool = True,
    bimamba: bool = True,
    kernel_size: int = 1,
    num_frames: int = 8,
    fc_drop_rate: Literal[0] = 0,
    device: None = None,
    dtype: None = None,
    use_checkpoint: bool = False,
    checkpoint_num: int = 0,
) -> Official:
    """The classifier of clips; `use_checkpoint` and `checkpoint_num` save memory in training: without effect here."""
    model = VideoMamba(
        n_classes=max(num_classes, 1),
        in_channels=channels,
        img_size=img_size,
        patch_size=patch_size,
        d_model=embed_dim,
        depth=depth,
        n_frames=num_frames,
        tubelet=kernel_size,
        drop_path=drop_path_rate,
    )
    if num_classes < 1:
        model.reset_classifier(0)
    return _official(model, norm_epsilon, rms_norm, residual_in_fp32, bimamba, mixer_options("ssm_cfg", ssm_cfg))


def _official(
    model: VideoMamba, eps: float, rms_norm: bool, in_fp32: bool, bimamba: bool, own: dict[str, Any]
) -> Official:
    """With the norms and the mixers that the options ask for."""
    d_model = model.feature_dims[-1]

    def norm() -> AddNorm:
        return AddNorm(d_model, eps, "rms" if rms_norm else "layer", in_fp32)

    model.norm_f = norm()
    for block in model.layers:
        assert isinstance(block, PreNorm)
        block.norm = norm()
        if own or not bimamba:
            block.mixer = (Bidirectional if bimamba else S6)(d_model, **own)
    return Official(model, partial(_rename, bimamba=bimamba))


def _rename(state: dict[str, Tensor], bimamba: bool) -> dict[str, Tensor]:
    named = {key.replace("temporal_pos_embedding", "time_embed"): value for key, value in state.items()}
    return {bidirectional_key(key): value for key, value in named.items()} if bimamba else named
