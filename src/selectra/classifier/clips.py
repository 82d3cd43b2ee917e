"""The likeliest classes of videos, by a training of clips."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from selectra.classifier.left_behind import kind_of, read_trained
from selectra.classifier.predicting import Prediction
from selectra.data.clip_batches import Sampling
from selectra.data.clip_files import REMEDY, SUFFIXES, FaultyClipError, ShortClipError, Video
from selectra.data.clips import Crops, Short, require_length, test_views
from selectra.errors import DataError

KIND = "video"
WANTED = ("classes", "n_frames", "sampling", "stride", "views", "crops", "short_clips", "img_size", "mean", "std")


@dataclass(frozen=True)
class ClipModel:
    """A model of clips in evaluation mode, with what using it needs.

    Args:
        name: Of the model, for titles.
        model: (b, c, t, h, w) to scores (b, k).
        classes: Names in the order of the scores.
        sampling: Which frames its clips are made of.
        size: Height and width of a clip.
        crops: Of each clip.
        short: What becomes of videos that are too short.
        mean: Of every channel, in shares of 255.
        std: Deviation of every channel.
    """

    name: str
    model: nn.Module
    classes: tuple[str, ...]
    sampling: Sampling
    size: tuple[int, int]
    crops: Crops
    short: Short
    mean: tuple[float, ...]
    std: tuple[float, ...]


def is_video(folder: Path) -> bool:
    """Whether a folder holds a training of a model of clips.

    Raises:
        DataError: It holds no training.
    """
    return kind_of(folder) == KIND


def clip_model_from_run(folder: Path) -> ClipModel:
    """The best weights of a training, with what its run.json says of the clips.

    Raises:
        DataError: There is no run, no weights, or run.json does not say what is needed.
    """
    run, about, model = read_trained(folder, WANTED, of="clips")
    height, width = about["img_size"]
    classes, mean, std = (tuple(about[name]) for name in ("classes", "mean", "std"))
    sampling = Sampling(about["sampling"], about["n_frames"], about["stride"], about["views"])
    return ClipModel(
        run.model.name, model, classes, sampling, (height, width), about["crops"], about["short_clips"], mean, std
    )


def predict_clips(
    trained: ClipModel,
    paths: Sequence[Path],
    top: int = 5,
    device: torch.device | str = "cpu",
    skipped: list[str] | None = None,
) -> list[Prediction]:
    """The likeliest classes of every video, by the mean probability of its clips.

    Args:
        trained: The model.
        paths: Video files, or arrays (t, h, w, 3) of bytes in .npy files.
        top: How many classes, if there are so many.
        device: Where the model runs.
        skipped: Where given, videos that are damaged or too short are left out and named here.

    Raises:
        DataError: A video cannot be read or is too short, or scores are not finite.
    """
    model, top = trained.model.to(device), min(top, len(trained.classes))
    mean_std = (torch.tensor(trained.mean), torch.tensor(trained.std))
    found = []
    for path in paths:
        _require_file(path)
        try:
            video = Video(path, str(path))
            require_length(video, trained.sampling, trained.short)
            views = test_views(video, trained.sampling, trained.size, trained.crops, mean_std)
        except (FaultyClipError, ShortClipError) as error:
            reason = _reason(error)
            if skipped is None:
                advice = "leave it out, or go on without such videos: --skip-corrupt"
                raise type(error)(f"{reason}; {advice}.") from error
            skipped.append(f"{reason}.")
            continue
        with torch.inference_mode():
            scores = model(views.to(device)).float()
        if not scores.isfinite().all():
            raise DataError(f"'{trained.name}' gives scores that are not finite; its weights are damaged or diverged.")
        values, places = scores.softmax(1).mean(0).topk(top)
        found.append(Prediction(path, tuple(trained.classes[i] for i in places.tolist()), tuple(values.tolist())))
    return found


def _reason(error: DataError) -> str:
    """What is wrong with a video, without the settings of a training by which such ones are passed over."""
    return str(error).removesuffix(REMEDY).partition(": ask for fewer frames")[0].rstrip(" .")


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise DataError(f"there is no file '{path}'.")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"'{path}' is no video: names end in {', '.join(sorted(SUFFIXES))}.")
