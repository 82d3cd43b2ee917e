"""Batches from processes that prepare them: a fault in one is named, and a wait for them has a limit."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from selectra.errors import ConfigError, DataError
from selectra.train.stop import StalledError

T = TypeVar("T")
STOPS, SENDERS_KNOWN = {signal.SIGINT, signal.SIGTERM}, hasattr(signal, "sigwaitinfo")
TIMED_OUT, DIED = "DataLoader timed out", "DataLoader worker (pid"


@dataclass(frozen=True)
class Made:
    """A batch and the samples left out of it, or why there is none: an error keeps its own words on the way."""

    batch: Any = None
    left_out: tuple[str, ...] = ()
    problem: Exception | None = None


class _Whole(Dataset[Made]):
    """A split that gives batches by lists of numbers."""

    def __init__(self, windows: Any) -> None:
        self.windows = windows

    def __getitem__(self, indices: list[int]) -> Made:
        try:
            return Made(self.windows[indices], tuple(taken(self.windows)))
        except (ConfigError, DataError) as error:
            return Made(problem=error)


class _Coming(IterableDataset[Made]):
    """A stream of batches."""

    def __init__(self, batches: IterableDataset[Any], windows: Any) -> None:
        super().__init__()
        self.batches, self.windows = batches, windows

    def __iter__(self) -> Iterator[Made]:
        if get_worker_info() is not None:
            # A process begins with a copy of what the training process has not told yet.
            taken(self.windows)
        try:
            for batch in self.batches:
                yield Made(batch, tuple(taken(self.windows)))
            # Behind the last batch, too.
            if names := taken(self.windows):
                yield Made(left_out=tuple(names))
        except (ConfigError, DataError) as error:
            yield Made(problem=error)


def taken(windows: Any) -> list[str]:
    """The samples that a split has left out since this was asked last; the names are taken from it."""
    names = getattr(windows, "left_out", None) or []
    found = list(names)
    names.clear()
    return found


def _same(item: T) -> T:
    return item


def load(
    split: Any, indices: Iterable[Any] | None, workers: int, limit: float = 0.0, names: Any = None
) -> Iterator[Any]:
    """Batches, prepared by so many processes.

    Args:
        split: What gives batches by the items of `indices`; a stream of them where there are none.
        indices: In order; they may be without end.
        limit: Seconds that a wait for a process may take; 0 for no limit, and without processes there is none.
        names: Has the list `left_out`, to which the samples that processes leave out are added.

    Raises:
        StalledError: A process did not prepare a batch in time, or it has ended.
        DataError: As the split raises it.
    """
    streamed = indices is None
    # Its own generator: making a loader must not draw from the generator that dropout uses, or a resumed run differs.
    loader = DataLoader(
        cast(Dataset[Made], _Coming(split, names) if streamed else _Whole(split)),
        batch_size=None,
        sampler=indices,
        collate_fn=_same,
        num_workers=workers,
        timeout=limit if workers else 0,
        generator=torch.Generator(),
        worker_init_fn=_hear_the_training_alone,
    )
    with _stops_held():
        batches = iter(loader)
    while True:
        try:
            made = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            _end(batches)
            raise _named(error, workers, limit) from error
        if made.left_out:
            names.left_out.extend(made.left_out)
        if made.problem is not None:
            _end(batches)
            raise made.problem
        if made.batch is not None:
            yield made.batch


@contextlib.contextmanager
def naming_ended(workers: int) -> Iterator[None]:
    """Inside the block the end of a process that prepares batches has its name, also while none of them is waited for.

    PyTorch's handler of SIGCHLD raises wherever the main thread happens to be.

    Raises:
        StalledError: A process that prepares batches has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(DIED):
            raise
        raise _named(error, workers, 0.0) from error


def _hear_the_training_alone(_: int) -> None:
    """A process that prepares batches leaves stops to the training, and ends when the training says so.

    A cluster sends SIGTERM to every process, a terminal SIGINT: the training, which saves, still needs its batches.
    Where signals do not tell who sent them (macOS, Windows) they end the process as ever.
    """
    training = multiprocessing.parent_process()
    if training is None or not SENDERS_KNOWN:
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def hear() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training.pid:
            pass
        os._exit(0)

    threading.Thread(target=hear, daemon=True).start()


@contextlib.contextmanager
def _stops_held() -> Iterator[None]:
    """Inside the block no stop arrives: forked processes begin so, and the training hears of it after."""
    # What a server of forks inherits would stay with all its processes, also with those of others.
    if not SENDERS_KNOWN or multiprocessing.get_start_method() != "fork":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _named(error: RuntimeError, workers: int, limit: float) -> RuntimeError:
    said = str(error)
    if said.startswith(TIMED_OUT):
        return StalledError(
            f"none of the {workers} processes that prepare batches gave the next one within {limit:g} s "
            "(train.load_timeout). The disk or server that they read from does not answer, or one batch takes longer: "
            "look there, raise train.load_timeout, or find the sample with train.workers=0."
        )
    if said.startswith(DIED):
        return StalledError(
            f"a process that prepares batches has ended: {said.partition(chr(10))[0]} Often the machine had no memory "
            "left: lower train.workers or train.batch_size, and see the system's log."
        )
    return error


def _end(batches: Any) -> None:
    """End processes that hang: the loader itself would wait five seconds for each."""
    processes = getattr(batches, "_workers", [])
    for process in processes:
        process.terminate()
    until = time.monotonic() + 1.0
    for process in processes:
        process.join(max(until - time.monotonic(), 0.0))
        # One that hangs outside of Python does not hear; PyTorch's handler of SIGCHLD tells what is known.
        with contextlib.suppress(RuntimeError):
            process.kill()
            process.join(1.0)
