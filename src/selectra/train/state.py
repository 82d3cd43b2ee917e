"""All that a training changes, in one object that a checkpoint holds and resuming restores."""

from __future__ import annotations

import json
import random
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import ceil, inf, isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.pretrained import GRID, grid_in
from selectra.spec import Run
from selectra.train import checkpoint
from selectra.train.average import RunningMean
from selectra.train.batches import Order
from selectra.train.optim import make_optimizer, make_schedule
from selectra.train.parallel import World
from selectra.train.precision import make_scaler
from selectra.train.record import RUN, Record
from selectra.train.same_data import refuse_changed
from selectra.train.sharding import on_cpu, put, require_gather, shard, start_in_parts, whole
from selectra.train.stop import DivergedError

if TYPE_CHECKING:
    from selectra.train.snapshots import Snapshots

StoppedBy = Literal["", "steps", "patience", "solved", "nothing to train"]
# What may differ when a training goes on: nothing that is learnt depends on it, but for rounding.
FREE = {
    "name", "train.keep", "train.save_every", "train.workers", "train.load_timeout", "train.threads", "train.device",
    "data.args.timeout", "data.args.attempts",
}  # fmt: skip
# What may become "skip", as an error about a damaged file advises; the rest of the pass in hand is then taken from the
# order of the files that are left.
SKIPPING = {"data.args.corrupt", "data.args.faulty"}
# How steps are computed, which the kind of parallelism and the device say; not what.
HOW = {"fused", "foreach", "capturable", "differentiable"}


