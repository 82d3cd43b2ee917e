"""What training shows of images held in memory: crops, flips, erased boxes and mixtures, for a whole batch at once.

Everything runs where the images lie, on a GPU in a few kernels, which a CUDA graph can hold. Each image's view depends
on the seed, the pass and the image alone (`image_draws`), and so does its partner in a mixture, which may be any image
of the training part.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import log

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

from selectra.data.image_draws import beta, beta_table, keys, uniforms
from selectra.errors import ConfigError

# Of random erasing, as in torchvision: least and greatest share of the image, and greatest ratio of sides.
ERASED_SHARE, ERASED_RATIO = (0.02, 1 / 3), 10 / 3
CROP_RATIO = 4 / 3
N_DRAWS, N_MIXING = 16, 8


@dataclass(frozen=True)
class Augment:
    """How training changes images.

    Args:
        crop: Pixels by which an image is moved at most, up or down and left or right, its own mirrored border coming
            in: a random crop of the padded image.
        scale: Least share of an image that a crop of random size and shape (3:4 to 4:3) keeps; None for no such crop.
        flip: Share of images that are mirrored left to right.
        flip_vertical: Share that is turned upside down, for pictures from above.
        randaugment: RandAugment's number of operations, its magnitude out of 30; None for none.
        erase: Share of images in which a box is erased.
        mixup: Parameter of the Beta distribution by which two images are blended; 0 for no blending.
        cutmix: That of the share of an image that a box from another replaces; with both, each is for half of them.
    """

    crop: int = 0
    scale: float | None = None
    flip: float = 0.0
    flip_vertical: float = 0.0
    randaugment: tuple[int, int] | None = None
    erase: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name in ("flip", "flip_vertical", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}: a share is from 0 to 1")
        if self.crop < 0 or self.mixup < 0 or self.cutmix < 0:
            raise ConfigError(f"crop={self.crop}, mixup={self.mixup}, cutmix={self.cutmix}: none is below 0")
        if self.scale is not None and not 0 < self.scale <= 1:
            raise ConfigError(f"scale={self.scale}: the least share that a crop keeps, above 0 and up to 1")
        if self.randaugment is not None and not (self.randaugment[0] >= 1 and 0 <= self.randaugment[1] <= 30):
            raise ConfigError(f"randaugment={self.randaugment}: at least one operation, and a magnitude of 0 to 30")

    @property
    def mixes(self) -> bool:
        """Whether targets are mixtures of two classes."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class ImageBatch:
    """Images, standardised by channel, and their classes."""

    x: Float[Tensor, "b c h w"]
    y: Int64[Tensor, " b"]
    target: Float[Tensor, "b k"] | None = None
    """Shares of the classes, where images are mixtures."""

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same batch on another device."""
        target = None if self.target is None else self.target.to(device)
        return ImageBatch(self.x.to(device), self.y.to(device), target)

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Held:
    """A part's images on one device.

    Args:
        pixels: All images.
        labels: Their classes.
        mean: Of every channel of the training part, in shares of 255.
        std: Likewise.
        n_classes: Classes.
    """

    pixels: UInt8[Tensor, "n c h w"]
    labels: Int64[Tensor, " n"]
    mean: Float[Tensor, " c"]
    std: Float[Tensor, " c"]
    n_classes: int
    tables: dict[str, Tensor] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Held:
        """The same on another device."""
        pixels, labels, mean, std = (t.to(device) for t in (self.pixels, self.labels, self.mean, self.std))
        tables = {name: table.to(device) for name, table in self.tables.items()}
        return Held(pixels, labels, mean, std, self.n_classes, tables)

    def with_tables(self, augment: Augment) -> Held:
        """The same with what mixing draws from."""
        return Held(self.pixels, self.labels, self.mean, self.std, self.n_classes, mixing_tables(augment))

    def batch(
        self, index: Int64[Tensor, " b"], augment: Augment | None, seed: int, epoch: Int64[Tensor, ""] | int
    ) -> ImageBatch:
        """Images as they are, or as training sees them in this pass."""
        labels = self.labels.index_select(0, index)
        if augment is None:
            return ImageBatch(self.plain(index), labels)
        x, target = self.view(index, augment, seed, epoch)
        return ImageBatch(x, labels, target)

    def plain(self, index: Int64[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        """Images as they are, standardised."""
        return self._standardised(self.pixels.index_select(0, index).float())

    def _standardised(self, pixels: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        scale, shift = 1 / (255 * self.std), -self.mean / self.std
        return torch.addcmul(shift[:, None, None], pixels, scale[:, None, None])

    def view(
        self, index: Int64[Tensor, " b"], augment: Augment, seed: int, epoch: Int64[Tensor, ""] | int
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"] | None]:
        """Images as training sees them in this pass, and their targets where they are mixtures."""
        key = keys(seed, epoch, index)
        x = self._one(index, key, augment)
        if not augment.mixes:
            return x, None
        u = uniforms(key, N_DRAWS + N_MIXING)[:, N_DRAWS:]
        partner = (u[:, 0] * len(self.pixels)).long()
        other = self._one(partner, keys(seed, epoch, partner), augment)
        x, share = mix(x, other, u, augment, self.tables)
        own, second = (functional.one_hot(self.labels[i], self.n_classes).float() for i in (index, partner))
        return x, torch.lerp(second, own, share[:, None])

    def _one(self, index: Tensor, key: Tensor, augment: Augment) -> Float[Tensor, "b c h w"]:
        """Views before they are mixed."""
        u = uniforms(key, N_DRAWS)
        if augment.scale is None:
            x = self._standardised(_moved(self.pixels, index, u, augment))
        else:
            x = self._standardised(_resized(self.pixels.index_select(0, index).float(), u, augment))
        return _erased(x, u, augment.erase) if augment.erase > 0 else x


def _mirror(place: Tensor, size: int) -> Tensor:
    """Places beyond a border as those inside that lie as far from it."""
    place = place.abs()
    return torch.where(place >= size, 2 * (size - 1) - place, place).clamp(0, size - 1)


def _moved(pixels: Tensor, index: Tensor, u: Tensor, augment: Augment) -> Float[Tensor, "b c h w"]:
    """Images moved by whole pixels and mirrored, in one reading."""
    c, height, width = pixels.shape[1:]
    rows, columns = (torch.arange(n, device=pixels.device).expand(len(index), n) for n in (height, width))
    flips = ((u[:, 1], augment.flip_vertical, height), (u[:, 0], augment.flip, width))
    sides = []
    for place, shift, (draw, share, size) in zip((rows, columns), (u[:, 3], u[:, 2]), flips, strict=True):
        here = torch.where((draw < share)[:, None], size - 1 - place, place) if share > 0 else place
        if augment.crop:
            move = (shift * (2 * augment.crop + 1)).long() - augment.crop
            here = _mirror(here + move[:, None], size)
        sides.append(here)
    channels = torch.arange(c, device=pixels.device)[None, :, None, None]
    rows, columns = sides[0][:, None, :, None], sides[1][:, None, None, :]
    return pixels[index[:, None, None, None], channels, rows, columns].float()


def _resized(images: Float[Tensor, "b c h w"], u: Tensor, augment: Augment) -> Float[Tensor, "b c h w"]:
    """Crops of random size, shape and place, brought to the images' size between pixels, and mirrored."""
    assert augment.scale is not None
    area = augment.scale + (1 - augment.scale) * u[:, 4]
    ratio = torch.exp((2 * u[:, 5] - 1) * log(CROP_RATIO))
    tall, wide = ((area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1))
    down, right = (1 - tall) * (2 * u[:, 3] - 1), (1 - wide) * (2 * u[:, 2] - 1)
    mirrored = [1 - 2 * (u[:, i] < share).float() for i, share in ((0, augment.flip), (1, augment.flip_vertical))]
    zero = torch.zeros_like(tall)
    theta = torch.stack([wide * mirrored[0], zero, right, zero, tall * mirrored[1], down], 1).view(-1, 2, 3)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _box(middle: Tensor, length: Tensor, size: int) -> Tensor:
    """Which places of a side lie in a box, cut at the border."""
    place = torch.arange(size, device=middle.device)
    first, last = (middle - length / 2).round(), (middle + length / 2).round()
    return (place >= first[:, None]) & (place < last[:, None])


