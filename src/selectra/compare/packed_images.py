"""Trainings of image models side by side on one device: each on its own stream, all driven by one thread.

On a GPU a training's steps are queued ahead on its stream, so that the device has work while the host builds the next
model and records its graph. On a CPU they take turns.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectra.compare.on_device_images import ImagesOnDevice
from selectra.data import Images
from selectra.data.image_views import Held
from selectra.data.images import HeldImages
from selectra.errors import ConfigError, DataError
from selectra.pretrained import load_pretrained
from selectra.registry import datasets, models, tasks
from selectra.spec import Run, Spec
from selectra.tasks import Classification
from selectra.train.depth import freeze
from selectra.train.evaluation import evaluate
from selectra.train.parallel import World

# Steps that are queued at once, and how many such pieces a stream has waiting.
CHUNK, AHEAD = 20, 3
# Images of a batch of an evaluation; no result depends on it.
EVALUATED = 1000


@dataclass(frozen=True)
class Parts:
    """A set's images: those of training on the device; validation and test go there when they are first used."""

    images: Images
    train: Held
    val: HeldImages
    test: HeldImages


class Library:
    """Every data set that is needed, read once.

    Args:
        device: Where training images lie.
        read: Makes a data set of images of its name and arguments.

    Raises:
        ConfigError: A set's images are not held in memory.
    """

    def __init__(self, device: torch.device, read: Callable[[Spec], Any] = datasets.build) -> None:
        self.device, self.read = device, read
        self.parts: dict[Spec, Parts] = {}

    def __call__(self, spec: Spec) -> Parts:
        if spec not in self.parts:
            images = self.read(spec)
            train, val, test = (images.windows(part) for part in ("train", "val", "test"))
            if not isinstance(train, HeldImages) or not isinstance(val, HeldImages) or not isinstance(test, HeldImages):
                raise ConfigError("a study trains on images held in memory; set data.keep to 'memory'.")
            self.parts[spec] = Parts(images, train.held.to(self.device), val, test)
        return self.parts[spec]


def build(run: Run, parts: Parts, device: torch.device) -> tuple[nn.Module, Classification]:
    """The run's model and its task: drawn from its seed as the loop draws it, from other weights where the run says so.

    Raises:
        DataError: The file of weights is missing, damaged or of another model.
        ConfigError: There is nothing to freeze as much of as the run wants.
    """
    torch.manual_seed(run.train.seed)
    model = models.build(run.model, parts.images.facts)
    assert isinstance(model, nn.Module)
    if run.train.pretrained is not None:
        load_pretrained(model, run.train.pretrained)
    freeze(model, run.train.freeze)
    return model.to(device), tasks.build(run.task, parts.images.facts).for_data(parts.images)


@dataclass(frozen=True)
class Job:
    """A training to do, what its giver knows it by, and what ends it early, from its validation scores so far."""

    key: Any
    run: Run
    ends: Callable[[Sequence[float]], bool] | None = None


