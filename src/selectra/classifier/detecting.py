"""The objects on images, by a trained detector."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import UInt8
from rich.table import Table
from torch import Tensor, nn

from selectra.classifier.left_behind import colours_of, read_trained
from selectra.classifier.reading import UnreadableError, leave_out, read_image, standardised
from selectra.classifier.segmenting import named_once
from selectra.errors import ConfigError, DataError
from selectra.report.detected import Detected

WANTED = ("classes", "colours", "img_size", "in_channels", "mean", "std")
THRESHOLD = 0.5


@dataclass(frozen=True)
class Detector:
    """A detector in evaluation mode, with what using it needs.

    Args:
        name: Of the model, for titles.
        model: Images to dictionaries of boxes, labels and scores.
        classes: Names in the order of labels.
        colours: One for each class, for pictures.
        mean: Of every channel, in shares of 255.
        std: Deviation of every channel.
    """

    name: str
    model: nn.Module
    classes: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def detector_from_run(folder: Path) -> Detector:
    """The best weights of a training, with what its run.json says of the images.

    Raises:
        DataError: There is no run, no weights, or run.json does not say what is needed.
    """
    run, about, model = read_trained(folder, WANTED)
    classes, mean, std = (tuple(about[name]) for name in ("classes", "mean", "std"))
    return Detector(run.model.name, model, classes, colours_of(about), mean, std)


def detect(trained: Detector, path: Path, device: torch.device | str = "cpu", threshold: float = THRESHOLD) -> Detected:
    """The objects on an image, surest first.

    Args:
        trained: The model.
        path: An image file.
        device: Where the model runs.
        threshold: Least score of what is given; scores below the model's own threshold are never given.

    Raises:
        ConfigError: The threshold is no share.
        DataError: The file cannot be read, or the weights are not finite.
    """
    return objects_on(trained, read_image(path, len(trained.mean)), str(path), device, threshold)


def objects_on(
    trained: Detector,
    image: UInt8[Tensor, "c h w"],
    name: str,
    device: torch.device | str = "cpu",
    threshold: float = THRESHOLD,
) -> Detected:
    """As `detect`, of pixels in memory.

    Args:
        name: Of the image, for the picture.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold={threshold}: a score is from 0 to 1")
    model = trained.model.to(device)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        # What is found of such weights is finite: nothing.
        raise DataError(f"'{trained.name}' has weights that are not finite; they are damaged or diverged.")
    x = standardised(image[None], trained.mean, trained.std)[0]
    with torch.inference_mode():
        (found,) = model([x.to(device)])
    order = found["scores"].argsort(descending=True)
    order = order[found["scores"][order] >= threshold]
    masks = (found["masks"][order, 0] >= 0.5).cpu().numpy() if "masks" in found else None
    return Detected(
        trained.name, name, image.permute(1, 2, 0).cpu().numpy(), found["boxes"][order].float().cpu().numpy(),
        found["labels"][order].cpu().numpy(), found["scores"][order].float().cpu().numpy(), masks, trained.classes,
        trained.colours, threshold,
    )  # fmt: skip


def detect_all(
    trained: Detector, paths: Sequence[Path], device: torch.device | str, threshold: float, skipped: list[str] | None
) -> list[Detected]:
    """The objects on every image.

    Args:
        skipped: Where given, files that are damaged or that the model cannot take are left out and named here.

    Raises:
        ConfigError: Pictures of two images would have one name.
        DataError: As `detect`.
    """
    named_once(paths)
    found = []
    for path in paths:
        try:
            found.append(detect(trained, path, device, threshold))
        except UnreadableError as error:
            leave_out(error, skipped)
    return found


def detected_table(found: Sequence[Detected]) -> Table:
    """How many objects of which class there are on every image, and their scores."""
    table = Table("image", "class", "objects", "scores")
    for each in found:
        name, counts = Path(each.file).name, each.counts()
        shown = [i for i in sorted(range(len(counts)), key=lambda i: -counts[i]) if counts[i]]
        for i in shown:
            scores = each.scores[each.labels == i]
            table.add_row(
                name, each.classes[i], str(counts[i]), f"{scores.min():.2f} to {scores.max():.2f}",
                end_section=i == shown[-1],
            )  # fmt: skip
            name = ""
        if not shown:
            table.add_row(name, f"nothing from {each.threshold:.0%} up", "0", "", end_section=True)
    return table
