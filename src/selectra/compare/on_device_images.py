"""Trainings of image models that stay on their device: images, order, learning rates and running means lie there.

As `on_device` for series: on a GPU the whole step, drawing of views included, is one CUDA graph, so that one thread
drives several trainings side by side. Beside `train.loop.fit` from the same seed: the same views of the same images,
but batches go on over the end of a pass, so that all are of one size, and there is no validation: a training ends
after its steps and keeps its last weights, or their running mean.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from selectra.compare.on_device import _between, _mark, _own_generator, rates_of
from selectra.errors import ConfigError
from selectra.spec import Run
from selectra.tasks import Task
from selectra.train.depth import training_mode
from selectra.train.optim import make_optimizer
from selectra.train.precision import autocast
from selectra.train.record import BackendWatch


def order_of(n_images: int, run: Run) -> tuple[Tensor, Tensor]:
    """The images of every step `(steps, batch)`, and the pass that each belongs to: seeded permutations end to end.

    Every pass is the loop's own: torch's DistributedSampler seeds a permutation with the sum of seed and pass.
    """
    steps, size = run.train.steps, run.train.batch_size
    assert steps is not None
    n_passes = -(-steps * size // n_images)
    generator = torch.Generator()
    passes = [torch.randperm(n_images, generator=generator.manual_seed(run.train.seed + i)) for i in range(n_passes)]
    epochs = torch.arange(n_passes).repeat_interleave(n_images)
    kept = steps * size
    return torch.cat(passes)[:kept].view(steps, size), epochs[:kept].view(steps, size)


class ImagesOnDevice:
    """One training on one stream.

    Args:
        model: On the device, freshly seeded.
        task: Its loss.
        held: The training images, with classes or masks, on the device.
        augment: How they are seen.
        run: Its optimizer, length, batch and seed.
        stream: The stream of this training's graph; None runs every step as it is called.
        pool: Memory that the graph takes from.
    """

    def __init__(
        self, model: nn.Module, task: Task, held: Any, augment: Any, run: Run,
        stream: torch.cuda.Stream | None = None, pool: Any = None,
    ) -> None:  # fmt: skip
        _require_simple(run)
        self.model, self.task, self.run, self.augment = model, task, run, augment
        self.held = held.with_tables(augment).to(held.pixels.device)
        self.stream, self.pool, self.device = stream, pool, held.pixels.device
        if run.train.channels_last:
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.order, self.epochs = (part.to(self.device) for part in order_of(len(held.labels), run))
        self.steps = len(self.order)
        self.rate_table = torch.tensor(rates_of(run.optim, self.steps), device=self.device)
        self.rate = torch.tensor(run.optim.lr, device=self.device)
        groups = make_optimizer(model, run.optim).param_groups
        self.optimizer = AdamW(
            [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups],
            lr=self.rate, betas=run.optim.betas, fused=True, capturable=self.device.type == "cuda",
        )  # fmt: skip
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.number = torch.zeros(1, dtype=torch.long, device=self.device)
        self.losses = torch.zeros(self.steps, device=self.device)
        self.done = 0
        self.step_again: Callable[[], None] = self._step
        self._make_mean()

    def _make_mean(self) -> None:
        """The running mean of weights and statistics; it and its decays lie on the device."""
        self.mean = None if self.run.train.ema is None else copy.deepcopy(self.model).eval()
        if self.mean is None:
            return
        n = torch.arange(self.steps, device=self.device, dtype=torch.float32)
        self.decays = ((1 + n) / (10 + n)).clamp(max=self.run.train.ema)
        # The first weights are taken as they are.
        self.decays[0] = 0
        pairs = list(zip(self.mean.state_dict().values(), self.model.state_dict().values(), strict=True))
        self.averaged = [(a, b) for a, b in pairs if a.is_floating_point()]
        self.copied = [(a, b) for a, b in pairs if not a.is_floating_point()]

    def _step(self) -> None:
        """One optimizer step; everything it reads and writes is on the device."""
        rows = self.order.index_select(0, self.number)[0]
        epochs = self.epochs.index_select(0, self.number)[0]
        self.rate.copy_(self.rate_table.index_select(0, self.number)[0])
        batch = self.held.batch(rows, self.augment, self.run.train.seed, epochs)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.run.train.precision):
            loss = self.task.loss(self.model, batch)
        # Pixels that count may be none.
        mean = loss.sum / loss.count.clamp(min=1)
        mean.backward()
        if self.run.optim.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.run.optim.clip)
        self.optimizer.step()
        self.losses.index_copy_(0, self.number, mean.detach()[None].float())
        self._average()
        self.number += 1

    @torch.no_grad()
    def _average(self) -> None:
        if self.mean is None:
            return
        decay = self.decays.index_select(0, self.number)[0]
        means, news = [a for a, _ in self.averaged], [b for _, b in self.averaged]
        torch._foreach_mul_(means, decay)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(means, torch._foreach_mul(news, 1 - decay))  # pyright: ignore[reportPrivateImportUsage]
        for mean, new in self.copied:
            mean.copy_(new)

    def prepare(self) -> None:
        """Take the first step, and record the graph of all others."""
        with _own_generator(self.device, self.run.train.seed), self.on_stream():
            self.began = _mark(self.device)
            training_mode(self.model)
            watch = BackendWatch()
            with watch:
                self._step()
            self.backends = watch.found()
            self.done = 1
            self.optimizer.zero_grad(set_to_none=True)
            if self.stream is not None:
                self.step_again = self._record()

    def on_stream(self) -> Any:
        """What follows goes to this training's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _record(self) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            self._step()
        finally:
            graph.capture_end()
        return graph.replay

    def advance(self, steps: int) -> bool:
        """Do, or queue, so many steps; whether there is more to come."""
        with self.on_stream():
            for _ in range(min(steps, self.steps - self.done)):
                self.step_again()
                self.done += 1
            if self.done == self.steps:
                self.ended = _mark(self.device)
        return self.done < self.steps

    def stop(self) -> None:
        """End here; what is queued runs yet."""
        with self.on_stream():
            self.ended = _mark(self.device)
        self.steps = self.done

    @property
    def final(self) -> nn.Module:
        """What the training came to."""
        return self.model if self.mean is None else self.mean

    @property
    def seconds(self) -> float:
        """From the first step to the last, on the device's clock where that is a GPU; waits for it."""
        if self.stream is not None:
            self.ended.synchronize()
        return _between(self.began, self.ended)


def refusal(run: Run) -> str | None:
    """What a run asks for that only the loop does; None where there is nothing of that."""
    asked = {
        "train.accumulate": run.train.accumulate != 1,
        "train.patience": run.train.patience is not None,
        "train.epochs in place of train.steps": run.train.steps is None,
        "train.precision, float16": run.train.precision == "float16",
        "train.compile": run.train.compile,
        "train.deterministic": run.train.deterministic,
        "train.recompute": run.train.recompute,
        "optim.layer_decay": run.optim.layer_decay != 1,
    }
    return next((name for name, wrong in asked.items() if wrong), None)


def _require_simple(run: Run) -> None:
    found = refusal(run)
    if found is not None:
        raise ConfigError(f"a training that stays on the device does not take {found}; use train.loop.fit.")
