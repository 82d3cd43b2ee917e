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
from selectra.compare.packed_images import Job, Library, Parts, Slot, Training, build, work_packed
from selectra.registry import datasets, models, recipes, tasks
from selectra.spec import Run, Spec, override
from selectra.train.precision import autocast

MEASURED, WARM = 30, 3


def find_run(recipe: str, seed: int, changes: Sequence[str]) -> Run:
    """A recipe's run with this seed, without validation images, and with changes."""
    run = override(recipes.build(Spec(recipe)), ["data.val=0", f"train.seed={seed}", *changes])
    typed = {"model": models.typed(run.model), "data": datasets.typed(run.data), "task": tasks.typed(run.task)}
    return run.model_copy(update=typed)


def costs_of(model: nn.Module, parts: Parts) -> dict[str, Any]:
    """Parameters, and floating-point operations of one image's forward pass (two for a product and its sum)."""
    model.eval()
    image = parts.train.plain(torch.zeros(1, dtype=torch.long, device=parts.train.pixels.device))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    return {"parameters": sum(p.numel() for p in model.parameters()), "gflops": counter.get_total_flops() / 1e9}


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
        slot = Slot(self.device)
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        training = ImagesOnDevice(model, task, parts.train, parts.images.augment, run, slot.stream, slot.pool)
        training.prepare()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        step = timed(training.step_again, slot)
        batch = run.train.batch_size
        infer = _inference(training.model, parts, run, slot)
        return {
            **found, "batch_size": batch, "train_ms": 1e3 * step, "train_images_per_s": batch / step,
            "inference_ms": 1e3 * infer, "inference_images_per_s": batch / infer, "peak_gib": peak / 2**30,
            "backends": training.backends,
        }  # fmt: skip

    def train(self, until: float, on_done: Callable[[dict[str, Any]], None]) -> list[tuple[str, int]]:
        """Train everything, `packed` at a time; returns what was not begun before `until` (of time.monotonic)."""
        left = list(self.runs())

        def take() -> Job | None:
            if not left:
                return None
            key = left.pop(0)
            return Job(key, find_run(*key, self.changes))

        work_packed(self.library, self.packed, take, lambda training: on_done(self._row(training)), until)
        return left

    def _row(self, training: Training) -> dict[str, Any]:
        done, (recipe, seed) = training.on_device, training.job.key
        losses = done.losses.cpu()
        return {
            "recipe": recipe, "seed": seed, "test": training.measure(training.parts.test),
            "test_last_weights": training.measure(training.parts.test, done.model),
            "steps": done.steps, "seconds": done.seconds, "packed": self.packed,
            "losses": losses[:: max(1, len(losses) // 50)].tolist(), "last_loss": float(losses[-50:].mean()),
            "backends": done.backends,
        }  # fmt: skip


def timed(call: Callable[[], None], slot: Slot, rounds: int = MEASURED) -> float:
    """Seconds of one call, alone on the device, the mean of some; on a CPU of one, by the wall clock."""
    if slot.stream is None:
        start = time.monotonic()
        call()
        return time.monotonic() - start
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.stream(slot.stream):
        for _ in range(WARM):
            call()
        began.record()
        for _ in range(rounds):
            call()
        ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1e3 / rounds


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
    return timed(graph.replay, slot)
