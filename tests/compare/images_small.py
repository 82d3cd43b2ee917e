"""A study of image models that takes seconds, importable by tests and done by a process of its own."""

import sys
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from selectra.compare.cells import Cell
from selectra.compare.conduct import decide, judge_of, open_study
from selectra.compare.image_worker import work_on_images
from selectra.compare.store import Store
from selectra.compare.study import Study, Tuning, Variant
from selectra.spec import Optim, Run, Spec, Train

CPU = torch.device("cpu")
SHAPE = {"dims": (8, 16), "depths": (1, 1), "patch_size": 4, "d_state": 2}
TUNED = {"optim.lr": "each model gets the best of the same trials"}


def make_study(**changes: Any) -> Study:
    """Two models on drawn shapes, two trials each; 288 training images, so that 36 divide them."""
    base = Run(
        name="shapes", model=Spec("vit_smoke"), data=Spec("images", crop=2, flip=0.5),
        task=Spec("classification", select="loss"), optim=Optim(lr=3e-3, warmup_steps=2),
        train=Train(steps=7, batch_size=36, eval_every=3, ema=0.6, device="cpu"),
    )  # fmt: skip
    variants = (
        Variant(name="vmamba", model=Spec("vmamba_smoke", **SHAPE), kind="mamba"),
        Variant(name="simba", model=Spec("simba_smoke", mlp_ratios=(2, 2), **SHAPE), kind="other"),
    )
    content = {
        "name": "small", "question": "Which is best on shapes?", "bases": (base,), "variants": variants,
        "subject": "mamba", "declared": TUNED, "tuning": Tuning(values={"optim.lr": (0.003, 0.01)}), "metric": "top1",
        "higher_is_better": True,
    }  # fmt: skip
    return Study(**{**content, **changes})


def work(
    path: Path, study: Study, packed: int, after: Callable[[Cell], None] = lambda cell: None,
    device: torch.device = CPU,
) -> None:  # fmt: skip
    """Do what is left of a study as a GPU would, by default on a CPU."""
    torch.set_num_threads(1)
    store = Store(path)
    study = open_study(store, study, device, Console(quiet=True))
    decide(store, study)

    def done(cell: Cell, state: str, record: dict[str, Any]) -> None:
        decide(store, study)
        after(cell)

    work_on_images(store, device, packed, inf, done, judge_of(store, study))
    store.close()


if __name__ == "__main__":
    # The store, and seconds of pause behind every cell.
    work(Path(sys.argv[1]), make_study(), 2, lambda cell: time.sleep(float(sys.argv[2])))
