"""What a training left behind, for using its model: the best weights, the run, and what run.json says of the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

# Importing the room fills the registry.
import selectra.models  # noqa: F401
from selectra.errors import DataError
from selectra.registry import models
from selectra.spec import Run
from selectra.train.checkpoint import WEIGHTS, load_weights
from selectra.train.record import read_data, read_run


def kind_of(folder: Path) -> str:
    """The kind of model of which a folder holds a training, such as "segmentation".

    Raises:
        DataError: It holds no training.
    """
    return models.entry(read_run(_folder(folder)).model.name).kind


def read_trained(folder: Path, wanted: Sequence[str], of: str = "images") -> tuple[Run, dict[str, Any], nn.Module]:
    """A training's run, what its run.json says of the data, and its model in evaluation mode.

    Args:
        folder: Of the training, or its run.json.
        wanted: What run.json must say: "classes" and "img_size" (height and width) among it.
        of: What the data is, for messages.

    Raises:
        DataError: There is no run, no weights, or run.json does not say what is wanted.
    """
    folder = _folder(folder)
    run, about = read_run(folder), read_data(folder) or {}
    absent = [name for name in wanted if name not in about]
    if absent:
        raise DataError(f"'{folder / 'run.json'}' does not say {', '.join(absent)} of its {of}; train it again.")
    height, width = about["img_size"]
    facts = {
        "n_classes": len(about["classes"]),
        "in_channels": about.get("in_channels", 3),
        "img_size": height if height == width else (height, width),
    }
    if "n_frames" in wanted:
        facts["n_frames"] = about["n_frames"]
    model = models.build(run.model, facts)
    load_weights(folder / WEIGHTS, model)
    return run, about, model.eval()


def colours_of(about: dict[str, Any]) -> tuple[tuple[int, int, int], ...]:
    """The colours of the classes."""
    return tuple((red, green, blue) for red, green, blue in about["colours"])


def _folder(folder: Path) -> Path:
    return folder.parent if folder.name == "run.json" else folder
