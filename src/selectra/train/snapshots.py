"""Checkpoints as folders, `checkpoints/step-N`: written beside the training, whole or not there, the last few kept.

The tensors are in PyTorch's distributed format (torch.distributed.checkpoint): every process writes its share, and any
number of processes reads them. What else a training needs is in `state.pt`. A folder gets its name when all of it is on
the disk; one with a dot before its name was being written when its process ended.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import warnings
import zlib
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from selectra.errors import DataError
from selectra.train.checkpoint import CHECKPOINTS, REPLACED, damaged, folder, steps
from selectra.train.parallel import World

FORMAT = 2
STATE, SUMS, METADATA = "state.pt", "sums", ".metadata"
# What a description of tensors is made of; reading one calls nothing else.
PARTS = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
PATHS = {(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")}
PLAIN = {("torch", "Size"), ("torch.serialization", "_get_layout"), *PATHS}
# It says what `no_dist` asked for.
warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized", UserWarning)


class Snapshots:
    """The checkpoints of one training.

    Args:
        out: The training's folder.
        keep: How many are kept.
    """

    def __init__(self, out: Path, world: World, keep: int) -> None:
        self.out, self.world, self.keep = out, world, keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._going_on: tuple[int, Future[Any]] | None = None
        if world.first:
            for left in (out / CHECKPOINTS).glob(".step-*"):
                shutil.rmtree(left)
        world.wait()

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to write; the tensors are copies that nobody changes. Waits for the checkpoint before this one.

        Raises:
            DataError: The one before could not be written.
        """
        self.finish()
        writer = _Writer(folder(self.out, step), state, self.keep, self.world.size)
        options = {"storage_writer": writer, "process_group": self.world.files, "no_dist": self.world.files is None}
        self._going_on = step, self._writer.submit(save, dict(tensors), **options)

    @property
    def failed(self) -> bool:
        """Whether the last checkpoint could not be written, as far as is known now."""
        future = None if self._going_on is None else self._going_on[1]
        return future is not None and future.done() and future.exception() is not None

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            DataError: It could not be written; those before it are as they were.
        """
        if self._going_on is None:
            return
        (step, future), self._going_on = self._going_on, None
        try:
            future.result()
        except CheckpointException as error:
            if self.world.first:
                shutil.rmtree(_partial(folder(self.out, step)), ignore_errors=True)
            raise self._not_written(step, error) from error

    def close(self) -> None:
        """Wait for what is being written, without a word about how it went; for the way out after another error."""
        self._writer.shutdown(wait=self.world.size == 1, cancel_futures=True)

    def _not_written(self, step: int, error: CheckpointException) -> DataError:
        rank, (cause, _) = min(error.failures.items())
        reason = getattr(cause, "strerror", None) or " ".join(str(cause).split())[:300] or type(cause).__name__
        who = f" by process {rank}" if self.world.size > 1 else ""
        kept = steps(self.out)
        before = f"that of step {kept[-1]} is whole" if kept else "there is none before it"
        return DataError(
            f"the checkpoint of step {step} could not be written{who} into '{self.out / CHECKPOINTS}': {reason}; "
            f"{before}. Make room or choose another folder with --out; the same command then goes on."
        )


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}")


def _synced(path: Path) -> None:
    """Wait until a file or a folder's list of files is on the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _drop(path: Path) -> None:
    """Remove a checkpoint; it is never half there under its name."""
    gone = path.with_name(f".gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def _sum(path: Path) -> int:
    """The CRC-32 of a file."""
    found = 0
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            found = zlib.crc32(part, found)
    return found


class _Writer(FileSystemWriter):
    """Writes into a folder with a dot before its name, notes every file's checksum, and gives the folder its name."""

    def __init__(self, path: Path, state: Mapping[str, Any], keep: int, processes: int) -> None:
        super().__init__(_partial(path))
        self.final, self.state, self.keep, self.processes = path, state, keep, processes

    def write_data(self, plan: Any, planner: Any) -> Any:
        written = super().write_data(plan, planner)
        here = Path(self.path)
        sums = {result.storage_data.relative_path: 0 for result in written.value()}
        prefix = plan.storage_data.prefix
        self._write_sums(here / f"{prefix}{SUMS}.json", {name: _sum(here / name) for name in sums})
        return written

    def finish(self, metadata: Metadata, results: Any) -> None:
        """The last act, of the first process, when all files of all processes are there."""
        if len(results) != self.processes:
            # Where an error has ended the group of processes, PyTorch writes this one's parts as if they were all.
            raise RuntimeError(f"{len(results)} of {self.processes} processes wrote their parts")
        super().finish(metadata, results)
        here = Path(self.path)
        with (here / STATE).open("wb") as file:
            torch.save({"format": FORMAT, **self.state}, file)
        lists = sorted(path.name for path in here.glob(f"*_{SUMS}.json"))
        self._write_sums(here / f"{SUMS}.json", {name: _sum(here / name) for name in [STATE, METADATA, *lists]})
        for file in here.iterdir():
            _synced(file)
        _synced(here)
        # Of the same step, by the same training before it was called again; `recover` gives it its name back where the
        # new one did not get it.
        before = self.final.with_name(REPLACED + self.final.name)
        if self.final.exists():
            shutil.rmtree(before, ignore_errors=True)
            self.final.rename(before)
        here.rename(self.final)
        _synced(self.final.parent)
        shutil.rmtree(before, ignore_errors=True)
        out = self.final.parents[1]
        for step in steps(out)[: -self.keep]:
            _drop(folder(out, step))

    def _write_sums(self, path: Path, sums: Mapping[str, int]) -> None:
        with path.open("w") as file:
            json.dump(sums, file)
            file.flush()
            os.fsync(file.fileno())


class _Unpickler(pickle.Unpickler):
    """Reads the description of tensors, and calls nothing that does not belong to one."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in {"torch", *PARTS} or (module, name) in PLAIN else None
        described = isinstance(found, (torch.dtype, torch.layout, torch.memory_format)) or (module, name) in PLAIN
        if not described and not (isinstance(found, type) and found.__module__ == module and module in PARTS):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of Selectra does")
        return found


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / METADATA).open("rb") as file:
            return _Unpickler(file).load()


class Snapshot:
    """A checkpoint that is read.

    Args:
        path: Its folder.
        world: Those who read it, all of them; each checks its share of the files.

    Raises:
        DataError: A file is missing or damaged, or another version wrote it.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path, self.world = path, world
        problems = [found for found in world.gather(self._damage()) if found]
        if problems:
            raise damaged(path, problems[0])
        self.reader = _Reader(path)
        try:
            self.described = self.reader.read_metadata().state_dict_metadata
            self.state: dict[str, Any] = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            raise damaged(path, str(error).partition("\n")[0]) from error
        if self.state.get("format") != FORMAT:
            raise damaged(path, f"it has format {self.state.get('format')}, and this version reads {FORMAT}")

    def _damage(self) -> str:
        """What is wrong with this process's share of the files, or nothing."""
        lists = sorted(self.path.glob(f"*{SUMS}.json"))
        if not any(path.name == f"{SUMS}.json" for path in lists):
            return f"'{SUMS}.json' is missing"
        try:
            sums = {name: value for path in lists for name, value in json.loads(path.read_text()).items()}
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
            return "a list of checksums cannot be read"
        for name in sorted(sums)[self.world.rank :: self.world.size]:
            if not (self.path / name).is_file():
                return f"'{name}' is missing"
            if _sum(self.path / name) != sums[name]:
                return f"'{name}' has a wrong checksum"
        return ""

    def keys_behind(self, prefix: str, deep: bool = False) -> list[str]:
        """What follows the prefix in the names of tensors: one word, or with `deep` also several with dots."""
        found = [name.removeprefix(prefix) for name in self.described if name.startswith(prefix)]
        return found if deep else [name for name in found if "." not in name]

    def shape(self, name: str) -> torch.Size:
        """Of a whole tensor."""
        return self._tensor(name).size

    def empty(self, name: str) -> Tensor:
        """A whole tensor to read into, on the CPU."""
        return torch.empty(self._tensor(name).size, dtype=self._tensor(name).properties.dtype)

    def _tensor(self, name: str) -> TensorStorageMetadata:
        found = self.described[name]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def read(self, tensors: dict[str, Tensor]) -> None:
        """Read into tensors, each process into its part of them.

        Raises:
            DataError: They are not those of this checkpoint.
        """
        missing = sorted(tensors.keys() - self.described.keys())
        for name in sorted(tensors.keys() & self.described.keys()):
            # What no part covers would keep what is in memory by chance.
            found = sum(chunk.sizes.numel() for chunk in self._tensor(name).chunks)
            if found < self.shape(name).numel():
                raise damaged(self.path, f"of '{name}' it has {found} of {self.shape(name).numel()} numbers")
        other = [name for name in tensors.keys() & self.described.keys() if tensors[name].shape != self.shape(name)]
        if missing or other:
            name = (missing or sorted(other))[0]
            raise damaged(self.path, f"'{name}' is {'missing' if missing else f'{tuple(self.shape(name))}'}")
        alone = self.world.files is None
        try:
            load(tensors, storage_reader=self.reader, process_group=self.world.files, no_dist=alone)
        except CheckpointException as error:
            _, (cause, _) = min(error.failures.items())
            raise damaged(self.path, " ".join(str(cause).split())[:300]) from error
