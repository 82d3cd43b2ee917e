"""What image models share: the way from pixels to a grid of tokens, between grids, and positions at any size.

Grids are channels last, `(b, h, w, d)`; convolutions see them through a transposed view, which PyTorch's kernels take
as they are.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError
from selectra.layers.norm import LayerNorm

# An image's or a grid's size: one number for both sides, or height and width.
Size = int | tuple[int, int]


def quarters(depth: int) -> list[int]:
    """Numbers of the blocks that end each quarter of `depth`: where models of one resolution give features."""
    return sorted({-(-depth * i // 4) - 1 for i in range(1, 5)})


def sides(size: Size) -> tuple[int, int]:
    """Height and width."""
    return (size, size) if isinstance(size, int) else size


def require_image(x: Tensor, in_channels: int, least: int = 1) -> None:
    """Raise unless x is (b, c, h, w) with `in_channels` channels and sides of at least `least` pixels."""
    if x.dim() != 4 or x.shape[1] != in_channels:
        raise ConfigError(
            f"the image has shape {tuple(x.shape)}; it must be (b, c, h, w) with c = in_channels = {in_channels}."
        )
    if min(x.shape[2:]) < least:
        raise ConfigError(
            f"the image is {x.shape[2]} x {x.shape[3]} pixels; each side must be at least {least}: "
            "resize it, or build the model with a smaller patch_size."
        )


def convolve(conv: nn.Conv2d, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 d"]:
    """A convolution of a grid, channels last on both sides."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Each patch of pixels as a token.

    Args:
        in_channels: Channels of the image.
        d_model: Width of a token.
        patch_size: Pixels of a patch's side.
        stride: Pixels from one patch to the next; by default patches do not overlap.
        bias: Whether the map has one.
    """

    def __init__(
        self, in_channels: int, d_model: int, patch_size: int, stride: int | None = None, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.patch_size, self.stride = patch_size, patch_size if stride is None else stride
        require_counts(in_channels=in_channels, d_model=d_model, patch_size=patch_size, stride=self.stride)
        self.in_channels = in_channels
        self.proj = nn.Conv2d(in_channels, d_model, patch_size, self.stride, bias=bias)

    def grid(self, size: Size) -> tuple[int, int]:
        """Rows and columns of tokens of an image of this size; pixels beyond the last whole patch are not seen."""
        height, width = sides(size)
        if min(height, width) < self.patch_size:
            raise ConfigError(f"img_size={size} is smaller than patch_size={self.patch_size}")
        return (height - self.patch_size) // self.stride + 1, (width - self.patch_size) // self.stride + 1

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b h w d"]:
        require_image(x, self.in_channels, self.patch_size)
        return self.proj(x).permute(0, 2, 3, 1)


class PaddedPatchEmbed(PatchEmbed):
    """Patches that see every pixel: zeros below and on the right, so that there is one for each begun stride."""

    def grid(self, size: Size) -> tuple[int, int]:
        height, width = sides(size)
        return -(-height // self.stride), -(-width // self.stride)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b h w d"]:
        require_image(x, self.in_channels)
        below, right = (
            max(0, (n - 1) * self.stride + self.patch_size - side)
            for n, side in zip(self.grid((x.shape[2], x.shape[3])), x.shape[2:], strict=True)
        )
        return super().forward(F.pad(x, (0, right, 0, below)) if below or right else x)


class NormedPatches(PatchEmbed):
    """Patches that do not overlap, normalised."""

    def __init__(self, in_channels: int, d_model: int, patch_size: int) -> None:
        super().__init__(in_channels, d_model, patch_size)
        self.norm = LayerNorm(d_model)

    def forward(self, x: Float[Tensor, "b c H W"]) -> Float[Tensor, "b h w d"]:
        return self.norm(super().forward(x))


class ConvNorm(nn.Module):
    """A convolution to another width, usually with stride 2, and a layer norm.

    Args:
        d_in: Channels before.
        d_out: Channels after.
        kernel: Its side.
        stride: Steps from one output to the next.
        padding: Zeros on every side.
    """

    def __init__(self, d_in: int, d_out: int, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(d_in, d_out, kernel, stride, padding), LayerNorm(d_out)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 d"]:
        return self.norm(convolve(self.conv, x))


class PatchMerging(nn.Module):
    """Four neighbours as one token: norm and linear map of their channels side by side (Swin, arXiv:2103.14030).

    Odd grids are padded by zeros at the bottom and on the right.

    Args:
        d_in: Channels before.
        d_out: Channels after.
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.norm, self.reduction = LayerNorm(4 * d_in), nn.Linear(4 * d_in, d_out, bias=False)

    def forward(self, x: Float[Tensor, "b h w c"]) -> Float[Tensor, "b h2 w2 d"]:
        height, width = x.shape[1:3]
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        # Left above, left below, right above, right below.
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], dim=3)
        return self.reduction(self.norm(x))


