"""A trained image model with what using it needs: classes, size, channels, standardisation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

# Importing the room fills the registry.
import selectra.models  # noqa: F401
from selectra.errors import ConfigError, DataError
from selectra.pretrained import load_pretrained, read_state
from selectra.registry import models
from selectra.spec import Run, Spec
from selectra.train.checkpoint import WEIGHTS, load_weights
from selectra.train.record import read_data, read_run

# What released weights were trained with.
IMAGENET_MEAN, IMAGENET_STD, IMAGENET_CROP = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875
IMAGENET_SIZE = 224
WANTED = ("classes", "img_size", "in_channels", "mean", "std")
ADVICE = "train it with `selectra train`, or give --model and --weights instead of --run."


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode.

    Args:
        name: Of the model, for titles.
        model: (b, c, h, w) to scores (b, k).
        classes: Names in the order of the scores.
        size: Height and width of its images.
        in_channels: Their channels.
        mean: Of every channel, in shares of 255.
        std: Deviation of every channel.
        crop: Share of the sides of a covering image that is seen.
    """

    name: str
    model: nn.Module
    classes: tuple[str, ...]
    size: tuple[int, int]
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0

    @property
    def least_side(self) -> int:
        """Pixels of the smallest patch that the model makes a token of."""
        embed = getattr(self.model, "patch_embed", None)
        return getattr(embed, "patch_size", None) or min(getattr(self.model, "feature_strides", (1,)))


def from_run(folder: Path) -> Trained:
    """The best weights of a training, with what its run.json says of the images.

    Raises:
        DataError: There is no run, no weights, or run.json does not say what is needed.
        ConfigError: The run is not of images.
    """
    folder = folder.parent if folder.name == "run.json" else folder
    run = read_run(folder)
    _require_images(run.model)
    about = read_data(folder) or {}
    absent = [name for name in WANTED if name not in about]
    if absent:
        raise DataError(f"'{folder / 'run.json'}' does not say {', '.join(absent)} of its images; {ADVICE}")
    size = _pair(about["img_size"])
    facts = {
        "n_classes": len(about["classes"]),
        "in_channels": about["in_channels"],
        "img_size": size[0] if size[0] == size[1] else size,
    }
    model = _built(run, facts)
    load_weights(folder / WEIGHTS, model)
    mean, std = tuple(about["mean"]), tuple(about["std"])
    return Trained(run.model.name, model.eval(), tuple(about["classes"]), size, about["in_channels"], mean, std)


def from_weights(name: str, weights: Path, classes: Path | None = None, img_size: int | None = None) -> Trained:
    """Weights from a file, as released, on images standardised as ImageNet's are.

    Args:
        name: Of the model, such as "vim_tiny".
        weights: A .safetensors, .pth or .pt file under our names or under official ones.
        classes: A text file with the name of a class in every line; without it classes are numbers.
        img_size: Pixels of the sides; by default 224.

    Raises:
        DataError: A file cannot be read, or holds weights of another model or for other than 3 channels.
        ConfigError: There is no such model of images.
    """
    spec = Spec(name)
    _require_images(spec)
    state = read_state(weights)
    count = _classes_in(state)
    if count is None:
        raise DataError(
            f"'{weights}' has no head ('head.weight'), so it gives no classes; fine-tune it with `selectra "
            f"train {name} ... train.pretrained={weights}`."
        )
    size = _pair(img_size or IMAGENET_SIZE)
    model = models.build(spec, {"n_classes": count, "img_size": size[0]})
    loaded = load_pretrained(model, weights)
    if loaded.fresh:
        raise DataError(f"'{weights}' lacks {', '.join(loaded.fresh)} of '{name}', so its classes would be random.")
    if loaded.filters:
        raise DataError(
            f"'{weights}' is of images of {_channels_in(state, loaded.filters)} channels, and --weights is for 3, "
            "standardised as ImageNet's are: a file of weights does not say how others are. Give the training's folder "
            f"instead, --run FOLDER, or fine-tune it: `selectra train {name} ... train.pretrained={weights}`."
        )
    names = tuple(map(str, range(count))) if classes is None else _names(classes, count)
    shown = models.entry(name).name
    return Trained(shown, model.eval(), names, size, 3, IMAGENET_MEAN, IMAGENET_STD, IMAGENET_CROP)


def _require_images(spec: Spec) -> None:
    kind = models.entry(spec.name).kind
    if kind != "image":
        raise ConfigError(f"'{spec.name}' is a model of kind '{kind}', and this is for models of images.")


def _built(run: Run, facts: dict[str, Any]) -> nn.Module:
    model = models.build(run.model, facts)
    assert isinstance(model, nn.Module)
    return model


def _pair(size: Any) -> tuple[int, int]:
    return (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _classes_in(state: Mapping[str, Tensor]) -> int | None:
    """How many classes the head of a state has."""
    heads = [x for key, x in state.items() if key in ("head.weight", "classifier.head.weight", "head.fc.weight")]
    return len(heads[0]) if heads else None


def _channels_in(state: Mapping[str, Tensor], filters: tuple[str, ...]) -> str:
    """How many channels the first filters of a state see, if they have our name there."""
    found = [state[key].shape[1] for key in filters if key in state]
    return str(found[0]) if found else "other than 3"


def _names(path: Path, count: int) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' cannot be read as a list of class names: {error}.") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != count:
        raise DataError(f"'{path}' names {len(names)} classes, and the weights have {count}.")
    return names
