"""Studies that take seconds, importable by tests and by processes of their own."""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from selectra.compare.conduct import Wish, conduct
from selectra.compare.results import command_of
from selectra.compare.store import Store
from selectra.compare.study import Study, Tuning, Variant
from selectra.runs import find_run
from selectra.spec import Run, Spec
from selectra.train.job import typed
from tests.compare.small import make_run, write_series

VARIANTS = (
    Variant(name="tsm2", model=Spec("tsm2_smoke", patch_len=4, stride=2), kind="mamba"),
    Variant(name="dlinear", model=Spec("dlinear", kernel=5), kind="linear"),
    Variant(name="linear", model=Spec("linear"), kind="linear"),
)
TUNED = {"optim.lr": "each model gets the best of the same trials"}


def make_study(series: Path, steps: int = 6, **changes: Any) -> Study:
    """Three models on noisy sines, two trials each."""
    base = make_run(series, Spec("naive"), steps=steps).model_copy(update={"name": "waves"})
    content = {
        "name": "small", "question": "Which is best on waves?", "bases": (base,), "variants": VARIANTS,
        "subject": "mamba", "declared": TUNED, "tuning": Tuning(values={"optim.lr": (0.01, 0.05)}),
    }  # fmt: skip
    return Study(**{**content, **changes})


def finished(folder: Path, **changes: Any) -> Path:
    """The file of a study that was done without a disturbance."""
    torch.set_num_threads(1)
    path = folder / "study.sqlite"
    conduct(make_study(write_series(folder), **changes), Wish(path, device="cpu"), Console(quiet=True))
    return path


def numbers(path: Path) -> dict[str, Any]:
    """What a study came to, without times and places: equal for equal studies."""
    store = Store(path)
    cells = {cell.key: (state, record) for cell, state, record in store.cells()}
    store.close()
    kept = ("val", "test", "score", "history", "pruned", "best_step", "steps", "data_order", "reason")
    return {
        key: (state, {name: record[name] for name in kept if record and name in record})
        for key, (state, record) in cells.items()
    }


def repeated(run: Run) -> Run:
    """The run that the command printed for another one gives; the name is for folders alone."""
    _, _, name, *words = shlex.split(command_of(run))
    return typed(find_run(name, words)).model_copy(update={"name": ""})


if __name__ == "__main__":
    # The series, the store, workers, optimizer steps, draws of optuna (0: two fixed values).
    torch.set_num_threads(1)
    series, store, workers, steps, draws = Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6])
    tuning = (
        Tuning(ranges={"optim.lr": (0.001, 0.1)}, trials=draws) if draws else Tuning(values={"optim.lr": (0.01, 0.05)})
    )
    conduct(make_study(series, steps, tuning=tuning), Wish(store, device="cpu", workers=workers), Console())