def _erased(x: Float[Tensor, "b c h w"], u: Tensor, share: float) -> Float[Tensor, "b c h w"]:
    """Boxes filled with the mean colour, inside of the image."""
    height, width = x.shape[2:]
    area = (ERASED_SHARE[0] + (ERASED_SHARE[1] - ERASED_SHARE[0]) * u[:, 7]) * height * width
    ratio = torch.exp((2 * u[:, 8] - 1) * log(ERASED_RATIO))
    tall, wide = (area * ratio).sqrt().clamp(max=height), (area / ratio).sqrt().clamp(max=width)
    rows = _box(tall / 2 + u[:, 9] * (height - tall), tall, height)
    columns = _box(wide / 2 + u[:, 10] * (width - wide), wide, width)
    box = rows[:, :, None] & columns[:, None, :] & (u[:, 6] < share)[:, None, None]
    return x.masked_fill(box[:, None], 0.0)


def mixing_tables(augment: Augment) -> dict[str, Tensor]:
    """What `mix` draws from."""
    return {name: beta_table(a) for name in ("mixup", "cutmix") if (a := getattr(augment, name)) > 0}


def mix(
    x: Float[Tensor, "b c h w"], other: Float[Tensor, "b c h w"], u: Tensor, augment: Augment, tables: dict[str, Tensor]
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, " b"]]:
    """Two images as one, and the share of the first (arXiv:1710.09412, arXiv:1905.04899).

    Args:
        x: Images.
        other: Their partners.
        u: Draws of each from 0 to 1, `N_MIXING` of them, of which the first is not used.
        augment: How images are mixed.
        tables: As `mixing_tables` makes them.
    """
    height, width = x.shape[2:]
    ones = torch.ones_like(u[:, 0])
    blend = beta(u[:, 1], tables["mixup"]) if augment.mixup > 0 else ones
    keep, share = blend[:, None, None].expand(-1, height, width), blend
    if augment.cutmix > 0:
        side = (1 - beta(u[:, 1], tables["cutmix"])).sqrt()
        rows = _box(u[:, 2] * height, side * height, height)
        columns = _box(u[:, 3] * width, side * width, width)
        box = rows[:, :, None] & columns[:, None, :]
        cut = (u[:, 4] < (0.5 if augment.mixup > 0 else 1.0))[:, None, None]
        keep = torch.where(cut, (~box).float(), keep)
        share = torch.where(cut[:, 0, 0], 1 - box.float().mean((1, 2)), share)
    return torch.lerp(other, x, keep[:, None]), share
