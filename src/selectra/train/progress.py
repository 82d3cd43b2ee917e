"""What a training shows while it runs: a bar on a terminal, plain lines elsewhere, and an honest time left."""

import time
from collections.abc import Callable
from math import exp, isnan
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

# Until an evaluation was timed: a forward pass is about a third of a training step.
FORWARD_SHARE = 1 / 3
# The latest steps, by which those to come are judged; a step of so many times their median is a single event.
RECENT, LONG = 200, 3.0
# Steps after which a time left is told.
FIRST = 4
# What is shown comes nearer to a new estimate within this share of the time left.
SETTLING = 0.03
# Seconds between two changes of the bar.
PAUSE = 0.1
# A share of the time in which a training waits for data that is worth telling.
WAITING = 0.1
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
    """Measured times of steps, evaluations and checkpoints, and what is left by them.

    Args:
        steps: Optimizer steps in all.
        eval_every: Optimizer steps between evaluations.
        batches: Batches in one step, and in one evaluation.
        save_every: Optimizer steps between checkpoints; None where none are written.
        begin: Steps that are done already.
        now: Tells the time in seconds.
    """

    def __init__(
        self, steps: int, eval_every: int, batches: tuple[int, int], save_every: int | None = None, begin: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self.steps, self.batches, self.now = steps, batches, now
        self.every = {"evaluation": eval_every, "checkpoint": save_every}
        self.times: dict[str, list[float]] = {"step": [], "evaluation": [], "checkpoint": []}
        # The step after which each was done last.
        self.done = dict.fromkeys(self.every, begin)
        # Seconds by which steps were longer than steps are.
        self._beyond = 0.0
        self._shown: tuple[float, float] | None = None

    @property
    def started(self) -> bool:
        """Whether a step was taken."""
        return bool(self.times["step"])

    @property
    def knows_all(self) -> bool:
        """Whether everything that is yet to come was timed once."""
        return all(self.times[what] for what, every in self.every.items() if every is not None)

    def took(self, what: str, seconds: float, step: int = 0) -> None:
        """Note a "step", an "evaluation" or a "checkpoint"; of the last two, after which step."""
        if what == "step" and len(self.times[what]) > 1:
            self._beyond += max(0.0, seconds - LONG * self._median())
        self.times[what].append(seconds)
        if what in self.done:
            self.done[what] = step

    def _recent(self) -> list[float]:
        # The first step also compiles, looks for algorithms, fills caches.
        times = self.times["step"]
        return times[-RECENT:] if len(times) > RECENT else times[1:] or times

    def _median(self) -> float:
        recent = sorted(self._recent())
        return recent[len(recent) // 2]

    def _each_step(self) -> float:
        """Seconds of a step: the mean of the latest; single long ones are spread over all steps, those to come too."""
        recent, most = self._recent(), LONG * self._median()
        return sum(min(seconds, most) for seconds in recent) / len(recent) + self._beyond / self.steps

    def _each(self, what: str) -> float:
        """Seconds of an evaluation or of a checkpoint."""
        recent = self.times[what][-5:]
        if recent:
            return sum(recent) / len(recent)
        per_step, per_eval = self.batches
        return self._each_step() / per_step * per_eval * FORWARD_SHARE if what == "evaluation" else 0.0

    def left(self, step: int) -> float:
        """Seconds left after `step` steps, evaluations and checkpoints included, if every step is taken."""
        if not self.started:
            return float("nan")
        seconds = (self.steps - step) * self._each_step()
        for what, every in self.every.items():
            if every is not None:
                # One at the end as well.
                seconds += (-(-self.steps // every) - self.done[what] // every) * self._each(what)
        return seconds

    def shown(self, step: int) -> float:
        """As `left`, moved towards it little by little: what is shown goes down by a second a second, mostly.

        Not a number after the very first steps, of which nothing follows.
        """
        found, now = self.left(step), self.now()
        if len(self.times["step"]) < FIRST and step < self.steps:
            return float("nan")
        if self._shown is not None and found > 0:
            before, at = self._shown
            expected, passed = max(before - (now - at), 0.0), min(now - at, 1.0)
            found = expected + (found - expected) * (1 - exp(-passed / max(SETTLING * found, 1.0)))
        self._shown = found, now
        return found


class Display:
    """Shows a training on a console; on none, nothing."""

    def __init__(self, console: Console | None, clock: Clock, title: str, early: bool) -> None:
        self.console = console
        self.clock = clock
        # With early stopping the time is a bound; before all was seen once, from the other side.
        self.about = "at most" if early else "about"
        self.metrics = ""
        self.loss: float | None = None
        self.started = time.monotonic()
        self.rate = self.wait = self._changed = 0.0
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

    def step(self, step: int, loss: float, rate: float = 0.0, wait: float = 0.0) -> None:
        """One more step is done.

        Args:
            rate: Samples a second.
            wait: Share of the time in which the step waited for its data.
        """
        self.loss, now = loss, time.monotonic()
        # What one step did jumps; the mean of some does not.
        self.rate += (rate - self.rate) * (0.1 if self.rate else 1.0)
        self.wait += (wait - self.wait) * 0.1
        if self._bar is not None and (now - self._changed > PAUSE or step == self.clock.steps):
            self._changed = now
            numbers = f"loss {loss:.4f}  {self.speed}  {self.metrics}"
            self._bar.update(self._row, completed=step, left=self._left(step), numbers=numbers)

    @property
    def speed(self) -> str:
        """Samples a second, and the share of waiting for data where it is large."""
        waiting = f", {self.wait:.0%} of the time waiting for data" if self.wait > WAITING else ""
        return f"{self.rate:.3g}/s{waiting}"

    def _left(self, step: int) -> str:
        seconds = self.clock.shown(step)
        about = self.about if self.clock.knows_all or step == self.clock.steps else "more than"
        return "" if isnan(seconds) else f"{about} {duration(seconds)} left"

    def left_out(self, count: int) -> None:
        """Samples that could not be read were left out."""
        if self.console is not None and count:
            what = "1 sample" if count == 1 else f"{count} samples"
            line = f"left out, because unreadable: {what}; the record names each"
            self.console.print(line, highlight=False, soft_wrap=True)

    def evaluated(self, step: int, metrics: dict[str, float], best: bool) -> None:
        """An evaluation is done."""
        self.metrics = "validation " + " ".join(
            f"{name} {value:.4f}" for name, value in list(metrics.items())[:MOST_SHOWN]
        )
        if self.console is None or self._bar is not None:
            return
        shown = "" if self.loss is None else f"loss {self.loss:.4f}, "
        times = f"{duration(time.monotonic() - self.started)} so far"
        if self.clock.started and step < self.clock.steps:
            left = self._left(step)
            times += f" ({self.speed})" + (f", {left}" if left else "")
        mark = " (best so far)" if best else ""
        line = f"step {step}/{self.clock.steps}: {shown}{self.metrics}{mark}, {times}"
        self.console.print(line, highlight=False, soft_wrap=True)
