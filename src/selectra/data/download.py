"""One file over HTTP: resumed where it stopped, checked, and in place only when it is whole."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import os
import re
import shutil
import ssl
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from selectra.errors import DataError

CHUNK = 1 << 16
# Room that stays free on the disk beside the file.
SPARE_BYTES = 16 << 20
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
LONGEST_WAIT = 60.0

Progress = Callable[[int, int | None], None]
"""Told the bytes that are there and the bytes that there will be, where known."""


@dataclass(frozen=True)
class Limits:
    """How long a download may take.

    Args:
        stall: Seconds without a byte after which a connection is given up.
        total: Seconds for the whole file, retries included.
        attempts: Connections in a row that may bring nothing new.
        pause: Seconds before the second of them; doubled each time.
    """

    stall: float = 30.0
    total: float = 3600.0
    attempts: int = 5
    pause: float = 1.0


class _Reader(Protocol):
    def read1(self, n: int = ..., /) -> bytes: ...


class _Passing(Exception):  # noqa: N818 - never leaves this file
    """A fault after which the same request may succeed."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _Whole(Exception):  # noqa: N818 - never leaves this file
    """The server has nothing beyond what is there."""


def digest_of(path: Path) -> str:
    """SHA-256 of the content, unpacked where the name ends in ".gz".

    Raises:
        DataError: The file cannot be read to its end.
    """
    digest = hashlib.sha256()
    try:
        with _opened(path) as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read to its end ({type(error).__name__}: {error})") from error
    return digest.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    with path.open("rb") as raw:
        if ".gz" in path.suffixes:
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked
        else:
            yield raw


def download(
    url: str,
    target: Path,
    *,
    sha256: str,
    size: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> None:
    """Bring a file to `target`, which appears only when it is whole and its content is the right one.

    What an interrupted call has brought stays beside it in a file ending in ".part", and the next call goes on there. A
    resumed file whose content is wrong is loaded once more from its beginning.

    Args:
        url: http or https.
        sha256: Of the content, unpacked where `target` ends in ".gz".
        size: Bytes that the server will send, where known.

    Raises:
        DataError: It cannot be had: the server's answer, the time, the disk or the content stands in the way.
    """
    if not url.startswith(("http://", "https://")):
        raise DataError(f"{url!r} is no http or https address")
    limits = limits or Limits()
    # The suffix tells `digest_of` what it is.
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists() and part.stat().st_size > 0
        end = time.monotonic() + limits.total
        _bring(url, part, size, limits, end, progress)
        if not _is_right(part, sha256) and resumed:
            part.unlink()
            _bring(url, part, size, limits, end, progress)
        if not _is_right(part, sha256):
            found = part.stat().st_size
            part.unlink()
            raise DataError(
                f"what {url} sends is not the published file: {found:,} bytes with another checksum than "
                f"{sha256[:16]}...; nothing was kept. Try again; if it stays so, the file there has been changed."
            )
        part.replace(target)
    except OSError as error:
        raise DataError(f"{str(target)!r} cannot be written ({type(error).__name__}: {error})") from error


def _is_right(part: Path, sha256: str) -> bool:
    try:
        return digest_of(part) == sha256
    except DataError:
        return False


def _bring(url: str, part: Path, size: int | None, limits: Limits, end: float, progress: Progress | None) -> None:
    """Append to `part` until it is whole, over as many connections as it takes."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _append(url, part, size, limits, end, progress)
            return
        except _Whole:
            return
        except _Passing as fault:
            now = part.stat().st_size if part.exists() else 0
            failures = 0 if now > before else failures + 1
            wait = min(max(fault.wait, limits.pause * 2 ** max(failures - 1, 0)), LONGEST_WAIT)
            if failures >= limits.attempts or time.monotonic() + wait > end:
                _give_up(url, part, str(fault), now)
            time.sleep(wait)


def _give_up(url: str, part: Path, reason: str, there: int) -> NoReturn:
    kept = f" {there:,} bytes are kept in {str(part)!r}; the same command goes on there." if there else ""
    raise DataError(f"{url} could not be loaded: {reason}.{kept}")


def _append(url: str, part: Path, size: int | None, limits: Limits, end: float, progress: Progress | None) -> None:
    """One connection: everything from the end of `part` on, or from the beginning where the server cannot skip."""
    there = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "selectra", "Accept-Encoding": "identity"}
    if there:
        headers["Range"] = f"bytes={there}-"
    try:
        with urlopen(Request(url, headers=headers), timeout=limits.stall) as answer:
            first, whole = _place(answer.status, answer.headers, there)
            if size is not None and whole not in (None, size):
                part.unlink(missing_ok=True)
                raise DataError(f"{url} has {whole:,} bytes and should have {size:,}: the file there has been changed")
            whole = size if whole is None else whole
            _require_room(part, whole, first)
            with part.open("r+b" if first else "wb") as file:
                file.seek(first)
                file.truncate()
                there = _copy(answer, file, first, whole, end, progress)
                file.flush()
                os.fsync(file.fileno())
    except HTTPError as error:
        _refused(url, error, there)
    except (URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else error
        said = "nothing came for " + f"{limits.stall:g} seconds" if isinstance(reason, TimeoutError) else str(reason)
        raise _Passing(said or type(error).__name__) from error
    if whole is not None and there < whole:
        raise _Passing(f"the connection ended after {there:,} of {whole:,} bytes")


def _place(status: int, headers: http.client.HTTPMessage, there: int) -> tuple[int, int | None]:
    """Where the answer starts in the file, and the file's whole length where it is said."""
    if status == 206:
        found = RANGE.fullmatch(headers.get("Content-Range", ""))
        if found is None or int(found[1]) > there:
            raise _Passing(f"the server sends another part ({headers.get('Content-Range')!r}) than was asked for")
        return int(found[1]), None if found[3] == "*" else int(found[3])
    length = headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _refused(url: str, error: HTTPError, there: int) -> NoReturn:
    if error.code == 416 and there:
        raise _Whole from error
    if error.code in PASSING:
        wait = error.headers.get("Retry-After", "")
        raise _Passing(f"the server answers {error.code} {error.reason}", float(wait) if wait.isdigit() else 0.0)
    raise DataError(
        f"{url} cannot be loaded: the server answers {error.code} {error.reason}. Bring the file from elsewhere, put "
        "it into a folder and name that folder in SELECTRA_DATA."
    ) from error


def _require_room(part: Path, whole: int | None, there: int) -> None:
    free = shutil.disk_usage(part.parent).free
    needed = (whole or 0) - there + SPARE_BYTES
    if free < needed:
        raise DataError(
            f"{str(part.parent)!r} has {free / 1e6:,.0f} MB free, {needed / 1e6:,.0f} MB are needed; make room, or "
            "name another folder with --to"
        )


def _copy(answer: _Reader, file: BinaryIO, there: int, whole: int | None, end: float, progress: Progress | None) -> int:
    """The answer's bytes into the file; returns the file's length."""
    # One receive at a time: a server that drips is seen to by the clock, one that is silent by the socket's time limit.
    while chunk := answer.read1(CHUNK):
        file.write(chunk)
        there += len(chunk)
        if whole is not None and there > whole:
            file.truncate(0)
            raise _Passing(f"more than the {whole:,} bytes that the file has")
        if progress is not None:
            progress(there, whole)
        if time.monotonic() > end:
            raise _Passing("the time limit is reached")
    return there
