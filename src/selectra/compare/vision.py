"""Image models against each other: the same recipe and number of steps, several trainings side by side on one device.

A study measures each model alone (a training step and inference as CUDA graphs, peak memory, FLOPs), then trains every
model with every seed and opens the test part once, for the weights that a training ends with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

# Importing the rooms fills the registries.
from selectra import models as _models  # noqa: F401
from selectra import recipes as _recipes  # noqa: F401
from selectra.compare.on_device_images import ImagesOnDevice
from selectra.data import Images
from selectra.data.image_views import Held
from selectra.data.images import HeldImages
from selectra.errors import ConfigError
from selectra.registry import datasets, models, recipes, tasks
from selectra.spec import Run, Spec, override
from selectra.tasks import Classification
from selectra.train.evaluation import evaluate
from selectra.train.parallel import World
from selectra.train.precision import autocast

CHUNK, MEASURED, WARM = 20, 30, 3


@dataclass(frozen=True)
class Parts:
    """A set's training and test images."""

    images: Images
    train: Held
    test: HeldImages


class Library:
    """Every data set that a study needs, read once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[Spec, Parts] = {}

    def __call__(self, spec: Spec) -> Parts:
        if spec not in self.parts:
            images = datasets.build(spec)
            train, test = images.windows("train"), images.windows("test")
            if not isinstance(train, HeldImages) or not isinstance(test, HeldImages):
                raise ConfigError("a study trains on images held in memory; set data.keep to 'memory'.")
            self.parts[spec] = Parts(images, train.held.to(self.device), test)
        return self.parts[spec]


def find_run(recipe: str, seed: int, changes: Sequence[str]) -> Run:
    """A recipe's run with this seed, without validation images, and with changes."""
    run = override(recipes.build(Spec(recipe)), ["data.val=0", f"train.seed={seed}", *changes])
    typed = {"model": models.typed(run.model), "data": datasets.typed(run.data), "task": tasks.typed(run.task)}
    return run.model_copy(update=typed)


def build(run: Run, parts: Parts, device: torch.device) -> tuple[nn.Module, Classification]:
    """The run's model, drawn from its seed as the loop draws it, and its task."""
    torch.manual_seed(run.train.seed)
    model = models.build(run.model, parts.images.facts)
    return model.to(device), tasks.build(run.task, parts.images.facts).for_data(parts.images)


def costs_of(model: nn.Module, parts: Parts) -> dict[str, Any]:
    """Parameters, and floating-point operations of one image's forward pass (two for a product and its sum)."""
    model.eval()
    image = parts.train.plain(torch.zeros(1, dtype=torch.long, device=parts.train.pixels.device))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return {"parameters": sum(p.numel() for p in model.parameters()), "gflops": counter.get_total_flops() / 1e9}


@dataclass
class Slot:
    """A stream and its trainings, one after the other."""

    device: torch.device
    stream: torch.cuda.Stream | None
    pool: Any
    key: tuple[str, int] | None = None
    training: ImagesOnDevice | None = None

    @classmethod
    def on(cls, device: torch.device) -> Slot:
        """A slot; on a CPU it has no stream."""
        if device.type != "cuda":
            return cls(device, None, None)
        return cls(device, torch.cuda.Stream(device), None)


