"""MambaVision: convolutions, then windows of Mambas and attention, Hatamizadeh and Kautz 2024, arXiv:2407.08083.

Here to run released weights only, which are for non-commercial use: `from_official("NVlabs/MambaVision:MambaVision",
config, state)`; no size of it is registered for training.

Source: the state's layout and the sizes in github.com/NVlabs/MambaVision, 7860a50, `mambavision/models/
mamba_vision.py`; written anew from the paper.
Glossary: levels are the stages; the first two convolve, in the others blocks mix the tokens of windows, the first half
of them by `HalfMamba`, the second by attention.

Departures, paper and official code against each other and against this:
  steps' bias  is added twice, in their projection and in the scan, as the authors confirm of their code (issue 32); the
               weights were trained so
  outputs      are not held to stored ones of the official code, of which there are none here
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.drop import DropPath, LayerScale, rising_rates
from selectra.layers.image import Mlp, require_image
from selectra.layers.image_model import LAST, Pyramid
from selectra.mixers.s6 import at_least_float32, start_step
from selectra.mixers.sizes import mixer_sizes
from selectra.official import Official, reads
from selectra.ops import selective_scan


class HalfMamba(nn.Module):
    """A selective scan of half of the channels, set beside a convolution of the other half; windows are sequences."""

    no_decay = ("A_log", "D", "dt_proj.bias")

    def __init__(self, d_model: int, d_state: int = 8, d_conv: int = 3) -> None:
        super().__init__()
        half, self.dt_rank = mixer_sizes(d_model, d_state, d_conv, 0.5, "auto")
        self.d_state = d_state
        self.in_proj = nn.Linear(d_model, 2 * half, bias=False)
        self.conv1d_x = nn.Conv1d(half, half, d_conv, groups=half, padding="same", bias=False)
        self.conv1d_z = nn.Conv1d(half, half, d_conv, groups=half, padding="same", bias=False)
        self.x_proj = nn.Linear(half, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, half)
        start_step(self.dt_proj.weight, self.dt_proj.bias)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(half, 1))
        self.D = nn.Parameter(torch.ones(half))
        self.out_proj = nn.Linear(2 * half, d_model, bias=False)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        halves = self.in_proj(x).transpose(1, 2).chunk(2, dim=1)
        convs = (self.conv1d_x, self.conv1d_z)
        u, z = (F.silu(conv(half)).transpose(1, 2) for conv, half in zip(convs, halves, strict=True))
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        A = -at_least_float32(self.A_log).exp()
        # The projection adds the bias, and so does the scan.
        y = selective_scan(u, self.dt_proj(dt), A, B, C, self.D, None, self.dt_proj.bias, delta_softplus=True)
        return self.out_proj(torch.cat([y, z], dim=-1))


class Attention(nn.Module):
    """Softmax attention among the tokens of a window."""

    def __init__(self, d_model: int, n_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        if d_model % n_heads:
            raise ConfigError(f"option 'num_heads' has {n_heads}; it must divide the width {d_model}")
        self.n_heads = n_heads
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model, bias=qkv_bias), nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A mixer and an MLP, each behind a norm, scaled and added to its input."""

    def __init__(self, d_model: int, mixer: nn.Module, d_hidden: int, scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.mixer, self.mlp, self.drop_path = mixer, Mlp(d_model, d_hidden), DropPath(drop_path)
        self.scale1, self.scale2 = _scale(d_model, scale), _scale(d_model, scale)

    def forward(self, x: Float[Tensor, "b l d"]) -> Float[Tensor, "b l d"]:
        x = x + self.drop_path(self.scale1(self.mixer(self.norm1(x))))
        return x + self.drop_path(self.scale2(self.mlp(self.norm2(x))))


class ConvBlock(nn.Module):
    """Two convolutions with batch norm around a GELU, scaled and added to their input; channels first."""

    def __init__(self, d_model: int, scale: float | None, drop_path: float) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(d_model, d_model, 3, padding=1) for _ in range(2))
        self.norm1, self.norm2 = nn.BatchNorm2d(d_model), nn.BatchNorm2d(d_model)
        self.scale, self.drop_path = _scale(d_model, scale), DropPath(drop_path)

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        y = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        y = self.norm2(self.conv2(y))
        return x + self.drop_path(self.scale(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def _scale(d_model: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(d_model, start)


class Level(nn.Module):
    """Blocks at one resolution, of the whole map or of windows, and the way to the next; channels first."""

    def __init__(self, blocks: Sequence[nn.Module], window: int | None, downsample: nn.Module | None) -> None:
        super().__init__()
        self.blocks, self.window, self.downsample = nn.Sequential(*blocks), window, downsample

    def forward(
        self, x: Float[Tensor, "b d h w"], through: Callable[..., Any] | None = None
    ) -> Float[Tensor, "b d h w"]:
        """All but the way to the next; `through` calls a block."""
        if self.window is None:
            return self._mix(x, through)
        batch, _, height, width = x.shape
        n = self.window
        # Zeros fill the last windows, and are tokens there.
        x = F.pad(x, (0, -width % n, 0, -height % n)).unflatten(3, (-1, n)).unflatten(2, (-1, n))  # b d i n j n
        rows, columns = x.shape[2], x.shape[4]
        tokens = self._mix(x.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2), through)
        x = tokens.view(batch, rows, columns, n, n, -1).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return x[:, :, :height, :width]

    def _mix(self, x: Tensor, through: Callable[..., Any] | None) -> Tensor:
        for block in self.blocks:
            x = block(x) if through is None else through(block, x)
        return x


class MambaVision(Pyramid):
    """The classifier.

    Args:
        n_classes: Classes.
        in_channels: Channels of the image.
        d_stem: Width inside the stem.
        d_model: Width of the first level; each next one has twice the width.
        depths: Blocks of every level.
        n_heads: Heads of every level's attention.
        windows: Tokens of a window's side, of every level.
        mlp_ratio: Inner width of the MLPs over that of their level.
        qkv_bias: Whether the attention's first map has a bias.
        scale: Start of the scales in windowed levels; None for none.
        conv_scale: The same in the others.
        drop_path: Rate at which the last block's branches are left out in training.
    """

    def __init__(
        self,
        *,
        n_classes: int,
        in_channels: int,
        d_stem: int,
        d_model: int,
        depths: tuple[int, ...],
        n_heads: tuple[int, ...],
        windows: tuple[int, ...],
        mlp_ratio: float,
        qkv_bias: bool,
        scale: float | None,
        conv_scale: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        if not 1 <= len(depths) <= 4 or not len(depths) == len(n_heads) == len(windows):
            raise ConfigError(f"depths={depths}, num_heads={n_heads}, window_size={windows}: needs up to four of each")
        dims = [d_model * 2**i for i in range(len(depths))]
        self.stem = nn.Sequential()
        for d_in, d_out in ((in_channels, d_stem), (d_stem, d_model)):
            self.stem.append(nn.Conv2d(d_in, d_out, 3, 2, 1, bias=False))
            self.stem.extend([nn.BatchNorm2d(d_out, eps=1e-4), nn.ReLU()])
        rates = iter(rising_rates(drop_path, sum(depths)))
        self.levels = nn.ModuleList()
        for i, (d, depth) in enumerate(zip(dims, depths, strict=True)):
            if i < 2:
                blocks: list[nn.Module] = [ConvBlock(d, conv_scale, next(rates)) for _ in range(depth)]
            else:
                # The greater half where there is a middle one.
                n_mambas = (depth + 1) // 2
                blocks = [
                    Block(
                        d,
                        HalfMamba(d) if j < n_mambas else Attention(d, n_heads[i], qkv_bias),
                        int(mlp_ratio * d),
                        scale,
                        next(rates),
                    )
                    for j in range(depth)
                ]
            way = nn.Conv2d(d, 2 * d, 3, 2, 1, bias=False) if i + 1 < len(depths) else None
            self.levels.append(Level(blocks, None if i < 2 else windows[i], way))
        self.norm = nn.BatchNorm2d(dims[-1])
        self.head = nn.Linear(dims[-1], n_classes)
        self.describe(in_channels, dims, [4 * 2**i for i in range(len(dims))], range(len(dims)), "avg")

    level_name = "levels"

    def run(
        self, x: Float[Tensor, "b c H W"], after: Collection[int]
    ) -> tuple[list[Float[Tensor, "b h w d"]], tuple[int, ...]]:
        """The grids behind the blocks of some levels."""
        require_image(x, self.in_chans)
        x, grids = self.stem(x), []
        for i, level in enumerate(self.levels):
            assert isinstance(level, Level)
            x = level(x, self.through)
            if i in after:
                grids.append(x.permute(0, 2, 3, 1))
            if len(grids) == len(after):
                break
            if level.downsample is not None:
                x = level.downsample(x)
        return grids, ()

    def normed(self, state: Float[Tensor, "b h w d"], level: int) -> Float[Tensor, "b h w d"]:
        is_last = level + 1 == len(self.feature_info) and self.norm is not None
        return self.norm(state.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if is_last else state

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [(r"^levels\.(\d+)\.downsample", LAST), (r"^levels\.(\d+)\.\w+\.(\d+)", None), (r"^norm\.", LAST)]
        return {"stem": r"^stem", "blocks": r"^levels\.(\d+)" if coarse else fine}

    def from_official_keys(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """An official checkpoint's state under our keys."""
        return _rename(state)


@reads("NVlabs/MambaVision:MambaVision")
def read_mambavision(
    *,
    dim: int,
    in_dim: int,
    depths: tuple[int, ...],
    window_size: tuple[int, ...],
    mlp_ratio: float,
    num_heads: tuple[int, ...],
    drop_path_rate: float = 0.2,
    in_chans: int = 3,
    num_classes: int = 1000,
    qkv_bias: bool = True,
    qk_scale: None = None,
    drop_rate: Literal[0] = 0,
    attn_drop_rate: Literal[0] = 0,
    layer_scale: float | None = None,
    layer_scale_conv: float | None = None,
    resolution: int = 224,
) -> Official:
    """The classifier; `resolution` has no effect in the official code either."""
    model = MambaVision(
        n_classes=max(num_classes, 1),
        in_channels=in_chans,
        d_stem=in_dim,
        d_model=dim,
        depths=depths,
        n_heads=num_heads,
        windows=window_size,
        mlp_ratio=mlp_ratio,
        qkv_bias=qkv_bias,
        scale=layer_scale,
        conv_scale=layer_scale_conv,
        drop_path=drop_path_rate,
    )
    if num_classes < 1:
        model.reset_classifier(0)
    return Official(model, _rename)


def _rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        ours = key.replace("patch_embed.conv_down.", "stem.").replace(".downsample.reduction.0.", ".downsample.")
        for theirs, name in ((".gamma_1", ".scale1.gamma"), (".gamma_2", ".scale2.gamma"), (".gamma", ".scale.gamma")):
            if ours.endswith(theirs):
                ours = ours.removesuffix(theirs) + name
                break
        # Whoever changes a state's precision as a whole makes a count of batches a fraction too.
        renamed[ours] = value.long() if key.endswith("num_batches_tracked") and value.is_floating_point() else value
    return renamed
