"""The images of a part on which a trained segmentation model finds each class best and worst."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from selectra.errors import ConfigError
from selectra.registry import models
from selectra.report.cases import Case, Cases, Picture
from selectra.tasks.segmentation import PixelEvaluator
from selectra.train.checkpoint import WEIGHTS, load_weights
from selectra.train.job import build
from selectra.train.parallel import pick_device
from selectra.train.precision import Precision, autocast
from selectra.train.record import read_run

KIND = "segmentation"
IGNORED = 255
# Of the pixels of an image that count: below this share of a class, its IoU says little.
LEAST_SHARE = 0.002
# Best and worst cases of each class, and where there are more classes than this, one of each.
EACH, MANY = 2, 24


def require_segmentation(out: Path) -> None:
    """Refuse folders of other trainings.

    Raises:
        ConfigError: The training is of another kind.
    """
    run = read_run(out)
    kind = models.entry(run.model.name).kind
    if kind != KIND:
        raise ConfigError(f"--page shows cases of segmentation, and '{out}' holds a training of kind '{kind}'.")


def cases_of(out: Path, part: str, metrics: dict[str, float], device: torch.device | None = None) -> Cases:
    """Look at every image of a part, and keep the best and worst of each class by the IoU in that image.

    Args:
        out: Folder of a training.
        part: "train", "val" or "test".
        metrics: Of this part, as `evaluate_job` gives them.
        device: Where the model runs; by default as in training.

    Raises:
        ConfigError: The training is not of segmentation.
        DataError: There are no weights.
    """
    require_segmentation(out)
    run = read_run(out)
    built = build(run)
    load_weights(out / WEIGHTS, built.model)
    device = pick_device(run.train.device) if device is None else device
    evaluator = built.task.evaluator()
    assert isinstance(evaluator, PixelEvaluator)
    look = _Look(built.model.to(device).eval(), evaluator, built.data, part, device, run.train.precision)
    table = np.stack([look.ious(i) for i in range(len(look.rows))])
    classes: tuple[str, ...] = tuple(built.data.classes)
    each = EACH if len(classes) <= MANY else 1
    chosen = {name: best_and_worst(table[:, number], each) for number, name in enumerate(classes)}
    needed = sorted({i for best, worst in chosen.values() for i in (*best, *worst)})
    pictures = {i: look.picture(i) for i in needed}

    def shown(number: int, rows: Sequence[int]) -> tuple[Case, ...]:
        return tuple(Case(pictures[i], float(table[i, number])) for i in rows)

    return Cases(
        run.name, run.model.name, built.data.listing.where, part, len(look.rows), metrics["miou"], classes,
        tuple(built.data.coding.colours), tuple(metrics[f"iou {name}"] for name in classes),
        tuple((shown(k, best), shown(k, worst)) for k, (best, worst) in enumerate(chosen.values())), LEAST_SHARE,
    )  # fmt: skip


def best_and_worst(ious: np.ndarray[Any, Any], each: int) -> tuple[list[int], list[int]]:
    """Rows of the highest and of the lowest values, none in both; NaN counts nowhere."""
    there = [int(i) for i in np.argsort(ious, kind="stable") if not np.isnan(ious[i])]
    each = min(each, len(there) // 2) if len(there) > 1 else len(there)
    if len(there) == 1:
        return there, []
    return there[::-1][:each], there[:each]


class _Look:
    """A model's classes of each image of a part, one image at a time."""

    def __init__(
        self, model: nn.Module, evaluator: PixelEvaluator, data: Any, part: str, device: torch.device,
        precision: Precision,
    ) -> None:  # fmt: skip
        self.model, self.evaluator, self.data, self.device = model, evaluator, data, device
        self.precision: Precision = precision
        self.windows, self.rows = data.windows(part), data.readable(part)
        if part == "train":
            # As evaluation sees images.
            self.windows.augment = None

    @torch.inference_mode()
    def both(self, i: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The true classes of an image's pixels and the model's."""
        (piece,) = self.windows[[i]].to(self.device).pieces
        with autocast(self.device, self.precision):
            scores = self.evaluator.scores(self.model, piece.x)
        if scores.shape[2:] != piece.y.shape[1:]:
            scores = nn.functional.interpolate(scores, piece.y.shape[1:], mode="bilinear", align_corners=False)
        return piece.y[0].cpu().numpy(), scores.argmax(1)[0].cpu().numpy()

    def ious(self, i: int) -> np.ndarray[Any, Any]:
        """Of each class in this image; NaN where too little of it is there."""
        true, found = self.both(i)
        count = len(self.data.classes)
        there = true != IGNORED
        pairs = np.bincount(true[there] * count + found[there], minlength=count**2).reshape(count, count)
        hit, own, taken = np.diag(pairs).astype(float), pairs.sum(1), pairs.sum(0)
        enough = own >= np.maximum(1, LEAST_SHARE * there.sum())
        return np.where(enough, hit / np.maximum(1, own + taken - hit), np.nan)

    def picture(self, i: int) -> Picture:
        """The image, its true classes and the model's."""
        row = int(self.rows[i])
        true, found = self.both(i)
        image, _ = self.data.read(row)
        return Picture(self.data.listing.names[row], image.permute(1, 2, 0).numpy(), true, found)
