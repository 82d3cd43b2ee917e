"""A training of images that takes seconds, importable by tests and by processes of theirs."""

from pathlib import Path
from typing import Any

import torch

from selectra import models as _models  # noqa: F401
from selectra.data.images import Images
from selectra.registry import models
from selectra.spec import Optim, Parallel, Run, Spec, Train
from selectra.tasks import Classification
from selectra.train.loop import Fitted, fit
from selectra.train.parallel import joined

SHAPE = {"dims": (8, 16), "depths": (1, 1), "patch_size": 4, "d_state": 2}


def make_run(**settings: Any) -> Run:
    """Eleven steps of 24, two passes over 240 images, with an evaluation after every fifth."""
    words = {"steps": 11, "batch_size": 24, "eval_every": 5, "device": "cpu", "ema": 0.8, "channels_last": True}
    data = Spec("images", val=0.25, crop=3, flip=0.5, erase=0.3, mixup=0.2, cutmix=1.0)
    train = Train(**{**words, **settings})
    optim = Optim(lr=5e-3, warmup_steps=3, clip=1.0)
    return Run(
        model=Spec("vmamba_smoke", **SHAPE), data=data, task=Spec("classification", label_smoothing=0.1),
        optim=optim, train=train, name="tiny images",
    )  # fmt: skip


def train(out: Path | None, **settings: Any) -> Fitted:
    """Train in one thread: the order of sums shows in the last digits."""
    torch.set_num_threads(1)
    run = make_run(**settings)
    images = Images(**run.data.args)
    task = Classification(**run.task.args).for_data(images)
    with joined(Parallel(timeout=60), run.train.device) as world:
        torch.manual_seed(run.train.seed)
        model = models.build(run.model, images.facts)
        assert isinstance(model, torch.nn.Module)
        return fit(model, task, images.windows("train"), images.windows("val"), run, out, progress=False, world=world)
