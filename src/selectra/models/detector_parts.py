"""What stands between torchvision's detectors and a training: sizes, draws and counts that follow from the whole batch.

A batch may be shared by several processes. torchvision's losses are means over the positions or proposals of what one
process sees, so that how many these are is counted here; what it draws at random is drawn image by image.
"""

import contextlib
import importlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.errors import ConfigError

Found = dict[str, Tensor]


def tv(module: str) -> Any:
    """A module of torchvision, which is imported when the first detector is built.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"detectors are torchvision's, and {error.name} is not installed: pip install 'selectra[vision]'."
        ) from error


def wide(found: Any) -> Any:
    """Tensors, however they are packed, in float32 at least: boxes in bfloat16 would be off by whole pixels."""
    if isinstance(found, Tensor):
        return found.to(torch.promote_types(found.dtype, torch.float32)) if found.is_floating_point() else found
    if isinstance(found, dict):
        return type(found)((name, wide(value)) for name, value in found.items())
    return type(found)(wide(each) for each in found)


def widened(module: nn.Module) -> nn.Module:
    """The same module; what it gives is in float32 also under autocast."""
    module.register_forward_hook(lambda _module, _inputs, found: wide(found))
    return module


def sizes(short_side: int | None, long_side: int | None, divisible: int) -> nn.Module:
    """torchvision's first step: images of a batch side by side, zeros (the mean colour) below and right of them.

    Evaluation brings the shorter side to `short_side` pixels, the longer one to no more than `long_side`.
    """

    class Sizes(tv("models.detection.transform").GeneralizedRCNNTransform):
        """The data standardises, and gives training images their size."""

        least = (0, 0)
        """Height and width of a batch at least: images elsewhere that these ones' batch also has may be larger."""

        def max_by_axis(self, the_list: list[list[int]]) -> list[int]:
            return [max(sides) for sides in zip(super().max_by_axis(the_list), (0, *self.least), strict=True)]

        def normalize(self, image: Tensor) -> Tensor:
            return image

        def sides(self, image: Tensor) -> list[int]:
            """Height and width to which an image is brought."""
            if self.training or short_side is None:
                return list(image.shape[1:])
            ratio = short_side / min(image.shape[1:])
            if long_side is not None:
                ratio = min(ratio, long_side / max(image.shape[1:]))
            return [max(1, round(side * ratio)) for side in image.shape[1:]]

        def padded(self, image: Tensor) -> tuple[int, ...]:
            """The same with what is beside an image that stands alone."""
            return tuple(-(-side // divisible) * divisible for side in self.sides(image))

        def resize(self, image: Tensor, target: Found | None = None) -> tuple[Tensor, Found | None]:
            size = self.sides(image)
            if size == list(image.shape[1:]):
                return image, target
            return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0], target

    return Sizes(short_side or 1, long_side or 1, [0.0], [1.0], size_divisible=divisible)


def counting(head: Any) -> Any:
    """torchvision's class of FCOS' head, which also keeps how many positions its losses are means over."""

    class Counting(head):
        count: Tensor
        """Positions inside of objects that the last losses in training saw."""

        def compute_loss(self, targets: Any, head_outputs: Any, anchors: Any, matched_idxs: list[Tensor]) -> Found:
            self.count = torch.stack([(each >= 0).sum() for each in matched_idxs]).sum()
            return super().compute_loss(targets, head_outputs, anchors, matched_idxs)

    return Counting


def by_image(sampler: Any, salt: int) -> Any:
    """torchvision's sampler of positions or proposals, whose draws depend on the image alone once it has `keys`.

    Args:
        sampler: That of a network.
        salt: Tells several samplers of one network apart.
    """

    class ByImage(type(sampler)):
        keys: Sequence[int] = ()
        """A number for each image that comes next; without them draws go on as torch's own generator is."""
        count: Tensor
        """How many the last call took, over all images."""
        positive: Tensor
        """How many of these were of objects."""

        def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            keys = self.keys or [None] * len(matched_idxs)
            found = [self._of(*each) for each in zip(matched_idxs, keys, strict=True)]
            taken = [torch.stack([mask.sum() for mask in masks]).sum() for masks in zip(*found, strict=True)]
            self.positive, self.count = taken[0], taken[0] + taken[1]
            return [positive for positive, _ in found], [negative for _, negative in found]

        def _of(self, matched: Tensor, key: int | None) -> tuple[Tensor, Tensor]:
            with drawing(matched.device, None if key is None else key + salt):
                (positive,), (negative,) = super().__call__([matched])
            return positive, negative

    return ByImage(sampler.batch_size_per_image, sampler.positive_fraction)


@contextlib.contextmanager
def drawing(device: torch.device, key: int | None) -> Iterator[None]:
    """Draws on a CPU or a CUDA device begin from a key; behind it they go on as if there had been none."""
    if key is None or device.type not in ("cpu", "cuda"):
        yield
        return
    generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
    before = generator.get_state()
    generator.manual_seed(key % 2**63)
    try:
        yield
    finally:
        generator.set_state(before)
