"""Files that are whole or not there: where the state to resume from lies, and the best weights."""

import contextlib
import errno
import json
import os
import pickle
import random
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from selectra.errors import ConfigError, DataError

CHECKPOINTS, WEIGHTS = "checkpoints", "model.safetensors"
# Before the name of a checkpoint while another one of its step takes its place.
REPLACED = ".old-"
# What versions up to 0.2 wrote instead of the folder; it is read, and not written.
CHECKPOINT, FORMAT = "checkpoint.pt", 1
ADVICE = "Delete it to go on from the one before it, or from the start, or put a whole copy in its place."


def steps(out: Path) -> list[int]:
    """Of which steps a training's folder holds whole checkpoints, in order."""
    found = (out / CHECKPOINTS).glob("step-*")
    return sorted(int(path.name[5:]) for path in found if path.name[5:].isdigit())


def folder(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return out / CHECKPOINTS / f"step-{step:09d}"


def recover(out: Path) -> None:
    """Give a checkpoint its name back that was about to be replaced when the process was killed."""
    for path in (out / CHECKPOINTS).glob(f"{REPLACED}step-*"):
        final = path.with_name(path.name.removeprefix(REPLACED))
        if not final.exists():
            path.rename(final)


def latest(out: Path) -> Path | None:
    """The checkpoint that a training in this folder goes on from: the last whole one, or an earlier version's."""
    found, old = steps(out), out / CHECKPOINT
    return folder(out, found[-1]) if found else old if old.is_file() else None


def forget(out: Path) -> None:
    """Remove a training's checkpoints and weights: what comes into the folder is another one's."""
    for name in (CHECKPOINT, WEIGHTS):
        (out / name).unlink(missing_ok=True)
    if (out / CHECKPOINTS).is_dir():
        shutil.rmtree(out / CHECKPOINTS)


def damaged(path: Path, reason: str) -> DataError:
    """The error that says so."""
    return DataError(f"the checkpoint '{path}' is damaged or of another kind: {reason}. {ADVICE}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path that is handed out; it takes the place of `path` at the end, or disappears on an error."""
    # One fixed name: what a killed process left is overwritten by the next one.
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def writable_folder(out: Path) -> Path:
    """Make the folder if needed, and try to write in it.

    Raises:
        ConfigError: It cannot be made or written; the message holds the system's reason.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write in the folder '{out}': {error.strerror}; choose another with --out."
        ) from error
    return out


@contextlib.contextmanager
def full_disk_named(out: Path | None) -> Iterator[None]:
    """Inside the block it is said in words where a disk, a quota or a limit leaves no room for a file in `out`.

    Raises:
        DataError: There is no room; checkpoints are as they were.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        kept = [] if out is None else steps(out)
        before = f"that of step {kept[-1]} is whole" if kept else "there is none before it"
        raise DataError(
            f"no room in '{out}' for record, weights or checkpoint: {error.strerror}; of checkpoints, {before}. "
            "Make room, or move the folder to another disk and name it with --out; the same command then goes on."
        ) from error


def random_state() -> dict[str, Any]:
    """The state of every generator that this process draws from."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (name, [int(key) for key in keys], *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go on drawing where `random_state` was taken."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    random.setstate(state["python"])


def load(path: Path) -> dict[str, Any]:
    """Read an earlier version's checkpoint, one file; nothing in it is executed.

    Raises:
        DataError: The file is damaged, or is no checkpoint of Selectra.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            raise damaged(path, f"{broken} has a wrong checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, EOFError, RuntimeError, pickle.UnpicklingError, NotImplementedError) as error:
        raise damaged(path, str(error).partition("\n")[0]) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise damaged(path, f"it has format {found}, and this version reads {FORMAT} and folders")
    return state


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights and buffers, copied to the CPU."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in model.state_dict().items()}


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, whole or not at all; equal weights and metadata give equal bytes."""
    # safetensors refuses tensors that share memory, as tied weights do.
    own = {name: value.clone() for name, value in weights.items()}
    with replacing(path) as partial:
        partial.write_bytes(_in_order(serialize(own, metadata=dict(metadata))))


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata in alphabetical order: its writer's order differs from call to call."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header.pop("__metadata__", {})
    ordered = {"__metadata__": dict(sorted(metadata.items())), **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    # Tensors begin at a multiple of 8 bytes; spaces behind the header belong to the format.
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text + data[end:]


def load_weights(path: Path, model: nn.Module) -> None:
    """Put stored weights into a model.

    Raises:
        DataError: There is no such file, it is damaged, or it belongs to another model.
    """
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError as error:
        raise DataError(f"there are no weights at '{path}'; `selectra train` writes them.") from error
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the weights '{path}' are damaged or belong to another model: {reason}") from error
