"""The class of every pixel of images, by a trained segmentation model; images larger than memory in windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.classifier.left_behind import colours_of, read_trained
from selectra.classifier.reading import UnreadableError, leave_out, read_image, standardised
from selectra.errors import ConfigError, DataError
from selectra.report.overlay import Overlay
from selectra.tasks.sliding import sliding_scores

WANTED = ("classes", "colours", "img_size", "in_channels", "mean", "std")


@dataclass(frozen=True)
class Segmenter:
    """A segmentation model in evaluation mode, with what using it needs.

    Args:
        name: Of the model, for titles.
        model: (b, c, h, w) to scores (b, k, h, w).
        classes: Names in the order of the scores.
        colours: One for each class, for pictures.
        mean: Of every channel, in shares of 255.
        std: Deviation of every channel.
        short_side: Pixels of the shorter side that images are brought to; None leaves them.
    """

    name: str
    model: nn.Module
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    short_side: int | None = None


def segmenter_from_run(folder: Path) -> Segmenter:
    """The best weights of a training, with what its run.json says of the images.

    Raises:
        DataError: There is no run, no weights, or run.json does not say what is needed.
    """
    run, about, model = read_trained(folder, WANTED)
    classes, mean, std = (tuple(about[name]) for name in ("classes", "mean", "std"))
    return Segmenter(run.model.name, model, classes, colours_of(about), mean, std, about.get("short_side"))


def segment(trained: Segmenter, path: Path, device: torch.device | str = "cpu", window: int | None = None) -> Overlay:
    """The class of every pixel of an image.

    Args:
        trained: The model.
        path: An image file.
        device: Where the model runs.
        window: Pixels of the sides of what is seen at once, half of them from one to the next; the image and its scores
            stay in the computer's memory. None sees whole images.

    Raises:
        DataError: The file cannot be read, or scores are not finite.
    """
    image, model = read_image(path, len(trained.mean)), trained.model.to(device)
    x = standardised(_sized(image[None], trained.short_side), trained.mean, trained.std)
    with torch.inference_mode():
        if window is None:
            scores = model(x.to(device)).float().cpu()
        else:
            step = max(1, window // 2)
            scores = sliding_scores(lambda crops: model(crops).float(), x, (window, window), (step, step), device)
    if not scores.isfinite().all():
        raise DataError(f"'{trained.name}' gives scores that are not finite; its weights are damaged or diverged.")
    scores = F.interpolate(scores, image.shape[1:], mode="bilinear", align_corners=False)
    best, classes = scores.softmax(1).max(1)
    pixels = image.permute(1, 2, 0).numpy()
    return Overlay(
        trained.name, str(path), pixels, classes[0].to(torch.uint8).numpy(), trained.classes, trained.colours,
        float(best.mean()),
    )  # fmt: skip


def _sized(images: Tensor, short_side: int | None) -> Tensor:
    """As evaluation sees them."""
    if short_side is None or min(images.shape[2:]) == short_side:
        return images
    ratio = short_side / min(images.shape[2:])
    size = [max(1, round(side * ratio)) for side in images.shape[2:]]
    return F.interpolate(images, size, mode="bilinear", antialias=True)


def segment_all(
    trained: Segmenter, paths: Sequence[Path], device: torch.device | str, window: int | None, skipped: list[str] | None
) -> list[Overlay]:
    """The classes of every image's pixels.

    Args:
        skipped: Where given, files that are damaged or that the model cannot take are left out and named here.

    Raises:
        ConfigError: The window has no pixel; pictures of two images would have one name.
        DataError: As `segment`.
    """
    if window is not None and window < 1:
        raise ConfigError(f"window={window}: needs at least 1 pixel")
    named_once(paths)
    found = []
    for path in paths:
        try:
            found.append(segment(trained, path, device, window))
        except UnreadableError as error:
            leave_out(error, skipped)
    return found


def named_once(paths: Sequence[Path]) -> None:
    """Every image has a name of its own.

    Raises:
        ConfigError: Pictures of two images would have one name.
    """
    stems = [path.stem for path in paths]
    twice = next((path for i, path in enumerate(paths) if path.stem in stems[:i]), None)
    if twice is not None:
        raise ConfigError(f"two images are named '{twice.stem}', and so would their pictures be; give one at a time.")


def segmented_table(found: Sequence[Overlay]) -> Table:
    """Size, largest classes and mean probability of every image."""
    table = Table("image", "size", "largest classes", "mean probability")
    for each in found:
        shares = each.shares()
        largest = sorted(range(len(shares)), key=lambda i: -shares[i])[:3]
        words = ", ".join(f"{each.classes[i]} {shares[i]:.0%}" for i in largest if shares[i] > 0)
        height, width = each.labels.shape
        table.add_row(Path(each.file).name, f"{width} x {height}", words, f"{each.probability:.1%}")
    return table
