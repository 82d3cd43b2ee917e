"""Small trainings of several kinds, which one process and several do alike."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from selectra import models as _models  # noqa: F401
from selectra.data import Objects
from selectra.data.object_views import ObjectViews, Target
from selectra.registry import models
from selectra.spec import Optim, Parallel, Run, Spec, Train
from selectra.tasks import Detection
from selectra.train.loop import Fitted, fit
from selectra.train.parallel import joined
from tests.train import tiny, tiny_images


class Unlike(ObjectViews):
    """Some images are cut smaller, so that a share may have only such."""

    def view(self, i: int, epoch: int, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        seen, found = super().view(i, epoch, image, target)
        return (seen[:, :30, :28] if i % 2 else seen), found


def objects(out: Path) -> Fitted:
    """Two steps of five drawn images, by Mask R-CNN."""
    torch.set_num_threads(1)
    data = Objects("shapes", masks=True, flip=0.5, val=0.05)
    data.rows["val"] = data.rows["val"][:4]
    backbone = Spec("vmamba_smoke", dims=(8, 16), depths=(1, 1), patch_size=4, d_state=2)
    run = Run(
        model=Spec("mask_rcnn_smoke", backbone=backbone), data=Spec("objects"), task=Spec("detection"),
        optim=Optim(lr=1e-3), train=Train(steps=2, batch_size=5, eval_every=2, device="cpu"), name="objects",
    )  # fmt: skip
    with joined(Parallel(timeout=60), "cpu") as world:
        torch.manual_seed(0)
        model: Any = models.build(run.model, data.facts)
        train = Unlike(data, data.readable("train"), data.augment)
        task = Detection().for_data(data)
        return fit(model, task, train, data.windows("val"), run, out, progress=False, world=world)


# Five batches make a pass over the 240 images, and the last one is of 20.
IMAGES = {"batch_size": 55, "steps": 6, "eval_every": 3}
TRAININGS: dict[str, Callable[[Path], Any]] = {
    "series": partial(tiny.train, dropout=0.0),
    "images": partial(tiny_images.train, **IMAGES),
    "images, accumulated": partial(tiny_images.train, **IMAGES, accumulate=2),
    "objects": objects,
}


def every(folder: Path, ports: list[int]) -> None:
    """All of them, one after the other, in a process of several or alone."""
    for (name, training), port in zip(TRAININGS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        training(folder / name)
