"""What training shows of an image and its mask: a crop at another scale, mirrored, in other light; a batch at once.

Draws depend on the seed, the pass and the image alone (`image_draws`). Everything runs where the images lie, on a GPU
in a few kernels, which a CUDA graph can hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from selectra.data.image_draws import keys, uniforms
from selectra.errors import ConfigError

# The label of pixels that do not count; masks are bytes.
IGNORED = 255
N_DRAWS = 8
# Shares of red, green and blue in grey, as ITU-R BT.601 has them.
GREY = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class MaskAugment:
    """How training changes images and masks.

    Args:
        crop: Height and width of what training sees.
        zoom: Least and greatest factor by which an image is made larger before it is cropped.
        flip: Share of images that are mirrored left to right.
        flip_vertical: Share that is turned upside down, for pictures from above.
        jitter: Brightness, contrast and saturation change by up to this share.
    """

    crop: tuple[int, int]
    zoom: tuple[float, float] = (1.0, 1.0)
    flip: float = 0.0
    flip_vertical: float = 0.0
    jitter: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "flip_vertical"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: a share is from 0 to 1")
        if not 0 < self.zoom[0] <= self.zoom[1]:
            raise ConfigError(f"zoom={self.zoom}: least and greatest factor, above 0")
        if not 0 <= self.jitter < 1:
            raise ConfigError(f"jitter={self.jitter}: from 0 up to, but not, 1")
        if min(self.crop) < 1:
            raise ConfigError(f"crop={self.crop}: needs at least 1 pixel")

    @property
    def mixes(self) -> bool:
        """Nothing is blended."""
        return False


@dataclass(frozen=True)
class MaskPiece:
    """Images of one size, standardised by channel, and the classes of their pixels, 255 where nothing counts.

    The masks of images that were brought to another size have their own.
    """

    x: Float[Tensor, "b c h w"]
    y: Int64[Tensor, "b h2 w2"]

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class MaskBatch:
    """Pieces that differ in size; a training batch has one."""

    pieces: tuple[MaskPiece, ...]

    def to(self, device: torch.device | str) -> MaskBatch:
        """The same batch on another device."""
        return MaskBatch(tuple(MaskPiece(piece.x.to(device), piece.y.to(device)) for piece in self.pieces))

    def __len__(self) -> int:
        return sum(map(len, self.pieces))


@dataclass(frozen=True)
class HeldPairs:
    """A part's images and masks on one device, all of one size.

    Args:
        pixels: Images.
        labels: Masks, with `IGNORED` where nothing counts.
        mean: Of every channel, in shares of 255.
        std: Likewise.
    """

    pixels: UInt8[Tensor, "n c h w"]
    labels: UInt8[Tensor, "n h w"]
    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]

    def to(self, device: torch.device | str) -> HeldPairs:
        """The same on another device."""
        return HeldPairs(*(t.to(device) for t in (self.pixels, self.labels, self.mean, self.std)))

    def with_tables(self, augment: MaskAugment) -> HeldPairs:
        """The same: nothing is drawn from tables here."""
        return self

    def batch(
        self, index: Int64[Tensor, " b"], augment: MaskAugment | None, seed: int, epoch: Int64[Tensor, ""] | int
    ) -> MaskBatch:
        """Pairs as they are, or as training sees them in this pass."""
        if augment is not None:
            return MaskBatch((MaskPiece(*self.view(index, augment, seed, epoch)),))
        return MaskBatch((MaskPiece(self.plain(index), self.labels.index_select(0, index).long()),))

    def plain(self, index: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Images as they are, standardised."""
        shift, scale = self.mean[:, None, None], self.std[:, None, None]
        return (self.pixels.index_select(0, index).float() / 255 - shift) / scale

    def view(
        self, index: Int64[Tensor, " b"], augment: MaskAugment, seed: int, epoch: Int64[Tensor, ""] | int
    ) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, "b h w"]]:
        """Images and masks as training sees them in this pass."""
        u = uniforms(keys(seed, epoch, index), N_DRAWS)
        images, masks = self.pixels.index_select(0, index), self.labels.index_select(0, index)
        return viewed(images, masks, u, augment, self.mean, self.std)


def viewed(
    images: UInt8[Tensor, "b c H W"],
    masks: UInt8[Tensor, "b H W"],
    u: Float[Tensor, "b n"],
    augment: MaskAugment,
    mean: Float[Tensor, " c"],
    std: Float[Tensor, " c"],
) -> tuple[Float[Tensor, "b c h w"], Int64[Tensor, "b h w"]]:
    """Crops of images and masks.

    Images are read between pixels, masks at the nearest one. What lies outside of an image is the mean colour, and does
    not count.

    Args:
        images: All of one size.
        masks: Theirs.
        u: Draws from 0 to 1.
        augment: What to do.
        mean: Of every channel, in shares of 255.
        std: Likewise.
    """
    low, high = (log(side) for side in augment.zoom)
    zoom = torch.exp(low + (high - low) * u[:, 0])
    flips = ((u[:, 2], augment.flip_vertical), (u[:, 1], augment.flip))
    sides = []
    for draw, (flip, share), length, size in zip(
        (u[:, 4], u[:, 3]), flips, augment.crop, images.shape[2:], strict=True
    ):
        place = torch.arange(length, device=u.device).expand(len(u), length)
        place = torch.where((flip < share)[:, None], length - 1 - place, place)
        first = draw * (size - length / zoom)
        if augment.zoom == (1, 1):
            # Crops begin at whole pixels, all alike likely, so that nothing is blurred.
            first = (draw * (size - length + (1 if size >= length else -1))).trunc()
        here = first[:, None] + (place + 0.5) / zoom[:, None]
        sides.append(2 * here / size - 1)
    rows, columns = sides[0][:, :, None], sides[1][:, None, :]
    grid = torch.stack(torch.broadcast_tensors(columns, rows), dim=-1)
    shift, scale = mean[:, None, None], std[:, None, None]
    x = functional.grid_sample(images.float() / 255 - shift, grid, mode="bilinear", align_corners=False)
    # Zeros come in from outside; there they shall be the label that does not count.
    moved = masks[:, None].float() - IGNORED
    y = functional.grid_sample(moved, grid, mode="nearest", align_corners=False)[:, 0] + IGNORED
    if augment.jitter > 0:
        x = _jittered(x + shift, u, augment.jitter) - shift
    return x / scale, y.round().long()


def _jittered(x: Float[Tensor, "b c h w"], u: Tensor, most: float) -> Float[Tensor, "b c h w"]:
    """Other brightness, contrast about the mean grey, and saturation about each pixel's grey."""
    light, contrast, colour = (1 + most * (2 * u[:, i] - 1)[:, None, None, None] for i in (5, 6, 7))
    x = x * light
    weights = x.new_full((x.shape[1],), 1 / x.shape[1])
    if x.shape[1] == len(GREY):
        weights = torch.stack([torch.full_like(weights[0], share) for share in GREY])
    grey = (x * weights[:, None, None]).sum(1, keepdim=True)
    middle = grey.mean((2, 3), keepdim=True)
    saturated = torch.lerp(grey, x, colour)
    return torch.lerp(middle, saturated, contrast)
