"""The videos of a part of which a trained model of clips is surest and least sure, for each class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from selectra.classifier.cases import EACH, MANY, best_and_worst
from selectra.data.clips import ReadClips
from selectra.report.clip_cases import ClipCase, ClipCases
from selectra.tasks.clips import clip_scores
from selectra.train.checkpoint import WEIGHTS, load_weights
from selectra.train.job import build
from selectra.train.parallel import pick_device
from selectra.train.precision import autocast
from selectra.train.record import read_run

# Frames of a case.
STRIP = 4


def clip_cases_of(out: Path, part: str, device: torch.device | None = None) -> ClipCases:
    """Look at every video of a part, and keep for each class those of its own with the highest and lowest probability.

    The probability of a video is the mean over its clips, as in evaluation.

    Args:
        out: Folder of a training of models for clips.
        part: "train", "val" or "test".
        device: Where the model runs; by default as in training.

    Raises:
        DataError: There are no weights.
    """
    run = read_run(out)
    built = build(run)
    load_weights(out / WEIGHTS, built.model)
    device = pick_device(run.train.device) if device is None else device
    model, data = built.model.to(device).eval(), built.data
    windows, classes = _as_evaluated(data.windows(part)), tuple(data.classes)
    found, labels = [], []
    for start in range(0, len(windows), run.train.batch_size):
        batch = windows[list(range(start, min(start + run.train.batch_size, len(windows))))].to(device)
        with torch.inference_mode(), autocast(device, run.train.precision):
            found.append(clip_scores(model, batch, len(classes)).softmax(1).cpu())
        labels.append(batch.y.cpu())
    shares, true = torch.cat(found).double().numpy(), torch.cat(labels).numpy()
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (true, shares.argmax(1)), 1)
    look = _Look(data, windows, shares, classes)
    each = EACH if len(classes) <= MANY else 1

    def of_class(number: int) -> tuple[tuple[ClipCase, ...], tuple[ClipCase, ...]]:
        best, worst = best_and_worst(np.where(true == number, shares[:, number], np.nan), each)
        return look.cases(best, number), look.cases(worst, number)

    where = data.listing.where if hasattr(data, "listing") else run.data.name
    cases = tuple(of_class(number) for number in range(len(classes)))
    return ClipCases(run.name, run.model.name, where, part, data.facts["n_frames"], classes, confusion, cases)


def _as_evaluated(windows: Any) -> Any:
    """A part without the random views of training."""
    if isinstance(windows, ReadClips):
        windows.training = False
    else:
        windows.augment = None
    return windows


def strip_of(clips: Float[Tensor, "v c t h w"], views: int, mean: Sequence[float], std: Sequence[float]) -> Any:
    """Frames (k, h, w, 3) of bytes from the first to the last of the middle clip of a video, and their numbers from 1.

    Args:
        clips: The video's, standardised: of each place in it all crops.
        views: Places.
        mean: Of every channel, in shares of 255.
        std: Deviation of every channel.
    """
    crops = len(clips) // views
    clip = clips[(views // 2) * crops + crops // 2]
    chosen = np.unique(np.linspace(0, clip.shape[1] - 1, STRIP).round().astype(int))
    pixels = clip[:, torch.from_numpy(chosen)] * torch.tensor(std).view(-1, 1, 1, 1)
    pixels = ((pixels + torch.tensor(mean).view(-1, 1, 1, 1)) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(1, 2, 3, 0).numpy(), tuple((chosen + 1).tolist())


class _Look:
    """Videos of a part by their number, as cases."""

    def __init__(self, data: Any, windows: Any, shares: np.ndarray[Any, Any], classes: tuple[str, ...]) -> None:
        self.data, self.windows, self.shares, self.classes = data, windows, shares, classes
        self.about = data.describe()

    def cases(self, rows: Sequence[int], number: int) -> tuple[ClipCase, ...]:
        """Of these rows, which are of the class of this number."""
        return tuple(self._case(i, number) for i in rows)

    def _case(self, i: int, number: int) -> ClipCase:
        about, clips = self.about, self.windows[[i]].to("cpu").x
        frames, numbers = strip_of(clips, about["views"], about["mean"], about["std"])
        found = int(self.shares[i].argmax())
        return ClipCase(
            self._name(i), frames, numbers, self.classes[found], float(self.shares[i, found]),
            float(self.shares[i, number]),
        )  # fmt: skip

    def _name(self, i: int) -> str:
        if isinstance(self.windows, ReadClips):
            return self.data.listing.names[int(self.windows.rows[i])]
        return f"clip {i + 1}"
