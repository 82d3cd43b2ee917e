"""Weights from a file into an image model: read safely, under official or own names, fitted to another task.

A file may hold the state itself or have it under "model", "state_dict" or another usual name, and keys may have the
prefix of a wrapper. Positions are resized to the model's grid, a head for other classes is left as it starts, filters
of other channels are summed or repeated, those of images see the middle frame of a clip's patch; whatever else does not
fit is an error.
"""

import errno
import io
import math
import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from selectra.errors import DataError
from selectra.layers.image import resize_positions

# Where files hold the state, in the order in which these are looked for.
CONTAINERS = ("model", "state_dict", "model_state_dict", "module", "model_ema", "state_dict_ema")
WRAPPERS = ("module.", "_orig_mod.", "model.")
HEADS = ("head.", "aux_head.")
# What only a network above a backbone of ours has.
DECODERS = ("network.", "decoder.", "levels.", "backbone.stages.", "backbone.layers.", "backbone.body.")
MOST_SHOWN = 8
POSITIONS = ("pos_embed", "body.pos_embed")
# In the metadata of files of weights: rows and columns of the learned positions.
GRID = "grid"
DAMAGED = (
    "cannot be read as weights: it is damaged, cut short, or not what torch.save writes. Copy or download it anew."
)
OTHER_GRIDS = (
    " Positions that are not of a square do not say their rows and columns: give the training's folder (--run FOLDER), "
    "build the model for images of that size (data.img_size=HEIGHT,WIDTH), or, in Python, tell "
    "selectra.pretrained.load_pretrained(model, FILE, grid=(rows, columns))."
)
# Settings that official trainings save beside their weights; they are read as dictionaries, which run nothing.
SETTINGS = ("argparse.Namespace", "yacs.config.CfgNode")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
# What a pickle of tensors and plain values asks for.
OF_TENSORS = re.compile(
    r"torch\._utils\.\w+|torch\.(storage\.)?\w+(Storage|Tensor)|collections\.(OrderedDict|Counter)"
    r"|(__builtin__|builtins)\.(set|bytearray|complex)|_codecs\.encode"
)
# PyTorch's reader meets bytes that are no pickle with whatever they happen to lead it to.
UNREADABLE = (
    pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError,
    ArithmeticError, AssertionError, struct.error,
)  # fmt: skip


class Loaded(NamedTuple):
    """What became of a model's parameters."""

    resized: tuple[str, ...]
    """Positions of another grid and filters of other channels or frames."""
    fresh: tuple[str, ...]
    """A head for other classes, and positions in time where the file is of images: they stay as they were."""

    @property
    def filters(self) -> tuple[str, ...]:
        """Of what was resized, the first filters, of other channels or frames; the rest are positions."""
        return tuple(key for key in self.resized if key.endswith(".weight"))


def load_pretrained(
    model: nn.Module, source: str | Path | Mapping[str, Tensor], grid: tuple[int, int] | None = None
) -> Loaded:
    """Load an image model's weights in place.

    Args:
        model: One of ours; of one with a backbone, that takes the weights of a classifier.
        source: A `.safetensors`, `.pth` or `.pt` file, or a state; keys are ours or those of the official code.
        grid: Rows and columns of the source's positions, where they are not of a square and not of this model's grid;
            files that trainings of ours write say it themselves.

    Raises:
        DataError: The file cannot be read or would run code; the state lacks parameters, or has others or other shapes.
    """
    name = "the state" if isinstance(source, Mapping) else str(source)
    state = strip(dict(source)) if isinstance(source, Mapping) else read_state(Path(source))
    if grid is None and not isinstance(source, Mapping):
        grid = stored_grid(Path(source))
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and not any(key.startswith(DECODERS) for key in state):
        # Of a classifier: what stands above the backbone starts as it is.
        model = backbone
    fitted, loaded = fit_state(model, state, name, grid)
    model.load_state_dict(fitted)
    return loaded


