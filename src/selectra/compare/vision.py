"""Recipes of image models measured and trained on one device, for scripts that keep a record of their own.

Each model is measured alone (a training step and inference as CUDA graphs, peak memory, FLOPs); trainings run side by
side as those of a study do (`packed_images`), and open the test part once, for the weights that a training ends with.
What is compared, stored and judged with intervals is a `Study` (`study`), by `image_worker`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

# Importing the rooms fills the registries.
from selectra import models as _models  # noqa: F401
from selectra import recipes as _recipes  # noqa: F401
from selectra.compare.flops import count_flops
from selectra.compare.on_device_images import ImagesOnDevice
from selectra.compare.packed_images import Job, Library, Parts, Slot, Training, build, work_packed
from selectra.registry import datasets, models, recipes, tasks
from selectra.spec import Run, Spec, override
from selectra.train.precision import autocast

MEASURED, WARM = 30, 3
# The first step.
PREPARED = 1


def find_run(recipe: str, seed: int, changes: Sequence[str]) -> Run:
    """A recipe's run with this seed, without validation images, and with changes."""
    run = override(recipes.build(Spec(recipe)), ["data.val=0", f"train.seed={seed}", *changes])
    typed = {"model": models.typed(run.model), "data": datasets.typed(run.data), "task": tasks.typed(run.task)}
    return run.model_copy(update=typed)


def measure(recipe: str, changes: Sequence[str], library: Library, seed: int = 0) -> dict[str, Any]:
    """One recipe's model alone: parameters and FLOPs of an image; on a GPU also time and memory of a step, inference.

    Args:
        changes: To the recipe's run, as on the command line.
        library: The data, and the device.
        seed: What the model is drawn from.
    """
    run, device = find_run(recipe, seed, changes), library.device
    # The graph takes its images and rates from tables of as many rows as there are steps, and cannot say that they end.
    if run.train.steps is not None:
        run = override(run, [f"train.steps={max(run.train.steps, PREPARED + WARM + MEASURED)}"])
    parts = library(run.data)
    model, task = build(run, parts, device)
    model.eval()
    image = parts.train.plain(torch.zeros(1, dtype=torch.long, device=device))
    found = {
        "recipe": recipe, "model": run.model.to_json(), "parameters": sum(p.numel() for p in model.parameters()),
        "gflops": count_flops(model, image) / 1e9,
    }  # fmt: skip
    if device.type != "cuda":
        return found
    slot = Slot(device)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    training = ImagesOnDevice(model, task, parts.train, parts.images.augment, run, slot.stream, slot.pool)
    training.prepare()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    step = timed(training.step_again, slot)
    batch = run.train.batch_size
    infer = _inference(training.model, parts, run, slot)
    return {
        **found, "batch_size": batch, "train_ms": 1e3 * step, "train_images_per_s": batch / step,
        "inference_ms": 1e3 * infer, "inference_images_per_s": batch / infer, "peak_gib": peak / 2**30,
        "backends": training.backends,
    }  # fmt: skip


def train(
    wanted: Iterable[tuple[str, int]], changes: Sequence[str], library: Library, packed: int, until: float,
    on_done: Callable[[dict[str, Any]], None],
) -> list[tuple[str, int]]:  # fmt: skip
    """Train recipes with seeds, `packed` at a time; returns what was not begun before `until`.

    Args:
        wanted: Recipes with seeds, in order.
        changes: To every run, as on the command line.
        library: The data, and the device.
        until: Moment of `time.monotonic`.
        on_done: Called with the row of every training that has ended, the test part opened once for it.
    """
    left = list(wanted)

    def take() -> Job | None:
        if not left:
            return None
        key = left.pop(0)
        return Job(key, find_run(*key, changes))

    work_packed(library, packed, take, lambda training: on_done(_row(training, packed)), until)
    return left


def _row(training: Training, packed: int) -> dict[str, Any]:
    done, (recipe, seed) = training.on_device, training.job.key
    losses = done.losses.cpu()
    return {
        "recipe": recipe, "seed": seed, "test": training.measure(training.parts.test),
        "test_last_weights": training.measure(training.parts.test, done.model),
        "steps": done.steps, "seconds": done.seconds, "packed": packed,
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
