"""All that a training changes, in one object that a checkpoint holds and resuming restores."""

import json
import random
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import ceil, inf, isnan
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.spec import Run
from selectra.train import checkpoint
from selectra.train.average import RunningMean
from selectra.train.batches import Order
from selectra.train.optim import make_optimizer, make_schedule
from selectra.train.parallel import World
from selectra.train.precision import make_scaler
from selectra.train.record import RUN, Record
from selectra.train.same_data import refuse_changed
from selectra.train.stop import DivergedError

StoppedBy = Literal["", "steps", "patience", "solved", "nothing to train"]


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    position: int = 0
    """Batches that this process has taken."""
    seconds: float = 0.0
    evaluated_at: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """Validation metrics of the kept weights."""
    best_score: float = inf
    best_step: int = 0
    without_gain: int = 0
    """Evaluations since the best one."""
    stopped_by: StoppedBy = ""


class State:
    """A model in training, its optimizer and schedule, how far it is, and the best weights so far.

    Args:
        order: The training batches; None for a model that learns nothing by gradient.
        out: Where checkpoints and weights are written; None writes nothing.
        data: What identifies the data, as `same_data.describe_data` gives it.
    """

    def __init__(
        self, model: nn.Module, run: Run, order: Order | None, out: Path | None, world: World,
        data: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.run, self.world, self.out, self.data = model, run, world, out, data
        self.at = Progress()
        self.best: dict[str, Tensor] = {}
        # Models that learn nothing by gradient have no running mean.
        self.mean: RunningMean | None = None
        seed_everything(run.train.seed + world.rank)
        if order is not None:
            accumulate, passes = run.train.accumulate, run.train.epochs or 0.0
            self.steps = run.train.steps or ceil(passes * len(order) / accumulate)
            self.eval_every = run.train.eval_every or max(1, len(order) // accumulate)
            self.optimizer = make_optimizer(model, run.optim)
            self.schedule = make_schedule(self.optimizer, run.optim, self.steps)
            self.scaler = make_scaler(world.device, run.train.precision)
            self.mean = None if run.train.ema is None else RunningMean(model, run.train.ema)

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been done."""
        due = self.at.step % self.eval_every == 0 or self.at.step == self.steps
        return due and self.at.step > self.at.evaluated_at

    @property
    def save_due(self) -> bool:
        """Whether this step ends with a checkpoint."""
        return self.at.step > 0 and self.at.step % (self.run.train.save_every or self.eval_every) == 0

    @property
    def resume_command(self) -> str:
        """The command that goes on from the checkpoint."""
        return "" if self.out is None else shlex.join(["selectra", "train", str(self.out / RUN)])

    @property
    def measured(self) -> nn.Module:
        """The model that is measured and kept: the running mean where there is one."""
        return self.model if self.mean is None else self.mean.model

    def advance(self, batches: int) -> None:
        """Take the optimizer's step with the gradients that are there; float16 leaves it out where they overflowed."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        with warnings.catch_warnings():
            # The schedule misses the optimizer's step where that was left out.
            warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step", UserWarning)
            self.schedule.step()
        if self.mean is not None:
            self.mean.follow(self.model)
        self.at.step += 1
        self.at.position += batches

    def note(self, metrics: dict[str, float], score: float) -> bool:
        """Note an evaluation, and keep the weights when they are the best so far."""
        if isnan(score):
            raise DivergedError(f"step {self.at.step}: the validation score is not a number; metrics: {metrics}.")
        better = score < self.at.best_score
        if better:
            self.at.best, self.at.best_score, self.at.best_step = metrics, score, self.at.step
            self.keep()
        self.at.without_gain = 0 if better else self.at.without_gain + 1
        return better

    def end_if_due(self) -> None:
        """After an evaluation: note it, and end after the last step or when patience is over."""
        self.at.evaluated_at = self.at.step
        patience = self.run.train.patience
        if self.at.step == self.steps:
            self.at.stopped_by = "steps"
        elif patience is not None and self.at.without_gain >= patience:
            self.at.stopped_by = "patience"
        if self.at.stopped_by and not self.best:
            self.keep()

    def keep(self) -> None:
        """Take the present weights as the ones that training ends with, and export them."""
        self.best = checkpoint.copy_weights(self.measured)
        if self.out is not None and self.world.first:
            metadata = {"format": "pt", "model": json.dumps(self.run.model.to_json())}
            checkpoint.save_weights(self.out / checkpoint.WEIGHTS, self.best, metadata)

    def save(self, record: Record) -> None:
        """Write the checkpoint; every process takes part, the first one writes."""
        generators = self.world.gather(checkpoint.random_state())
        if self.out is None or not self.world.first:
            return
        saved = {
            "run": self.run.to_json(),
            "data": None if self.data is None else dict(self.data),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "mean": None if self.mean is None else self.mean.state_dict(),
            "progress": asdict(self.at),
            "best": self.best,
            "generators": generators,
            "record": record.length(),
        }
        checkpoint.save(self.out / checkpoint.CHECKPOINT, saved)

    def resume(self) -> int:
        """Go on where the checkpoint was taken; returns the length of the record at that moment.

        Raises:
            ConfigError: The folder holds another run.
            DataError: The checkpoint is damaged, or the data has changed since.
        """
        assert self.out is not None
        saved = checkpoint.load(self.out / checkpoint.CHECKPOINT)
        _refuse_another_run(self.out, saved["run"], self.run)
        advice = "Bring the data back, start over with --anew, or choose another folder."
        refuse_changed(saved.get("data"), self.data, str(self.out), advice)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        if self.mean is not None:
            self.mean.load_state_dict(saved["mean"])
        self.at = Progress(**saved["progress"])
        self.best = saved["best"]
        # A process that did not exist when the checkpoint was taken keeps its own seed.
        if self.world.rank < len(saved["generators"]):
            checkpoint.set_random_state(saved["generators"][self.world.rank])
        return saved["record"]


def seed_everything(seed: int) -> None:
    """Seed every generator of this process."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _refuse_another_run(out: Path, saved: str, run: Run) -> None:
    # What an earlier version did not write down had the default's value.
    saved = Run.from_json(saved, str(out)).to_json()
    before, now = _flat(json.loads(saved)), _flat(json.loads(run.to_json()))
    different = [
        f"{key} is {before.get(key)!r} there and {now.get(key)!r} now"
        for key in sorted(before.keys() | now.keys())
        if key != "name" and before.get(key) != now.get(key)
    ]
    if different:
        raise ConfigError(
            f"'{out}' holds another training: {'; '.join(different)}. Choose another folder, or delete that one."
        )
