"""What happened, one JSON object a line: with what software and hardware, every step, every evaluation."""

import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

from selectra.errors import ConfigError, DataError
from selectra.ops.dispatch import OPS
from selectra.ops.transforms import Onlooker
from selectra.registry import Resolved
from selectra.spec import Run
from selectra.train.board import FOLDER, Board
from selectra.train.checkpoint import forget, replacing
from selectra.train.parallel import World

RECORD, RUN = "record.jsonl", "run.json"
# Seconds for git's answer: a source tree on a disk that hangs is one without a commit.
GIT = 10.0
PACKAGES = ("selectra", "numpy", "pandas")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name; Linux tells it in a file alone."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the source tree that runs; None where the package is installed without one."""
    here = Path(__file__)
    try:
        git = ["git", "-C", str(here.parent)]
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, capture_output=True, timeout=GIT)
        answer = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True, timeout=GIT)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def environment() -> dict[str, Any]:
    """Versions and hardware, as every record states them."""
    return {
        # torch's own word also says which CUDA it was built for.
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "commit": _commit(),
        "hardware": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "system": f"{platform.system()} {platform.machine()}",
        },
    }


class BackendWatch(Onlooker):
    """Inside the block, notes which backend of each of our operators really ran."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: dict[str, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "selectra":
            names = [argument.name for argument in func._schema.arguments]
            if "backend" in names:
                self.noted[func._opname] = args[names.index("backend")]
        return func(*args, **(kwargs or {}))

    def ran(self, operator: str, backend: str) -> None:
        """Note it."""
        self.noted[operator] = backend

    def found(self) -> dict[str, str]:
        """Backends by operator; the reference is plain PyTorch and shows only in having been asked for."""
        asked = {name: op.asked for name, op in OPS.items() if op.asked is not None}
        return {**asked, **self.noted}


def write_run(
    out: Path,
    run: Run,
    resolved: Mapping[str, Mapping[str, Resolved]] | None = None,
    data: Mapping[str, Any] | None = None,
) -> None:
    """Write `run.json`: the run, what every argument resolved to and from where, the data, versions and hardware."""
    content: dict[str, Any] = {"run": json.loads(run.to_json()), **environment()}
    if data is not None:
        content["data"] = dict(data)
    if resolved is not None:
        content["resolved"] = {
            section: {name: {"value": _writable(item.value), "origin": item.origin} for name, item in table.items()}
            for section, table in resolved.items()
        }
    with replacing(out / RUN) as partial:
        partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_run(path: Path) -> Run:
    """Read a run from a `run.json`, or from the folder that holds one.

    Raises:
        DataError: There is none.
        ConfigError: It is no run.
    """
    path = path / RUN if path.is_dir() else path
    text = _text_of(path)
    names = _forecast_models(text)
    if names:
        raise ConfigError(
            f"'{path}' is of a whole `selectra forecast`; each of its models has a folder of its own: "
            f"take one of {[str(path.parent / name) for name in names]}."
        )
    return Run.from_json(text, str(path))


def read_data(out: Path) -> dict[str, Any] | None:
    """What identified the data of the training in a folder; None where its run.json does not say."""
    content = json.loads(_text_of(out / RUN))
    data = content.get("data") if "run" in content else None
    return data if isinstance(data, dict) else None


def _text_of(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"there is no '{path}'; `selectra train` writes it into its output folder.")
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"'{path}' cannot be read as text: {error}.") from error


def _forecast_models(text: str) -> list[str]:
    """The models in the run.json of a forecast job; none for anything else."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        return []
    runs = content.get("runs") if isinstance(content, dict) and "run" not in content else None
    return list(runs) if isinstance(runs, dict) else []


def _writable(value: Any) -> Any:
    """JSON has no NaN, no infinity, and none of our types."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _writable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)


class Record:
    """An append-only file of JSON lines; without a path nothing is written.

    A checkpoint stores how long the record was, and resuming cuts it back to there: the steps that follow are done
    again and recorded once.
    """

    def __init__(self, path: Path | None, length: int = 0, board: Board | None = None) -> None:
        self._file, self._board = None, board
        if path is None:
            return
        found = path.stat().st_size if path.is_file() else 0
        if found < length:
            raise DataError(f"the record '{path}' has {found} bytes and the checkpoint was taken at {length}.")
        self._file = path.open("ab")
        self._file.truncate(length)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, event: str, **values: Any) -> None:
        """Add one line and hand it to the system at once."""
        if self._file is not None:
            line = json.dumps({"event": event, **_writable(values)}, allow_nan=False)
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        if self._board is not None:
            self._board.write(event, values)

    def left_out(self, step: int, names: list[str]) -> int:
        """Name samples that were left out, if there are any; how many."""
        if names:
            self.write("left_out", step=step, count=len(names), samples=names)
        return len(names)

    def length(self) -> int:
        """Bytes that are safely on the disk."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()


def open_record(
    out: Path | None,
    world: World,
    run: Run,
    resolved: Mapping[str, Mapping[str, Resolved]] | None = None,
    length: int = 0,
    data: Mapping[str, Any] | None = None,
    board: tuple[bool, int] = (False, 0),
) -> Record:
    """Write run.json and open the record with its header; only the first process writes anything.

    Args:
        length: Bytes of an existing record to keep: those written before the checkpoint that is resumed. At 0 this is
            a new training, and what an earlier one left goes first.
        data: What identifies the data, for run.json.
        board: Whether TensorBoard's folder is written too, and how many steps are done.
    """
    if out is None or not world.first:
        return Record(None)
    if length == 0:
        # Weights of an earlier training must never lie beside the run.json of this one.
        forget(out)
        shutil.rmtree(out / FOLDER, ignore_errors=True)
    record = Record(out / RECORD, length, Board(out / FOLDER, board[1]) if board[0] else None)
    write_run(out, run, resolved, data)
    facts = {"run": run.name, "seed": run.train.seed, "processes": world.size, "device": str(world.device)}
    record.write("resumed" if length else "started", **facts, **environment())
    return record
