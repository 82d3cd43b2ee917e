"""What a training shows while it runs: a bar on a terminal, plain lines elsewhere, and an honest time left."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Until an evaluation was timed: a forward pass is about a third of a training step.
FORWARD_SHARE = 1 / 3
# Metrics in a line; the others are in the record.
MOST_SHOWN = 5


def duration(seconds: float) -> str:
    """Seconds as a person says them: "42 s", "3 min 05 s", "1 h 20 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Clock:
    """Measured times of steps and evaluations, and what is left by them.

    Args:
        steps: Optimizer steps in all.
        eval_every: Optimizer steps between evaluations.
        batches: Batches in one step, and in one evaluation.
    """

    def __init__(self, steps: int, eval_every: int, batches: tuple[int, int]) -> None:
        self.steps = steps
        self.eval_every = eval_every
        self.batches = batches
        self.step_times: list[float] = []
        self.eval_times: list[float] = []

    def left(self, step: int) -> float:
        """Seconds left after `step` steps, evaluations included, if every step is taken."""
        if not self.step_times:
            return float("nan")
        # The median of the latest steps: one slow step does not move it.
        recent = sorted(self.step_times[-100:])
        each = recent[len(recent) // 2]
        per_step, per_eval = self.batches
        evaluation = self.eval_times[-1] if self.eval_times else each / per_step * per_eval * FORWARD_SHARE
        n_left = -(-self.steps // self.eval_every) - step // self.eval_every
        return (self.steps - step) * each + n_left * evaluation


class Display:
    """Shows a training on a console; on none, nothing."""

    def __init__(self, console: Console | None, clock: Clock, title: str, early: bool) -> None:
        self.console = console
        self.clock = clock
        # With early stopping the time is a bound.
        self.about = "at most" if early else "about"
        self.metrics = ""
        self.loss: float | None = None
        self.started = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[numbers]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._row = self._bar.add_task(title, total=clock.steps, left="", numbers="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, loss: float) -> None:
        """One more step is done."""
        self.loss = loss
        if self._bar is not None:
            left = f"{self.about} {duration(self.clock.left(step))} left" if self.clock.step_times else ""
            self._bar.update(self._row, completed=step, left=left, numbers=f"loss {loss:.4f}  {self.metrics}")

    def evaluated(self, step: int, metrics: dict[str, float], best: bool) -> None:
        """An evaluation is done."""
        self.metrics = "validation " + " ".join(
            f"{name} {value:.4f}" for name, value in list(metrics.items())[:MOST_SHOWN]
        )
        if self.console is None or self._bar is not None:
            return
        shown = "" if self.loss is None else f"loss {self.loss:.4f}, "
        times = f"{duration(time.monotonic() - self.started)} so far"
        if self.clock.step_times and step < self.clock.steps:
            times += f", {self.about} {duration(self.clock.left(step))} left"
        mark = " (best so far)" if best else ""
        line = f"step {step}/{self.clock.steps}: {shown}{self.metrics}{mark}, {times}"
        self.console.print(line, highlight=False, soft_wrap=True)
