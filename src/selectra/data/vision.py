"""The optional packages for images, imported when they are needed."""

import importlib
from typing import Any

from selectra.errors import ConfigError


def vision(module: str) -> Any:
    """A module of the extra "vision".

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs {error.name}, which is not installed: pip install 'selectra[vision]'."
        ) from error