@dataclass
class Study:
    """What is trained, and how.

    Args:
        recipes: Names.
        seeds: Every recipe is trained with each.
        changes: For every run, as on the command line.
        device: Where.
        packed: Trainings side by side.
        own_seeds: Fewer seeds for some of the recipes.
    """

    recipes: tuple[str, ...]
    seeds: tuple[int, ...]
    changes: tuple[str, ...]
    device: torch.device
    packed: int = 2
    own_seeds: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.library = Library(self.device)

    def runs(self) -> Iterator[tuple[str, int]]:
        """Seed by seed, so that what a limit cuts off is a whole seed of all models."""
        for place, seed in enumerate(self.seeds):
            for recipe in self.recipes:
                if place < self.own_seeds.get(recipe, len(self.seeds)):
                    yield recipe, seed

    def measure(self, recipe: str) -> dict[str, Any]:
        """One model alone: costs, and on a GPU time and memory of a step and of inference."""
        run = find_run(recipe, self.seeds[0], self.changes)
        parts = self.library(run.data)
        model, task = build(run, parts, self.device)
        found = {"recipe": recipe, "model": run.model.to_json(), **costs_of(model, parts)}
        if self.device.type != "cuda":
            return found
        slot = Slot.on(self.device)
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        training = ImagesOnDevice(model, task, parts.train, parts.images.augment, run, slot.stream, slot.pool)
        training.prepare()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        step = _timed(training.step_again, slot)
        batch = run.train.batch_size
        infer = _inference(training.model, parts, run, slot)
        return {
            **found, "batch_size": batch, "train_ms": 1e3 * step, "train_images_per_s": batch / step,
            "inference_ms": 1e3 * infer, "inference_images_per_s": batch / infer, "peak_gib": peak / 2**30,
            "backends": training.backends,
        }  # fmt: skip

    def train(self, until: float, on_done: Callable[[dict[str, Any]], None]) -> list[tuple[str, int]]:
        """Train everything, `packed` at a time; returns what was not begun before `until` (of time.monotonic)."""
        left, slots = list(self.runs()), [Slot.on(self.device) for _ in range(self.packed)]
        while True:
            for slot in slots:
                if slot.training is None and left and time.monotonic() < until:
                    slot.key = left.pop(0)
                    self._begin(slot)
            busy = [slot for slot in slots if slot.training is not None]
            if not busy:
                return left
            for slot in busy:
                assert slot.training is not None
                if not slot.training.advance(CHUNK):
                    on_done(self._finish(slot))
            _wait(busy)

    def _begin(self, slot: Slot) -> None:
        assert slot.key is not None
        run = find_run(*slot.key, self.changes)
        parts = self.library(run.data)
        model, task = build(run, parts, self.device)
        if slot.stream is not None:
            slot.stream.wait_stream(torch.cuda.current_stream(self.device))
            # A pool ends with the last graph that took from it.
            slot.pool = torch.cuda.graph_pool_handle()
        slot.training = ImagesOnDevice(
            model, task, parts.train, parts.images.augment, run, slot.stream, slot.pool
        )  # fmt: skip
        slot.training.prepare()

    def _finish(self, slot: Slot) -> dict[str, Any]:
        training = slot.training
        assert training is not None and slot.key is not None
        seconds, run = training.seconds, training.run
        world = World(device=self.device)
        with training.on_stream():
            parts = self.library(run.data)
            metrics = {
                name: evaluate(model, training.task, parts.test, 1000, world, run.train.precision)
                for name, model in (("test", training.final), ("test_last_weights", training.model))
            }
        losses = training.losses.cpu()
        slot.training = None
        return {
            "recipe": slot.key[0], "seed": slot.key[1], **metrics, "steps": training.steps, "seconds": seconds,
            "packed": self.packed, "losses": losses[:: max(1, len(losses) // 50)].tolist(),
            "last_loss": float(losses[-50:].mean()), "backends": training.backends,
        }  # fmt: skip


def _wait(slots: Sequence[Slot]) -> None:
    """Stay no more than a few pieces ahead of the device, so that a finished training is noticed."""
    for slot in slots:
        if slot.stream is not None:
            slot.stream.synchronize()


def _timed(call: Callable[[], None], slot: Slot) -> float:
    """Seconds of one call, alone on the device."""
    assert slot.stream is not None
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(slot.stream):
        for _ in range(WARM):
            call()
        began.record()
        for _ in range(MEASURED):
            call()
        ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / MEASURED


@torch.no_grad()
def _inference(model: nn.Module, parts: Parts, run: Run, slot: Slot) -> float:
    """Seconds of a forward pass over a batch, as a CUDA graph."""
    assert slot.stream is not None
    model.eval()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(slot.stream):
        rows = torch.arange(run.train.batch_size, device=slot.device) % len(parts.train.labels)
        images = parts.train.plain(rows)

        def forward() -> None:
            with autocast(slot.device, run.train.precision):
                model(images)

        forward()
        graph.capture_begin(pool=slot.pool, capture_error_mode="thread_local")
        try:
            forward()
        finally:
            graph.capture_end()
    return _timed(graph.replay, slot)