def fit_state(
    model: nn.Module, given: Mapping[str, Tensor], name: str = "the state", grid: tuple[int, int] | None = None
) -> tuple[dict[str, Tensor], Loaded]:
    """A state in the names and shapes of an image model, whole: what the model starts anew is as it is there.

    Args:
        model: One of ours.
        given: A state under our names or those of the official code; parts that the model has dropped may be in it.
        name: Of the state, for messages.
        grid: As of `load_pretrained`.

    Raises:
        DataError: It lacks parameters, or has others or other shapes.
    """
    ours, state = model.state_dict(), dict(given)
    if hasattr(model, "from_official_keys"):
        renamed = model.from_official_keys(state)  # pyright: ignore[reportCallIssue]
        # Some keys are alike in both: the names of more parameters are the right ones.
        state = renamed if len(renamed.keys() & ours.keys()) > len(state.keys() & ours.keys()) else state
    fresh = tuple(sorted(key for key in ours if _is_fresh(state, ours, key)))
    resized = []
    for key in sorted(state.keys() & ours.keys() - set(fresh)):
        owner, inner = _owner(model, key)
        is_of_another_grid = inner in POSITIONS and grid is not None and grid != getattr(owner, "grid", grid)
        if state[key].shape != ours[key].shape or is_of_another_grid:
            fitted = _fit(owner, inner, state[key], ours[key], grid)
            if fitted is not None:
                state[key] = fitted
                resized.append(key)
    dropped: set[str] = getattr(model, "pruned", set())
    state = {key: value for key, value in state.items() if key in ours or key not in dropped}
    _require_fitting(name, type(model).__name__, state, ours, fresh)
    return {key: ours[key] if key in fresh else state[key] for key in ours}, Loaded(tuple(resized), fresh)


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The image model, be it below a decoder or a detector, that a parameter is of, and its name there."""
    owner, inner, module, rest = model, key, model, key
    while "." in rest:
        name, _, rest = rest.partition(".")
        found = getattr(module, name, None)
        if not isinstance(found, nn.Module):
            break
        module = found
        if hasattr(module, "keep_features"):
            owner, inner = module, rest
    return owner, inner


def grid_in(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of a model's learned positions, or of those of the model below it."""
    found = (getattr(module, "grid", None) for module in model.modules())
    return next((grid for grid in found if isinstance(grid, tuple)), None)


def stored_grid(path: Path) -> tuple[int, int] | None:
    """Rows and columns of the positions in a file, if it says them, as those that trainings of ours write do."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        said = (file.metadata() or {}).get(GRID, "")
    found = re.fullmatch(r"(\d+),(\d+)", said)
    return None if found is None else (int(found[1]), int(found[2]))


def read_state(path: Path) -> dict[str, Tensor]:
    """A file's state, without wrappers' prefixes. Pickles are read by PyTorch's restricted reader, which runs no code.

    Raises:
        DataError: It is no such file, is damaged, or would run code.
    """
    if path.is_dir():
        inside = sorted(each.name for each in path.iterdir() if each.suffix in SUFFIXES)
        raise DataError(f"'{path}' is a folder; name a file of weights{_listed(inside)}.")
    if not path.is_file():
        raise DataError(f"there is no file '{path}'.")
    try:
        if path.suffix == ".safetensors":
            return strip(load_file(path))
        with torch.serialization.safe_globals([(OrderedDict, name) for name in SETTINGS]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError) as error:
        # PyTorch's reader looks for the end of an archive before the start of a file that is cut short.
        is_cut = isinstance(error, OSError) and error.errno == errno.EINVAL
        raise DataError(f"'{path}' {DAMAGED if is_cut else f'cannot be read as weights: {error}'}") from error
    except UNREADABLE as error:
        # PyTorch's own words for all of these are advice to read the file without care.
        wanted = {name for name in _globals_in(path) if name not in SETTINGS and not OF_TENSORS.fullmatch(name)}
        if isinstance(error, pickle.UnpicklingError) and wanted:
            raise DataError(
                f"'{path}' holds more than weights, and reading it could run its code: it asks for "
                f"{', '.join(sorted(wanted)[:MOST_SHOWN])}. "
                "Save the weights alone: torch.save(model.state_dict(), FILE)."
            ) from error
        raise DataError(f"'{path}' {DAMAGED}") from error
    for name in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping) or not any(isinstance(value, Tensor) for value in content.values()):
        raise DataError(f"'{path}' holds no state: a mapping of names to tensors, or one of {', '.join(CONTAINERS)}.")
    return strip({str(key): value for key, value in content.items() if isinstance(value, Tensor)})


def _listed(names: Sequence[str]) -> str:
    return f" in it, such as '{names[0]}'" if names else "; it holds none, no " + ", ".join(SUFFIXES)


def _globals_in(path: Path) -> set[str]:
    """Names that a file's pickles ask for, as far as their text tells; nothing is run. None if it holds no pickle."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
                parts = [archive.read(name) for name in names]
        else:
            parts = [path.read_bytes()]
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError):
        return set()
    return {name for part in parts for name in _globals(io.BytesIO(part))}