class Mlp(nn.Module):
    """Two linear maps around a GELU, alike at every position.

    Args:
        d_model: Width.
        d_hidden: Width between the maps.
    """

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, d_hidden), nn.Linear(d_hidden, d_model)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.fc2(F.gelu(self.fc1(x)))


def resize_grid(x: Float[Tensor, "h w d"], size: tuple[int, int]) -> Float[Tensor, "h2 w2 d"]:
    """A grid of learned vectors at another size, bicubic and smoothed where it shrinks; the same at the same size."""
    if tuple(x.shape[:2]) == tuple(size):
        return x
    # Interpolation knows no half precision on every device.
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).permute(2, 0, 1)[None]
    return F.interpolate(wide, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).to(x.dtype)


def insert_token(x: Float[Tensor, "b l d"], token: Float[Tensor, "1 1 d"], at: int) -> Float[Tensor, "b l+1 d"]:
    """The same extra token in every sequence, at position `at`."""
    return torch.cat([x[:, :at], token.to(x.dtype).expand(x.shape[0], -1, -1), x[:, at:]], dim=1)


def remove_tokens(x: Float[Tensor, "b l d"], slots: Sequence[int]) -> Float[Tensor, "b l2 d"]:
    """The sequences without the tokens at these positions, which rise."""
    starts = [0, *(slot + 1 for slot in slots)]
    return torch.cat([x[:, start:stop] for start, stop in zip(starts, [*slots, None], strict=True)], dim=1)


def resize_positions(
    table: Float[Tensor, "1 m d"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    slots: Sequence[int] = (),
    new_slots: Sequence[int] = (),
) -> Float[Tensor, "1 m2 d"]:
    """Learned positions of a grid at another size; those of extra tokens stay as they are.

    Args:
        table: Positions of the grid, row by row, with those of the extra tokens among them.
        grid: Rows and columns that the table is for.
        new_grid: Rows and columns that it shall be for.
        slots: Where the extra tokens' positions stand in the table, rising.
        new_slots: Where they shall stand.
    """
    if tuple(grid) == tuple(new_grid):
        return table
    rows = remove_tokens(table, slots)[0]
    resized = resize_grid(rows.unflatten(0, tuple(grid)), new_grid).flatten(0, 1)[None]
    for slot, new_slot in zip(slots, new_slots, strict=True):
        resized = insert_token(resized, table[:, slot : slot + 1], new_slot)
    return resized


def start_linear(modules: Iterable[nn.Module], skip: Iterable[nn.Module | None] = ()) -> None:
    """Start the linear maps among these as Transformers do: truncated normal weights, no bias.

    Args:
        skip: Maps that keep their own start.
    """
    kept = {id(module) for module in skip}
    for module in modules:
        if isinstance(module, nn.Linear) and id(module) not in kept:
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def require_counts(**counts: int) -> None:
    """Raise unless each is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name}={count}: needs at least 1")
