"""How a training ends before its time: asked to by a signal, or because its numbers went wrong."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class StoppedError(RuntimeError):
    """Training was asked to stop; its state is saved.

    Args:
        step: Optimizer steps that are done and saved; None where the stop came outside a training.
        command: The command that goes on from there, or "" where nothing could be saved.
        by_hand: Whether a person asked (SIGINT) rather than a system that takes its machine back (SIGTERM), for which
            a stop with everything saved is no failure.
    """

    def __init__(self, step: int | None, command: str, by_hand: bool = True) -> None:
        when = "stopped at once; what was saved before is kept" if step is None else f"stopped after step {step}"
        super().__init__(f"{when}; " + (f"go on with: {command}" if command else "nothing is saved."))
        self.step = step
        self.command = command
        self.by_hand = by_hand


class DivergedError(ArithmeticError):
    """The loss or a gradient is no longer a finite number."""


class StalledError(RuntimeError):
    """What a training waits for has not come within its time limit, or cannot come any more."""


class DeviceMemoryError(RuntimeError):
    """The device's memory is full; the message says what to change."""


# Ends of a training that a person must see to.
FAILED = (DivergedError, StalledError, DeviceMemoryError)


class StopFlag:
    """Whether a stop was asked for, here."""

    def __init__(self) -> None:
        self.asked = False
        self.by_hand = False
        """Whether by SIGINT."""


@contextlib.contextmanager
def stopping_gently() -> Iterator[StopFlag]:
    """Inside the block SIGINT and SIGTERM set a flag; a second one acts as it did before.

    Under torchrun further SIGTERMs are ignored: a cluster sends one to every process, and torchrun hands its own on.

    Signals can be caught in the main thread only; elsewhere the flag stays unset.
    """
    flag = StopFlag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: FrameType | None) -> None:
        flag.asked = True
        flag.by_hand = flag.by_hand or number == signal.SIGINT
        if number == signal.SIGINT or "WORLD_SIZE" not in os.environ:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
