"""What trainings on one GPU share: rows and tokens that lie there once for all cells on the same data."""

from typing import Any

import torch

from selectra.compare.cells import Cell
from selectra.compare.on_device import Resident
from selectra.data.held_text import HeldText, hold
from selectra.data.windows import Windows
from selectra.registry import models
from selectra.spec import Spec


def kind_of(cell: Cell) -> str:
    """What the cell's model works on."""
    return models.entry(cell.run.model.name).kind


class Residents:
    """Rows on the device, one copy for all cells on the same data."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[Any, Resident] = {}
        self.texts: dict[Spec, HeldText] = {}

    def text(self, cell: Cell, data: Any) -> HeldText:
        """The tokens of a data set."""
        if cell.run.data not in self.texts:
            self.texts[cell.run.data] = hold(data, self.device)
            torch.cuda.synchronize(self.device)
        return self.texts[cell.run.data]

    def __call__(self, cell: Cell, windows: Windows) -> Resident:
        spec = cell.run.data
        same = tuple(pair for pair in spec.pairs if pair[0] not in ("seq_len", "horizon"))
        key = (spec.name, same, cell.variates)
        if key not in self.found:
            self.found[key] = Resident.of(windows, self.device)
            torch.cuda.synchronize(self.device)
        return self.found[key]