class Training:
    """One training with what it came to: its last weights or their mean; with validation images the best of these.

    Args:
        device: Where.
        stream: Of its graph; None runs every step as it is called.
        pool: Memory that the graph takes from.
    """

    def __init__(
        self, job: Job, library: Library, stream: torch.cuda.Stream | None = None, pool: Any = None
    ) -> None:  # fmt: skip
        self.job, self.run, self.device = job, job.run, library.device
        self.parts = library(job.run.data)
        model, self.task = build(job.run, self.parts, self.device)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        held, augment = self.parts.train, self.parts.images.augment
        self.on_device = ImagesOnDevice(model, self.task, held, augment, job.run, stream, pool)
        per_pass = max(1, len(held.labels) // job.run.train.batch_size)
        self.every = (job.run.train.eval_every or per_pass) if len(self.parts.val) else self.on_device.steps
        self.history: list[dict[str, float]] = []
        self.best: list[Tensor] | None = None
        self.best_step = self.on_device.steps
        self.val: dict[str, float] = {}
        self.more, self.pruned = True, False

    @property
    def due(self) -> int:
        """Steps until the next evaluation or the end."""
        at = self.on_device.done
        return min(self.every - at % self.every, self.on_device.steps - at) if self.more else 0

    def begin(self) -> None:
        """Take the first step, and on a stream record the graph of the others."""
        self.on_device.prepare()
        self._after(self.on_device.done < self.on_device.steps)

    def advance(self) -> None:
        """Queue a piece of the steps, up to where weights are measured; what was queued before may yet run."""
        self._after(self.on_device.advance(min(CHUNK, self.due)))

    def _after(self, more: bool) -> None:
        # The first step was the last one, too: it leaves the mark of the end.
        self.more = more or (self.on_device.done == 1 and self.on_device.advance(0))
        if len(self.parts.val) and (not self.more or self.on_device.done % self.every == 0):
            self._validate()

    def _validate(self) -> None:
        found = self.measure(self.parts.val)
        self.history.append(found)
        if self.best is None or self.task.score(found) < self.task.score(self.val):
            self.val, self.best_step = found, self.on_device.done
            with self.on_device.on_stream():
                self.best = [tensor.detach().clone() for tensor in self.on_device.final.state_dict().values()]
        # As the loop asks: at every evaluation, the last one included.
        if self.job.ends is not None and self.job.ends([self.task.score(each) for each in self.history]):
            self.on_device.stop()
            self.more, self.pruned = False, True

    def measure(self, images: HeldImages, model: nn.Module | None = None) -> dict[str, float]:
        """The metrics of the weights as they are now, or of another model; waits for the device."""
        world = World(device=self.device)
        with self.on_device.on_stream():
            model = self.on_device.final if model is None else model
            return evaluate(model, self.task, images, EVALUATED, world, self.run.train.precision)

    def finish(self) -> None:
        """Take the weights that validation chose, if it did."""
        if self.best is not None:
            with self.on_device.on_stream(), torch.no_grad():
                for now, kept in zip(self.on_device.final.state_dict().values(), self.best, strict=True):
                    now.copy_(kept)


class Slot:
    """A stream with the memory of its graphs, and the training that runs on it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: torch.cuda.Stream | None = None
        self.pool: Any = None
        if device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
            # A pool lives as long as a graph in it, and its name cannot be used again: this one does nothing, for ever.
            self.keeper = torch.cuda.CUDAGraph()
            with torch.cuda.stream(self.stream):
                self.nothing = torch.zeros(1, device=device)
                self.keeper.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                self.nothing.add_(1)
                self.keeper.capture_end()
        self.training: Training | None = None
        self.queued: deque[Any] = deque()

    def start(self, job: Job, library: Library) -> None:
        """Build the model, take the first step, record the graph."""
        self.queued.clear()
        self.training = Training(job, library, self.stream, self.pool)
        self.training.begin()

    def move(self) -> bool:
        """Queue what comes next where there is room; whether anything was."""
        assert self.training is not None
        while self.queued and self.queued[0].query():
            self.queued.popleft()
        if not self.training.more or len(self.queued) >= AHEAD:
            return False
        self.training.advance()
        if self.stream is not None:
            self.queued.append(self.stream.record_event())
        return True

    @property
    def ended(self) -> bool:
        """Whether all has run."""
        return self.training is not None and not self.training.more and not self.queued


def work_packed(
    library: Library, packed: int, take: Callable[[], Job | None], on_done: Callable[[Training], None],
    until: float, on_failed: Callable[[Job, Exception], None] | None = None, finish: bool = True,
) -> None:  # fmt: skip
    """Do trainings, `packed` at a time, until `take` gives none and all have ended.

    Args:
        library: The data, and the device.
        take: The next training; None where there is none just now.
        on_done: Called with every training that has ended, its weights those that it keeps.
        until: Moment of `time.monotonic` after which none is begun.
        on_failed: Called where one cannot be begun; None lets the error through.
        finish: Whether those in flight at that moment are brought to their end.
    """
    slots = [Slot(library.device) for _ in range(packed)]
    while finish or time.monotonic() < until:
        moved = False
        for slot in slots:
            if slot.training is None and time.monotonic() < until:
                moved |= _start(slot, take(), library, on_failed)
            if slot.training is not None:
                moved |= slot.move()
            if slot.ended:
                assert slot.training is not None
                slot.training.finish()
                on_done(slot.training)
                slot.training, moved = None, True
        if not moved:
            if all(slot.training is None for slot in slots):
                return
            time.sleep(0.0005)


def _start(
    slot: Slot, job: Job | None, library: Library, on_failed: Callable[[Job, Exception], None] | None
) -> bool:  # fmt: skip
    if job is None:
        return False
    try:
        slot.start(job, library)
    except (ConfigError, DataError, torch.OutOfMemoryError) as error:
        if on_failed is None:
            raise
        slot.training = None
        on_failed(job, error)
    return True
