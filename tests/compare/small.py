"""Cells that take a moment, importable by tests and done by a process of its own."""

import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from selectra.compare.cells import Cell
from selectra.compare.store import Store
from selectra.compare.worker import work_on_cpu
from selectra.spec import Optim, Run, Spec, Train

SEQ_LEN, HORIZON = 12, 4


def write_series(folder: Path, rows: int = 300) -> Path:
    """Three noisy sines, hourly."""
    steps = np.arange(rows)
    noise = np.random.default_rng(0).normal(size=(rows, 3))
    values = np.stack([np.sin(steps / 3), np.cos(steps / 5), np.sin(steps / 7 + 1)], 1) + 0.1 * noise
    frame = pd.DataFrame(values, columns=["a", "b", "c"])
    frame.insert(0, "date", pd.date_range("2024-01-01", periods=rows, freq="h"))
    path = folder / "series.csv"
    frame.to_csv(path, index=False)
    return path


def make_run(path: Path, model: Spec, *, steps: int = 9, seed: int = 0, lr: float = 1e-2, batch: int = 32) -> Run:
    """A run of a moment; 189 training windows, so that a pass ends with a shorter batch."""
    data = Spec("series_file", path=str(path), seq_len=SEQ_LEN, horizon=HORIZON)
    train = Train(steps=steps, batch_size=batch, eval_every=3, seed=seed, device="cpu")
    optim = Optim(lr=lr, warmup_steps=2)
    return Run(model=model, data=data, task=Spec("forecasting"), optim=optim, train=train, name=model.name)


def make_cells(path: Path, count: int = 8) -> list[Cell]:
    """Linear models of several seeds."""
    model = Spec("dlinear", kernel=5)
    return [Cell(make_run(path, model, seed=seed), seed, {"model": "dlinear", "seed": seed}) for seed in range(count)]


def work(file: Path, log: Path, pause: float) -> None:
    """Do all cells, and note each beginning and end in a file."""
    torch.set_num_threads(1)
    store = Store(file)
    take = store.take

    def taking(by_gradient: bool | None = None) -> Cell | None:
        cell = take(by_gradient)
        if cell is not None:
            note(log, f"begun {cell.key}")
            time.sleep(pause)
        return cell

    store.take = taking  # pyright: ignore[reportAttributeAccessIssue]
    work_on_cpu(store, time.monotonic() + 600, lambda cell, state, record: note(log, f"{state} {cell.key}"))
    store.close()


def note(log: Path, line: str) -> None:
    """Add a line."""
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    # The store, the log, seconds of pause in every cell.
    work(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
