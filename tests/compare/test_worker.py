"""How a GPU's slots are filled: heavy cells alone, all cells once, nothing left behind."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from selectra.compare import worker
from selectra.compare.cells import Cell
from selectra.compare.store import Store
from tests.compare.small import make_cells, write_series


class Slot:
    """Stands for a stream of a GPU: a cell takes some turns, and notes who else ran meanwhile."""

    running: tuple[Cell, ...] = ()
    most_together = 0
    seen: tuple[tuple[int, int], ...] = ()

    def __init__(self, device: torch.device, most: int) -> None:
        self.most, self.cell, self.ask_at, self.queued = most, None, 0.0, []

    def start(self, cell: Cell, *_: Any) -> None:
        self.cell, self.turns, self.ended = cell, 3 + cell.place % 3, False
        Slot.running = (*Slot.running, cell)
        together = sum(each.weight for each in Slot.running)
        Slot.seen = (*Slot.seen, (cell.weight, together))

    def move(self) -> bool:
        self.turns -= 1
        self.ended = self.turns == 0
        return True

    def result(self) -> tuple[str, dict[str, Any]]:
        Slot.running = tuple(each for each in Slot.running if each is not self.cell)
        self.cell = None
        return "done", {"test": {}}


@pytest.mark.parametrize("packed", [1, 4, 16])
def test_every_cell_is_done_within_the_places(packed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_Slot", Slot)
    monkeypatch.setattr(Slot, "seen", ())
    weights = {3: 5, 4: 5, 6: 16, 9: 5}
    cells = [
        dataclasses.replace(cell, weight=weights.get(cell.place, 1))
        for cell in make_cells(write_series(tmp_path), 14)
    ]  # fmt: skip
    store, done = Store(tmp_path / "cells.sqlite"), []
    store.add(cells)
    worker.work_on_gpu(
        store, torch.device("cpu"), packed, time.monotonic() + 60, lambda cell, *_: done.append(cell.place)
    )  # fmt: skip
    assert sorted(done) == list(range(14))
    assert store.counts()["done"] == 14
    for weight, together in Slot.seen:
        # One that is heavier than all places has the GPU for itself.
        assert together <= max(packed, weight)


def test_nothing_begins_after_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_Slot", Slot)
    store = Store(tmp_path / "cells.sqlite")
    store.add(make_cells(write_series(tmp_path), 2))
    worker.work_on_gpu(store, torch.device("cpu"), 4, time.monotonic(), lambda *_: None)
    assert store.counts()["open"] == 2
