"""Language models on disk, in the Hugging Face layout: config.json and safetensors, in one file or in shards.

Nothing is downloaded, and nothing in a folder is executed: pickles are read by PyTorch's restricted reader.
"""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from selectra.errors import ConfigError, DataError
from selectra.language.hugging_face import SOURCES, TOKENS
from selectra.language.model import LanguageModel
from selectra.official import from_official, read_dtype
from selectra.pretrained import read_state
from selectra.spec import nearest

CONFIG, WEIGHTS, INDEX, PICKLE = "config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
GENERATION = "generation_config.json"
# The largest file, as Hugging Face has it.
LARGEST = "5GB"
MAMBA_SSM = "state-spaces/mamba:MambaLMHeadModel"


def save_pretrained(model: LanguageModel, folder: str | Path, *, max_shard_size: int | str = LARGEST) -> None:
    """Write a model as Hugging Face keeps it, so that `transformers` loads it too where it has that model.

    Args:
        model: The model.
        folder: Where; it is made.
        max_shard_size: The largest file, in bytes or such as "500MB"; larger models become several, with an index.

    Raises:
        ConfigError: The layout has no place for what this model has, or shards need `huggingface_hub`.
        DataError: There is no room, or no right to write.
    """
    config, state = model.hugging_face()
    folder = Path(folder)
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    # Where they are not said, `transformers` has tokens of its own choice.
    tokens = {**dict.fromkeys(TOKENS), **model.special_tokens}
    text = json.dumps(_plain({**tokens, **config, "dtype": dtype}), indent=2, sort_keys=True)
    # Parts of one tensor would be taken for the same weight twice.
    whole = {key: value.detach().contiguous() for key, value in state.items()}
    whole = {k: v.clone() if v.untyped_storage().nbytes() != v.nbytes else v for k, v in whole.items()}
    whole = {key: value.cpu() for key, value in whole.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(whole, folder, max_shard_size)
        (folder / CONFIG).write_text(text + "\n")
    except (SafetensorError, OSError) as error:
        reason = str(error).rpartition("I/O error: ")[2]
        raise DataError(
            f"the model could not be written into '{folder}': {reason}; what is there may not be whole."
        ) from error


def _write(whole: dict[str, Tensor], folder: Path, max_shard_size: int | str) -> None:
    """Write weights, in one file or several, and remove those of a model that was here before."""
    if max_shard_size == LARGEST and sum(value.nbytes for value in whole.values()) <= 5e9:
        save_file(whole, folder / WEIGHTS, {"format": "pt"})
        # Shards take the place of a single file by themselves.
        for path in [folder / INDEX, *folder.glob("model-*-of-*.safetensors")]:
            path.unlink(missing_ok=True)
    else:
        _hub().save_torch_state_dict(whole, folder, max_shard_size=max_shard_size)


def from_pretrained(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> LanguageModel:
    """A model from a folder in Hugging Face's layout or mamba_ssm's, ready for evaluation.

    Its weights are made in its type on its device, and nowhere else beside the files' own.

    Args:
        folder: Holds config.json and weights.
        device: Where the model is made; by default the CPU.
        dtype: Its type; by default that of the configuration, else that of the weights.

    Raises:
        DataError: Files are missing, damaged, would run code, or do not fit the configuration.
        ConfigError: The configuration is of an unknown layout, or has options that are not supported.
    """
    folder = Path(folder)
    config = read_config(folder)
    source = source_of(config, folder)
    state = read_weights(folder)
    stored = config.pop("torch_dtype", None)
    wanted = read_dtype(dtype) or config.get("dtype") or stored or _common_dtype(state)
    _require_vocabulary(config, state)
    found = from_official(source, {**config, "dtype": wanted}, state, device="cpu" if device is None else device).model
    assert isinstance(found, LanguageModel)
    ends = sorted(end_tokens(folder))
    found.special_tokens["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    return found


def end_tokens(folder: Path) -> set[int]:
    """The tokens that end a text, as the model's files say.

    Raises:
        DataError: A file says something else.
    """
    found = read_config(folder).get("eos_token_id")
    if (folder / GENERATION).is_file():
        found = read_config(folder, GENERATION).get("eos_token_id", found)
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ends):
        raise DataError(
            f"'{folder}': eos_token_id is {found!r}; it must be the id of a token, a list of them, or null."
        )
    return set(ends)


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """What config.json, or another such file, holds.

    Raises:
        DataError: It is missing, or no JSON object.
    """
    path = folder / name
    if not path.is_file():
        raise DataError(f"there is no '{path}'; a model's folder holds {CONFIG} and {WEIGHTS}.")
    try:
        config = json.loads(path.read_text(), object_hook=_number)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"'{path}' holds no JSON object.")
    return config


def _plain(value: Any) -> Any:
    """As Hugging Face writes numbers that JSON has none for."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    return value


def _number(value: dict[str, Any]) -> Any:
    """The number that such an object stands for."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def source_of(config: dict[str, Any], folder: Path) -> str:
    """The official class that a configuration is of.

    Raises:
        ConfigError: None that is known.
    """
    # Models say their type when they are imported.
    importlib.import_module("selectra.models")
    if "model_type" not in config and {"d_model", "n_layer"} <= config.keys():
        return MAMBA_SSM
    kind = str(config.get("model_type"))
    if kind not in SOURCES:
        raise ConfigError(
            f"'{folder / CONFIG}' is of a layout that is not known: model_type {config.get('model_type')!r}; there are "
            f"{', '.join(sorted(SOURCES))}, and mamba_ssm's, which has none.{nearest(kind, SOURCES)}"
        )
    return SOURCES[kind]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a folder.

    Raises:
        DataError: There are none, a shard is missing, a file is damaged or would run code.
    """
    # In the order in which `transformers` looks.
    if (folder / WEIGHTS).is_file():
        return _read_file(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_shards(folder)
    if (folder / PICKLE).is_file():
        return read_state(folder / PICKLE)
    raise DataError(f"'{folder}' has no weights: none of {WEIGHTS}, {INDEX} and {PICKLE}.")


def _read_shards(folder: Path) -> dict[str, Tensor]:
    try:
        where: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        names = sorted(set(where.values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"'{folder / INDEX}' is no index of shards: {error}") from error
    foreign = [name for name in names if Path(name).name != name]
    if foreign:
        raise DataError(f"'{folder / INDEX}' names '{foreign[0]}', which is not in the folder itself.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"'{folder}' lacks {', '.join(missing[:4])}{' and more' * (len(missing) > 4)}, "
            f"{len(missing)} of {len(names)} shards that its index names."
        )
    state: dict[str, Tensor] = {}
    for name in names:
        state |= _read_file(folder / name)
    lost = sorted(where.keys() - state.keys())
    if lost:
        raise DataError(f"'{folder}' has no '{lost[0]}' in '{where[lost[0]]}', where its index says it is.")
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"'{path}' cannot be read as weights: {error}") from error


def _common_dtype(state: dict[str, Tensor]) -> torch.dtype | None:
    """The type of most of the weights."""
    sizes: dict[torch.dtype, int] = {}
    for value in state.values():
        if value.is_floating_point():
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _require_vocabulary(config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Say a vocabulary that does not fit in words of its own, not as the shape of a matrix."""
    for key, value in state.items():
        multiple = config.get("pad_vocab_size_multiple", 1) if "model_type" not in config else 1
        size = config.get("vocab_size", len(value))
        if not (isinstance(size, int) and isinstance(multiple, int) and multiple > 0):
            # What is no number has no shape to compare; the configuration's reader says so.
            return
        vocab = -(-size // multiple) * multiple
        if key.rpartition(".")[0].endswith(("embedding", "embeddings", "embed_tokens")) and len(value) != vocab:
            raise DataError(
                f"the configuration's vocabulary has {vocab} tokens and '{key}' has {len(value)}: "
                "configuration and weights are of different models."
            )


def _hub() -> Any:
    try:
        return importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError("saving in shards needs huggingface_hub: pip install 'selectra[language]'.") from error
