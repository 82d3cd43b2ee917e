"""Compiled kernels on the disk, one file each, named by everything that they were made from.

Several processes may compile the same kernel at once: each writes a file of its own and renames it, and all write the
same. A folder that cannot be written costs a compilation in every process, and is said once.
"""

import contextlib
import hashlib
import logging
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from selectra.ops.cuda.compiler import Unit

FOLDER_VARIABLE = "SELECTRA_CACHE"
SUFFIX = ".cubin"
# A file is this line, the digest of what follows, and the machine code.
MARK = b"selectra kernel 1\n"
DIGEST_SIZE = hashlib.sha256().digest_size
logger = logging.getLogger("selectra")

_said: set[str] = set()


def folder() -> Path | None:
    """Where compiled kernels are kept: SELECTRA_CACHE or the user's cache folder; None where there is no such."""
    asked = os.environ.get(FOLDER_VARIABLE)
    if asked:
        return Path(asked).absolute() / "kernels"
    home = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", "")
    if Path(home).is_absolute():
        return Path(home) / "selectra" / "kernels"
    try:
        return Path.home() / ".cache" / "selectra" / "kernels"
    except RuntimeError:
        return None


def count() -> int:
    """Kernel files in the folder."""
    place = folder()
    return 0 if place is None else sum(1 for _ in place.glob(f"*{SUFFIX}"))


def file_name(unit: Unit, told: Sequence[str], nvrtc: tuple[int, int]) -> str:
    """The name of a kernel's file: readable, and different wherever the machine code may be."""
    parts = [unit.name.encode(), unit.source, *(option.encode() for option in told), f"{nvrtc[0]}.{nvrtc[1]}".encode()]
    for name in sorted(unit.headers):
        parts += [name.encode(), unit.headers[name]]
    digest = hashlib.sha256()
    for part in parts:
        # With its length, so that no two lists of parts read alike.
        digest.update(len(part).to_bytes(8, "little") + part)
    return f"{PurePosixPath(unit.name).stem}-{digest.hexdigest()[:40]}{SUFFIX}"


def read(name: str) -> bytes | None:
    """The machine code under a name; None where there is none, or none that is whole."""
    place = folder()
    if place is None:
        return None
    try:
        content = (place / name).read_bytes()
    except OSError:
        return None
    digest, cubin = content[len(MARK) : len(MARK) + DIGEST_SIZE], content[len(MARK) + DIGEST_SIZE :]
    if content.startswith(MARK) and hashlib.sha256(cubin).digest() == digest:
        return cubin
    logger.warning("The compiled kernel '%s' is damaged; it is compiled anew.", place / name)
    return None


def write(name: str, cubin: bytes) -> Path | None:
    """Keep machine code under a name; the file, or None where it could not be kept."""
    place = folder()
    if place is None:
        _say_once(f"there is no home folder for this user; {FOLDER_VARIABLE} names a folder for them")
        return None
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        _replace(place / name, MARK + hashlib.sha256(cubin).digest() + cubin)
    except OSError as error:
        _say_once(f"'{place}' cannot be written ({error.strerror}); {FOLDER_VARIABLE} names another folder")
        return None
    return place / name


def _replace(file: Path, content: bytes) -> None:
    descriptor, partial = tempfile.mkstemp(prefix=file.stem, suffix=".partial", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
        Path(partial).replace(file)
    except OSError:
        with contextlib.suppress(OSError):
            Path(partial).unlink()
        raise


def _say_once(why: str) -> None:
    if why not in _said:
        _said.add(why)
        logger.warning("Compiled CUDA kernels are not kept, and every process compiles them anew: %s.", why)
