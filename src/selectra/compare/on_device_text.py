"""Trainings of language models that stay on their device: tokens, order, learning rates and best weights lie there.

As `on_device` for series, with the same two CUDA graphs, a step and a piece of an evaluation. Beside `train.loop.fit`
from the same seed: the same pieces in the same passes, but batches go on over the end of a pass, so that all are of one
size, and the gradient is that of the mean. The last weights are measured too, before the best ones are taken.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from selectra.compare.on_device import OnDevice, Outcome, _between, _mark, rates_of
from selectra.compare.on_device_images import order_of
from selectra.data.held_text import HeldSplit, HeldText
from selectra.errors import ConfigError
from selectra.spec import Run
from selectra.tasks.language import Language, measured, metrics_of
from selectra.train.optim import make_optimizer
from selectra.train.precision import autocast

# Tokens in one piece of an evaluation: bounds its memory.
EVALUATED_TOKENS = 2**14
HELD_OUT = ("val", "test")


class TextOnDevice(OnDevice):
    """One training on one stream.

    Args:
        model: On the device, freshly seeded.
        task: Its loss.
        held: All tokens, on the device.
        splits: Where train, val and test lie in them.
        run: Its optimizer, length, batch and seed.
        stream: The stream of this training's graphs; None runs every step as it is called.
        pool: Memory that graphs of this stream share.
    """

    def __init__(
        self, model: nn.Module, task: Language, held: HeldText, splits: dict[str, HeldSplit], run: Run,
        stream: torch.cuda.Stream | None = None, pool: Any = None,
    ) -> None:  # fmt: skip
        _require_simple(run, splits)
        self.model, self.task, self.held, self.splits, self.run = model, task, held, splits, run
        self.stream, self.pool, self.device = stream, pool, held.tokens.device
        train = splits["train"]
        order, _ = order_of(train.count, run)
        self.order = (train.first + train.stride * order).to(self.device)
        self.train_end = torch.tensor(train.end, device=self.device)
        self.steps = len(self.order)
        self.eval_every = run.train.eval_every or max(1, train.count // run.train.batch_size)
        self.rate_table = torch.tensor(rates_of(run.optim, self.steps), device=self.device)
        self.rate = torch.tensor(run.optim.lr, device=self.device)
        groups = make_optimizer(model, run.optim).param_groups
        self.optimizer = AdamW(
            [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups],
            lr=self.rate, betas=run.optim.betas, fused=True, capturable=self.device.type == "cuda",
        )  # fmt: skip
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.state = [*model.parameters(), *model.buffers()]
        self.best = [tensor.detach().clone() for tensor in self.state]
        self.number = torch.zeros(1, dtype=torch.long, device=self.device)
        self._make_evaluation()
        self.done = self.evaluated = 0
        self.step_again: Callable[[], None] = self._step
        self.evaluate_again: Callable[[], None] = self._evaluate
        self.note_again: Callable[[], None] = self._note

    def _make_evaluation(self) -> None:
        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.piece = max(1, EVALUATED_TOKENS // self.held.seq_len)
        stride = self.splits["val"].stride
        self.in_piece = stride * torch.arange(self.piece, device=self.device)
        self.cursor, self.end = zeros(dtype=torch.long), zeros(dtype=torch.long)
        self.sums = zeros(3)
        self.history = zeros(ceil(self.steps / self.eval_every), 3)
        self.at_history, self.best_at = zeros(1, dtype=torch.long), zeros(1, dtype=torch.long)
        self.best_score = torch.tensor(inf, dtype=torch.float64, device=self.device)
        # Loss of every step, and of the last and the best weights the sums of val and test.
        self.losses = zeros(self.steps, dtype=torch.float32)
        self.found = zeros(2, len(HELD_OUT), 3)

    def _step(self) -> None:
        """One optimizer step; everything it reads and writes is on the device."""
        self.rate.copy_(self.rate_table.index_select(0, self.number)[0])
        batch = self.held.batch(self.order.index_select(0, self.number)[0], self.train_end)
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self.device, self.run.train.precision):
            loss = self.task.loss(self.model, batch)
        mean = loss.sum / loss.count
        mean.backward()
        if self.run.optim.clip is not None:
            nn.utils.clip_grad_norm_(self.trained, self.run.optim.clip)
        self.optimizer.step()
        self.losses.index_copy_(0, self.number, mean.detach()[None].float())
        self.number += 1

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Add the sums of the next pieces."""
        with autocast(self.device, self.run.train.precision):
            self.sums += measured(self.model, self.held.batch(self.cursor + self.in_piece, self.end))
        self.cursor += self.piece * self.splits["val"].stride

    @torch.no_grad()
    def _note(self) -> None:
        """Note the validation sums, keep the weights where they are the best so far, and begin the sums anew."""
        score = self.sums[0] / self.sums[1]
        better = score < self.best_score
        for kept, now in (
            (self.best_score, score), (self.best_at, self.number), *zip(self.best, self.state, strict=True),
        ):  # fmt: skip
            kept.copy_(torch.where(better, now, kept))
        self.history.index_copy_(0, self.at_history, self.sums[None])
        self.at_history += 1
        self._begin("val")

    def _begin(self, part: str) -> None:
        split = self.splits[part]
        self.sums.zero_()
        self.cursor.fill_(split.first)
        self.end.fill_(split.end)

    def pieces(self, part: str) -> int:
        """Calls of an evaluation that a part takes."""
        return ceil(self.splits[part].count / self.piece)

    @torch.no_grad()
    def finish(self) -> None:
        """Measure the last weights, take the best ones and measure these too: do it, or queue it."""
        with self.on_stream():
            for which in range(2):
                if which:
                    for now, kept in zip(self.state, self.best, strict=True):
                        now.copy_(kept)
                for i, part in enumerate(HELD_OUT):
                    self._begin(part)
                    for _ in range(self.pieces(part)):
                        self.evaluate_again()
                    self.found[which, i].copy_(self.sums)
            self.ended = _mark(self.device)

    def outcome(self) -> Outcome:
        """The result; waits for the device. A split without targets has no loss: `nan`."""
        with self.on_stream():
            found, history, losses = self.found.cpu(), self.history.cpu(), self.losses.cpu()
            last, best = ({part: metrics_of(sums[i]) for i, part in enumerate(HELD_OUT)} for sums in found)
            # Both held-out parts together.
            whole = {name: metrics_of(sums.sum(0)) for name, sums in zip(("last", "best"), found, strict=True)}
            return Outcome(
                best["val"], best["test"], int(self.best_at), self.steps, _between(self.began, self.ended),
                [metrics_of(sums) for sums in history],
                {"last": last, "held_out": whole, "losses": losses[:: max(1, len(losses) // 50)].tolist()},
            )  # fmt: skip


def _require_simple(run: Run, splits: dict[str, HeldSplit]) -> None:
    """Refuse what only the loop does, and what has nothing to be measured on."""
    asked = {
        "train.accumulate": run.train.accumulate != 1,
        "train.patience": run.train.patience is not None,
        "train.precision, float16": run.train.precision == "float16",
        "train.compile": run.train.compile,
        "train.deterministic": run.train.deterministic,
        "train.ema": run.train.ema is not None,
        "train.epochs, but train.steps": run.train.steps is None,
    }
    refused = [name for name, wrong in asked.items() if wrong]
    if refused:
        raise ConfigError(f"a training that stays on the device does not take {refused[0]}; use train.loop.fit.")
    if not splits["val"].count:
        raise ConfigError("there is no validation part to choose the best weights on; give it a share in data.shares.")