def _globals(stream: io.BytesIO) -> Iterator[str]:
    """Of the pickles that a stream begins with; older files are several, and tensors behind them."""
    while True:
        found, texts = [], []
        try:
            for code, value, _ in pickletools.genops(stream):
                if code.name in ("GLOBAL", "INST"):
                    found.append(str(value).replace(" ", "."))
                elif code.name == "STACK_GLOBAL":
                    found.append(".".join(texts[-2:]))
                elif isinstance(value, str):
                    texts.append(value)
        except ValueError:
            return
        yield from found


def strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without prefixes that all of its keys have from wrappers."""
    for wrapper in WRAPPERS:
        if state and all(key.startswith(wrapper) for key in state):
            return strip({key.removeprefix(wrapper): value for key, value in state.items()})
    return state


def _is_fresh(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], key: str) -> bool:
    """Whether a parameter starts anew: a head without its like in the state; positions in time if that is of images."""
    if key == "time_embed":
        patches = state.get("patch_embed.proj.weight")
        return key not in state and patches is not None and patches.dim() == 4
    return key.startswith(HEADS) and (key not in state or state[key].shape != ours[key].shape)


def _fit(model: nn.Module, key: str, value: Tensor, own: Tensor, grid: tuple[int, int] | None) -> Tensor | None:
    """The value in our shape, or None where it has no place."""
    if hasattr(model, "fit_weight"):
        fitted = model.fit_weight(key, value, own, grid)  # pyright: ignore[reportCallIssue]
        if fitted is not None:
            return fitted
    if key == "pos_embed" and value.dim() == 3 and value.shape[2] == own.shape[2]:
        return _fit_positions(model, value, grid)
    if key == "patch_embed.proj.weight" and value.dim() == 4 and own.dim() == 5:
        value = inflate(value, own.shape[2])
    if key == "time_embed" and value.dim() == 3 and value.shape[2] == own.shape[2]:
        return nn.functional.interpolate(value.transpose(1, 2).float(), own.shape[1], mode="linear").transpose(1, 2)
    if (
        key.startswith(("patch_embed.", "stages.0.embed.", *getattr(model, "first_filters", ())))
        and value.dim() == own.dim() >= 4
    ):
        others_fit = value.shape[0] == own.shape[0] and value.shape[2:] == own.shape[2:]
        return fit_channels(value, own.shape[1]) if others_fit else None
    return None


def _fit_positions(model: Any, table: Float[Tensor, "1 m d"], grid: tuple[int, int] | None) -> Tensor | None:
    """Positions of this grid, or of a square one, at the model's."""
    new = math.prod(model.grid)
    n_tokens = table.shape[1] - len(model.slots(new))
    side = math.isqrt(max(n_tokens, 0))
    rows, columns = grid or (side, side)
    if n_tokens < 1 or rows * columns != n_tokens:
        return None
    return resize_positions(table, (rows, columns), model.grid, model.slots(n_tokens), model.slots(new))


def inflate(weight: Float[Tensor, "d c h w"], frames: int) -> Float[Tensor, "d c t h w"]:
    """Filters of images for clips: they see the middle frame of a patch and no other (VideoMamba's code)."""
    others = weight.new_zeros(*weight.shape[:2], frames, *weight.shape[2:])
    others[:, :, frames // 2] = weight
    return others


def fit_channels(weight: Float[Tensor, "d c *k"], in_channels: int) -> Float[Tensor, "d c2 *k"]:
    """Filters for another number of channels: summed for one, else repeated and scaled so that sums keep their size."""
    c = weight.shape[1]
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = torch.cat([weight] * -(-in_channels // c), dim=1)[:, :in_channels]
    return repeated * (c / in_channels)


def _require_fitting(
    name: str, kind: str, state: dict[str, Tensor], ours: dict[str, Tensor], fresh: tuple[str, ...]
) -> None:
    missing = sorted(ours.keys() - state.keys() - set(fresh))
    unknown = sorted(key for key in state.keys() - ours.keys() if not key.startswith(HEADS))
    shapes = [
        f"'{key}' {tuple(state[key].shape)} for {tuple(ours[key].shape)}"
        for key in sorted(ours.keys() & state.keys() - set(fresh))
        if state[key].shape != ours[key].shape
    ]
    problems = [
        f"{what} {', '.join(keys[:MOST_SHOWN])}{f' and {len(keys) - MOST_SHOWN} more' * (len(keys) > MOST_SHOWN)}"
        for what, keys in (("it lacks", missing), ("it has unknown", unknown), ("shapes differ:", shapes))
        if keys
    ]
    if problems:
        hint = OTHER_GRIDS if "'pos_embed'" in str(shapes) else ""
        raise DataError(
            f"{name} does not fit this {kind}: {'; '.join(problems)}. Is it of another model or size?{hint}"
        )