@dataclass
class Progress:
    """How far a training is."""

    step: int = 0
    position: int = 0
    """Batches that were taken."""
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
        self._snapshots: Snapshots | None = None
        self._saved_at = 0
        seed_everything(run.train.seed + world.rank)
        if order is not None:
            require_gather(run, model)
            accumulate, passes = run.train.accumulate, run.train.epochs or 0.0
            self.steps = run.train.steps or ceil(passes * len(order) / accumulate)
            self.eval_every = run.train.eval_every or max(1, len(order) // accumulate)
            # The mean is a copy of the model, which one that is cut into parts refuses to give.
            self.mean = None if run.train.ema is None else RunningMean(model, run.train.ema)
            if world.sharded:
                self._cut()
            # Where memory is what counts.
            self.optimizer = make_optimizer(model, run.optim, fused=world.sharded and world.device.type == "cuda")
            self.schedule = make_schedule(self.optimizer, run.optim, self.steps)
            self.scaler = make_scaler(world.device, run.train.precision)

    def _cut(self) -> None:
        """Spread the model, and its mean, over the processes; weights that nobody has made yet are made in parts."""
        if self.run.train.precision == "float16":
            raise ConfigError("parallel.kind is 'fsdp2', and train.precision 'float16'; take 'bfloat16' or 'float32'.")
        for model in [self.model] if self.mean is None else [self.model, self.mean.model]:
            shard(model, self.world, self.run.parallel.gather)
            if any(parameter.is_meta for parameter in model.parameters()):
                start_in_parts(model, self.world)

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
        return self.at.step > self._saved_at and self.at.step % (self.run.train.save_every or self.eval_every) == 0

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
        self.best = {name: on_cpu(value, self.world) for name, value in self.measured.state_dict().items()}
        if self.out is None:
            return
        # Every process takes part in putting parts together, and the first one keeps what comes of it.
        weights = {name: found for name, value in self.best.items() if (found := whole(value)) is not None}
        if self.world.first:
            metadata = {"format": "pt", "model": json.dumps(self.run.model.to_json())}
            grid = grid_in(self.measured)
            if grid is not None:
                metadata[GRID] = f"{grid[0]},{grid[1]}"
            checkpoint.save_weights(self.out / checkpoint.WEIGHTS, weights, metadata)

    def take_best(self) -> None:
        """Give the model the weights that were kept."""
        if self.world.sharded and self.mean is None:
            put(self.model, self.best)
        elif self.world.sharded:
            put(self.model, {name: self.best[name] for name in self.model.state_dict()})
        else:
            self.model.load_state_dict(self.best)

    def save(self, record: Record) -> None:
        """Begin to write the checkpoint of this step; every process takes part.

        Raises:
            DataError: The one before could not be written.
        """
        generators = self.world.gather(checkpoint.random_state())
        if self.out is None:
            return
        tensors = {name: on_cpu(tensor, self.world) for name, tensor in self._tensors().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        rest = {
            "run": self.run.to_json(),
            "data": None if self.data is None else dict(self.data),
            "groups": [_without_tensors(group) for group in self.optimizer.param_groups],
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": asdict(self.at),
            "generators": generators,
            "record": record.length(),
        }
        if self._snapshots is None:
            # Loading PyTorch's part for it takes a second.
            from selectra.train.snapshots import Snapshots  # noqa: PLC0415

            self._snapshots = Snapshots(self.out, self.world, self.run.train.keep)
        self._snapshots.save(self.at.step, tensors, rest)
        self._saved_at = self.at.step

    @property
    def save_failed(self) -> bool:
        """Whether the last checkpoint could not be written, as far as is known; `saved` says why."""
        return self._snapshots is not None and self._snapshots.failed

    def saved(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            DataError: It could not be written.
        """
        if self._snapshots is not None:
            self._snapshots.finish()

    def close(self) -> None:
        """End what writes checkpoints."""
        if self._snapshots is not None:
            self._snapshots.close()

    def _tensors(self) -> dict[str, Tensor]:
        """Every tensor that training changes, or parts of it, under its name in a checkpoint."""
        found = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key, tensor in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}.{key}"] = tensor
        if self.mean is not None:
            found |= {f"mean.{name}": tensor for name, tensor in self.mean.state_dict().items()}
        return found

    def resume(self) -> int:
        """Go on where the last checkpoint was taken; returns the length of the record at that moment.

        Raises:
            ConfigError: The folder holds another run.
            DataError: The checkpoint is damaged, or the data has changed since.
        """
        assert self.out is not None
        path = self.world.gather(checkpoint.latest(self.out))[0]
        if path.is_file():
            return self._resume_from_file(path)
        from selectra.train.snapshots import Snapshot  # noqa: PLC0415

        snapshot = Snapshot(path, self.world)
        saved = snapshot.state
        self._require_same(saved)
        for name, parameter in self.model.named_parameters():
            self.optimizer.state.pop(parameter, None)
            for key in snapshot.keys_behind(f"optimizer.{name}."):
                stored = snapshot.empty(f"optimizer.{name}.{key}")
                like = stored.shape == parameter.shape
                place = parameter.device if self.optimizer.defaults["fused"] else stored.device
                self.optimizer.state[parameter][key] = (
                    torch.zeros_like(parameter.detach()) if like else stored.to(place)
                )
        tensors = self._tensors()
        if snapshot.keys_behind("best.", deep=True):
            self.best = {name: on_cpu(value, self.world) for name, value in self.measured.state_dict().items()}
            tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        snapshot.read(tensors)
        if self.mean is not None:
            self.mean.load_state_dict({name: tensors[f"mean.{name}"] for name in self.mean.state_dict()})
        for group, stored in zip(self.optimizer.param_groups, saved["groups"], strict=True):
            group.update({key: value for key, value in stored.items() if key not in HOW})
        length = self._resume_rest(saved)
        # What was read is not written once more.
        self._saved_at = self.at.step
        return length

    def _resume_from_file(self, path: Path) -> int:
        """Go on from a checkpoint of one file, as earlier versions wrote it."""
        if self.world.sharded:
            raise ConfigError(
                f"'{path}' is an earlier version's checkpoint, which parallel.kind 'fsdp2' cannot read; go on with "
                "parallel.kind=ddp or none until the next checkpoint is written."
            )
        saved = checkpoint.load(path)
        self._require_same(saved)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        if self.mean is not None:
            self.mean.load_state_dict(saved["mean"])
        self.best = saved["best"]
        return self._resume_rest(saved)

    def _require_same(self, saved: Mapping[str, Any]) -> None:
        assert self.out is not None
        _refuse_another_run(self.out, saved["run"], self.run)
        advice = "Bring the data back, start over with --anew, or choose another folder."
        refuse_changed(saved.get("data"), self.data, str(self.out), advice)

    def _resume_rest(self, saved: Mapping[str, Any]) -> int:
        self.schedule.load_state_dict(saved["schedule"])
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.at = Progress(**saved["progress"])
        # A process that did not exist when the checkpoint was taken keeps its own seed.
        if self.world.rank < len(saved["generators"]):
            checkpoint.set_random_state(saved["generators"][self.world.rank])
        return saved["record"]


def _without_tensors(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


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
        if key not in FREE
        and not key.startswith("parallel.")
        and before.get(key) != now.get(key)
        # A training that met a damaged file goes on without it.
        and not (key in SKIPPING and now.get(key) == "skip")
    ]
    if different:
        raise ConfigError(
            f"'{out}' holds another training: {'; '.join(different)}. Choose another folder, or delete that one."
        )
