"""`mamba_ssm.utils.hf`: configuration and weights of a language model, from a folder or from the hub."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectra.errors import ConfigError

CONFIG, WEIGHTS = "config.json", "pytorch_model.bin"


def load_config_hf(model_name: str) -> dict[str, Any]:
    """The configuration, a folder's or the hub's config.json."""
    return json.loads(_file(model_name, CONFIG).read_text())


def load_state_dict_hf(model_name: str, device: Any = None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The weights, of a folder or of the hub.

    Args:
        model_name: The folder, or "owner/name".
        device: Where they go.
        dtype: What they become; None leaves them.
    """
    state = torch.load(_file(model_name, WEIGHTS), map_location="cpu", weights_only=True)
    return {name: tensor.to(device=device, dtype=dtype or tensor.dtype) for name, tensor in state.items()}


def _file(model_name: str, name: str) -> Path:
    path = Path(model_name) / name
    if path.is_file():
        return path
    try:
        hub: Any = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(
            f"'{path}' is no file; to take '{model_name}' from the hub, pip install huggingface_hub."
        ) from error
    return Path(hub.hf_hub_download(model_name, name))
