"""The likeliest classes of images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from selectra.classifier.reading import UnreadableError, leave_out, read_image, standardised
from selectra.classifier.trained import Trained
from selectra.data.image_decode import fitted
from selectra.errors import DataError

BATCH = 32


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, likeliest first, and their probabilities."""

    path: Path
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


def predict(
    trained: Trained,
    paths: Sequence[Path],
    top: int = 5,
    device: torch.device | str = "cpu",
    skipped: list[str] | None = None,
) -> list[Prediction]:
    """The likeliest classes of every image.

    Args:
        trained: The model.
        paths: Image files.
        top: How many classes, if there are so many.
        device: Where the model runs.
        skipped: Where given, files that are damaged or that the model cannot take are left out and named here.

    Raises:
        DataError: A file cannot be read, or does not fit the model.
    """
    model, top = trained.model.to(device), min(top, len(trained.classes))
    found = []
    for start in range(0, len(paths), BATCH):
        chosen, images = [], []
        for path in paths[start : start + BATCH]:
            try:
                images.append(prepared(trained, path))
                chosen.append(path)
            except UnreadableError as error:
                leave_out(error, skipped)
        if not images:
            continue
        with torch.inference_mode():
            scores = model(torch.cat(images).to(device)).float()
        if not scores.isfinite().all():
            raise DataError(f"'{trained.name}' gives scores that are not finite; its weights are damaged or diverged.")
        values, places = scores.softmax(1).topk(top)
        for path, row, where in zip(chosen, values.tolist(), places.tolist(), strict=True):
            found.append(Prediction(path, tuple(trained.classes[i] for i in where), tuple(row)))
    return found


def prepared(trained: Trained, path: Path) -> Float[Tensor, "1 c h w"]:
    """An image as the model takes it.

    Raises:
        UnreadableError: It cannot be read, or is smaller than a patch.
        DataError: There is no such file.
    """
    image, least = read_image(path, trained.in_channels), trained.least_side
    if min(image.shape[1:]) < least:
        raise UnreadableError(
            f"'{path}' is {image.shape[2]} x {image.shape[1]} pixels (width x height), smaller than the {least} x "
            f"{least} pixels of one patch of '{trained.name}'; give a larger image."
        )
    return standardised(fitted(image, trained.size, trained.crop)[None], trained.mean, trained.std)
