"""Cells of image studies on a GPU: `ImagesOnDevice` with the face that `OnDevice` shows to the worker.

A training keeps the weights that it ends with (or their running mean); the validation part is looked at once, then.
"""

from typing import Any, Protocol

import torch
from torch import nn

from selectra.compare.cells import Cell
from selectra.compare.on_device import Outcome
from selectra.compare.on_device_images import ImagesOnDevice
from selectra.data.image_views import Held
from selectra.data.images import HeldImages
from selectra.errors import ConfigError
from selectra.spec import Spec
from selectra.tasks.task import Task
from selectra.train.evaluation import evaluate
from selectra.train.parallel import World

# Steps that are queued at a time, and images in a batch of an evaluation.
CHUNK, EVALUATED = 50, 1000


class BuiltImages(Protocol):
    """What the worker has built of a cell."""

    data: Any
    task: Any
    model: nn.Module
    parts: dict[str, Any]


class HeldOnce:
    """Training images on the device, one copy for all cells on the same data."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.found: dict[Spec, Held] = {}

    def __call__(self, cell: Cell, part: Any) -> Held:
        if not isinstance(part, HeldImages):
            raise ConfigError("trainings side by side on a GPU hold their images there; set data.keep to 'memory'.")
        if cell.run.data not in self.found:
            self.found[cell.run.data] = part.held.to(self.device)
            torch.cuda.synchronize(self.device)
        return self.found[cell.run.data]


class ImageTraining:
    """One training of images on one stream.

    Args:
        cell: What is trained.
        built: Its parts; the model is still where it was built.
        held: The training images, on the device.
        stream: The stream of this training's graph; None runs every step as it is called.
        pool: Memory that the graph takes from.
    """

    def __init__(
        self, cell: Cell, built: BuiltImages, held: Held, stream: "torch.cuda.Stream | None" = None, pool: Any = None
    ) -> None:  # fmt: skip
        self.cell, self.parts, self.task = cell, built.parts, built.task
        self.device = held.pixels.device
        self.inner = ImagesOnDevice(
            built.model.to(self.device), built.task, held, built.data.augment, cell.run, stream, pool
        )
        self.stream = stream

    def prepare(self) -> None:
        """Take the first step, and record the graph of all others."""
        self.inner.prepare()
        self.backends = self.inner.backends

    def advance(self) -> bool:
        """Do, or queue, the next steps; whether there are more."""
        return self.inner.advance(CHUNK)

    def finish(self) -> None:
        """Nothing is left to be queued; results are measured when they are asked for."""

    def outcome(self) -> Outcome:
        """The result; waits for the device. A trial does not look at the test part."""
        seconds, world = self.inner.seconds, World(device=self.device)
        parts = ("val",) if self.cell.trial is not None else ("val", "test")
        with self.inner.on_stream():
            found = {part: self._measured(part, world) for part in parts if len(self.parts[part])}
        val, test = found.get("val", {}), found.get("test", {})
        task: Task = self.task
        history = [{"score": task.score(val)}] if val else []
        return Outcome(val, test, self.inner.steps, self.inner.steps, seconds, history)

    def _measured(self, part: str, world: World) -> dict[str, float]:
        return evaluate(self.inner.final, self.task, self.parts[part], EVALUATED, world, self.cell.run.train.precision)
