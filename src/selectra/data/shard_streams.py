"""A shard's bytes from a disk, a web server or a command's output, read ahead by a thread, each wait with a limit.

A web server is asked again where it stopped; an object store is read through its own command, or any other by `pipe:`.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from selectra.data.download import PASSING, Limits
from selectra.errors import ConfigError, DataError

PIECE = 1 << 18
# Pieces that are read ahead of each open shard.
AHEAD = 4
# Seconds between two looks of a waiting thread at whether it is still wanted.
LOOK = 0.2
WEB = ("http://", "https://")


class SlowError(DataError):
    """Nothing came within the time limit."""


def webdataset(module: str = "") -> Any:
    """A module of the package webdataset, of the extra "scale".

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(f"webdataset.{module}" if module else "webdataset")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"shards need {error.name}, which is not installed: pip install 'selectra[scale]'."
        ) from error


def is_local(url: str) -> bool:
    """Whether it is a path of this machine."""
    return "://" not in url and not url.startswith("pipe:")


class Ahead:
    """A shard's bytes from a place on, as `tarfile` reads them.

    `count` says how many bytes were handed out, `problem` why no more come.

    Args:
        url: A path, an address of http or https, "pipe:COMMAND", "s3://...", or what webdataset opens.
        first: Place of the first byte; of pipes it is read up to.
        limits: `stall` is for each answer of a server, `total` for whatever `begin` begins.
    """

    def __init__(self, url: str, first: int = 0, limits: Limits | None = None) -> None:
        self.url, self.limits = url, limits or Limits()
        self.problem: DataError | None = None
        self.count = 0
        self._queue: queue.Queue[bytes | DataError] = queue.Queue(AHEAD)
        self._closed = threading.Event()
        self._stops: list[Callable[[], None]] = []
        self._piece, self._at = b"", 0
        self.begin()
        pieces = self._web(first) if url.startswith(WEB) else self._rest(first)
        threading.Thread(target=self._run, args=(pieces,), daemon=True).start()

    def begin(self) -> None:
        """What is read from now on must come within `limits.total` seconds."""
        self._until = time.monotonic() + self.limits.total

    def read(self, n: int) -> bytes:
        """The next n bytes, fewer only at the end.

        Raises:
            SlowError: They did not come in time.
            DataError: They cannot be had.
        """
        parts = []
        while n > 0 and (part := self._some(n)):
            parts.append(part)
            n -= len(part)
        return b"".join(parts)

    def _some(self, n: int) -> bytes:
        if self.problem is not None:
            raise self.problem
        if self._at == len(self._piece):
            try:
                found = self._queue.get(timeout=max(self._until - time.monotonic(), 0))
            except queue.Empty:
                found = SlowError(f"nothing came within the time limit of {self.limits.total:g} s (data.timeout)")
            if isinstance(found, DataError):
                self.problem = found
                self.close()
                raise found
            if not found:
                # The end stays the end.
                self._queue.put_nowait(b"")
            self._piece, self._at = found, 0
        taken = self._piece[self._at : self._at + n]
        self._at += len(taken)
        self.count += len(taken)
        return taken

    def close(self) -> None:
        """Let go of file, connection or process."""
        self._closed.set()
        for stop in self._stops:
            stop()

    def _run(self, pieces: Iterator[bytes]) -> None:
        last: bytes | DataError = b""
        try:
            for piece in pieces:
                if not self._hand(piece):
                    return
        except DataError as error:
            last = error
        except (OSError, ValueError, HTTPException) as error:
            last = DataError(f"{type(error).__name__}: {error}")
        self._hand(last)

    def _hand(self, item: bytes | DataError) -> bool:
        while not self._closed.is_set():
            with contextlib.suppress(queue.Full):
                self._queue.put(item, timeout=LOOK)
                return True
        return False

    def _rest(self, first: int) -> Iterator[bytes]:
        """Of a file, from its place on; of a process, what comes behind it."""
        if is_local(self.url):
            with Path(self.url).open("rb") as file:
                file.seek(first)
                yield from iter(lambda: file.read(PIECE), b"")
            return
        command = self.url.removeprefix("pipe:")
        if self.url.startswith("s3://"):
            command = f"aws s3 cp {shlex.quote(self.url)} -"
        elif command == self.url:
            yield from _behind(self._opened_elsewhere(), first)
            return
        yield from _behind(self._output(command), first)

    def _output(self, command: str) -> Iterator[bytes]:
        """What a command of the shell writes; it must end well."""
        with tempfile.TemporaryFile() as complaints:
            process = subprocess.Popen(
                command, shell=True, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True
            )
            self._stops.append(lambda: _end(process))
            assert process.stdout is not None
            with process.stdout as output:
                yield from iter(lambda: os.read(output.fileno(), PIECE), b"")
            try:
                status = process.wait(self.limits.stall)
            except subprocess.TimeoutExpired as error:
                raise DataError(
                    f"the command closed its output and did not end within {self.limits.stall:g} s"
                ) from error
            complaints.seek(0)
            said = complaints.read().decode(errors="replace").strip()[-300:]
        if status:
            raise DataError(f"the command ended with {status}: {said or 'it said nothing'}")

    def _opened_elsewhere(self) -> Iterator[bytes]:
        """What webdataset opens: gs://, hf://, ais://, ..."""
        stream = webdataset("gopen").gopen(self.url)
        process = getattr(stream, "proc", None)
        if process is not None:
            self._stops.append(process.kill)
        yield from iter(lambda: stream.read(PIECE), b"")

    def _web(self, at: int) -> Iterator[bytes]:
        """Over as many connections as it takes."""
        failures = 0
        while not self._closed.is_set():
            before = at
            try:
                for piece in self._connection(at):
                    at += len(piece)
                    yield piece
                return
            except HTTPError as error:
                if error.code not in PASSING:
                    raise DataError(f"the server answers {error.code} {error.reason}") from error
                reason = f"the server answers {error.code} {error.reason}"
            except (URLError, TimeoutError, ConnectionError, HTTPException) as error:
                found = error.reason if isinstance(error, URLError) else error
                silent = isinstance(found, TimeoutError)
                reason = f"nothing came for {self.limits.stall:g} s" if silent else str(found) or type(found).__name__
            failures = failures + 1 if at == before else 0
            if failures >= self.limits.attempts:
                raise DataError(f"{reason}; {failures} connections in a row brought nothing")
            if failures:
                self._closed.wait(self.limits.pause * 2 ** (failures - 1))

    def _connection(self, at: int) -> Iterator[bytes]:
        """One answer, from a place on, also where the server cannot skip."""
        headers = {"User-Agent": "selectra", "Accept-Encoding": "identity"} | ({"Range": f"bytes={at}-"} if at else {})
        with urlopen(Request(self.url, headers=headers), timeout=self.limits.stall) as answer:
            length = answer.headers.get("Content-Length", "")
            left = int(length) if length.isdigit() else None
            skipped = at if answer.status != 206 else 0
            yield from _behind(_counted(answer, left), skipped)


def _counted(answer: Any, left: int | None) -> Iterator[bytes]:
    """An answer's bytes; one that ends early is told from a whole one."""
    while piece := answer.read1(PIECE):
        left = None if left is None else left - len(piece)
        yield piece
    if left:
        raise ConnectionError(f"the connection ended {left:,} bytes early")


def _behind(pieces: Iterator[bytes], first: int) -> Iterator[bytes]:
    """The bytes from a place on."""
    for piece in pieces:
        if first < len(piece):
            yield piece[first:]
        first = max(first - len(piece), 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a command and what it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
