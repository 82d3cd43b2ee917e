"""The record's numbers as TensorBoard shows them."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selectra.errors import ConfigError

FOLDER = "tensorboard"
# Seconds between two steps that are written: the record has all of them, and a picture needs no more.
PAUSE = 0.5


class Board:
    """Writes steps and evaluations into a folder for TensorBoard.

    Args:
        folder: Where.
        first: Steps that are done; what an interrupted training wrote of later ones is not shown.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise ConfigError(
                "TensorBoard is not installed: pip install 'selectra[scale]', or leave --tensorboard out."
            ) from error
        # Step `first` itself is written.
        self._writer = SummaryWriter(str(folder), purge_step=first + 1, flush_secs=10)
        self._written = 0.0

    def write(self, event: str, values: Mapping[str, Any]) -> None:
        """Add what is a number of one line of the record."""
        if event not in ("step", "metrics"):
            return
        now = time.monotonic()
        if event == "step" and now - self._written < PAUSE:
            return
        self._written = now if event == "step" else self._written
        group = "train" if event == "step" else values["split"]
        for name, value in values.items():
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
                self._writer.add_scalar(f"{group}/{name}", value, values["step"])

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
