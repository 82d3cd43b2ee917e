"""What `selectra bench` does with its options: which benchmark, where the record goes."""

import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from selectra.bench import scan
from selectra.bench.block import CPU_STUDY, BlockStudy, bench_block
from selectra.bench.block_parts import bench_block_parts
from selectra.bench.cpu_parts import bench_cpu_parts
from selectra.bench.cross import CASES as CROSS_CASES
from selectra.bench.cross import CPU_CASES as CPU_CROSS_CASES
from selectra.bench.cross import TINY_CASES as TINY_CROSS_CASES
from selectra.bench.cross import bench_cross
from selectra.bench.docs import filled, read_record
from selectra.bench.length_plot import length_figure
from selectra.bench.lengths import bench_lengths
from selectra.bench.model import bench_model
from selectra.bench.scan_gpu import bench_scan_gpu
from selectra.bench.shapes import chosen_cases
from selectra.bench.stack import bench_stack
from selectra.bench.start import bench_start
from selectra.bench.stream import bench_stream
from selectra.bench.vision import bench_vision
from selectra.errors import ConfigError
from selectra.train.checkpoint import replacing, writable_folder
from selectra.train.parallel import pick_device

CPU_SECONDS, GPU_SECONDS, LENGTH_SECONDS, PARTS_SECONDS = 2.0, 1.0, 0.5, 0.3

Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Wish:
    """The options as they were given.

    Args:
        file: For `plot` a record, for `tables` a Markdown file.
        out: Folder for the record, which gets its name from the hardware and the date; for `plot` the picture.
        record: The record's own path.
        only: Shapes' tags or models' names, separated by commas.
    """

    what: str
    file: Path | None = None
    device: str = "auto"
    seconds: float | None = None
    out: Path | None = None
    record: Path | None = None
    only: str | None = None


def bench_command(wish: Wish, console: Console) -> None:
    """Run a benchmark and write its record, or make a picture or tables from records."""
    if wish.what in FROM_FILES:
        console.print(f"Written to {FROM_FILES[wish.what](wish)}", soft_wrap=True, highlight=False)
        return
    if wish.file is not None:
        raise ConfigError(f"`bench {wish.what}` takes no file, got '{wish.file}'; --record names where to write to.")
    save, where = _saver(wish), wish.record or wish.out
    device = pick_device(wish.device)
    RUNNERS[wish.what](wish, device, console, save)
    if where is not None:
        console.print(f"Written to {where}", soft_wrap=True, highlight=False)


def _seconds(wish: Wish, device: torch.device) -> float:
    return wish.seconds if wish.seconds is not None else GPU_SECONDS if device.type == "cuda" else CPU_SECONDS


def _scan(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    if device.type == "cuda":
        bench_scan_gpu(device, _seconds(wish, device), console, save, chosen_cases(wish.only))
        return
    _refuse_only(wish, f"chooses among the shapes of a GPU, and this runs on {device}")
    scan.bench_scan(device, _seconds(wish, device), console, save)


def _lengths(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    _refuse_only(wish, "has nothing to choose from here")
    if device.type != "cuda":
        raise ConfigError(f"`bench lengths` needs a CUDA device for lengths up to 65,536, and this is {device}.")
    bench_lengths(device, LENGTH_SECONDS if wish.seconds is None else wish.seconds, console, save)


def _cross(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    # On a CPU the shapes of a GPU take minutes.
    usual = CROSS_CASES if device.type == "cuda" else CPU_CROSS_CASES
    cases = usual if wish.only is None else chosen_cases(wish.only, (*usual, *TINY_CROSS_CASES))
    bench_cross(device, _seconds(wish, device), console, save, cases)


def _block(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    _refuse_only(wish, "has nothing to choose from here")
    study = BlockStudy() if device.type == "cuda" else CPU_STUDY
    bench_block(device, _seconds(wish, device), console, save, study)


def _block_parts(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    _refuse_only(wish, "has nothing to choose from here")
    if device.type == "cpu":
        bench_cpu_parts(device, _seconds(wish, device), console, save)
        return
    bench_block_parts(device, PARTS_SECONDS if wish.seconds is None else wish.seconds, console, save)


def _model(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    bench_model(device, _seconds(wish, device), console, save, wish.only)


def _stack(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    _refuse_only(wish, "has nothing to choose from here")
    if device.type != "cpu":
        raise ConfigError(f"`bench stack` times a CPU, and this is {device}; give --device cpu.")
    bench_stack(device, _seconds(wish, device), console, save)


def _stream(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    _refuse_only(wish, "has nothing to choose from here")
    if device.type != "cpu":
        raise ConfigError(f"`bench stream` times a CPU, and this is {device}; give --device cpu.")
    bench_stream(device, _seconds(wish, device), console, save)


def _vision(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    bench_vision(device, PARTS_SECONDS if wish.seconds is None else wish.seconds, console, save, wish.only)


def _start(wish: Wish, device: torch.device, console: Console, save: Save) -> None:
    _refuse_only(wish, "has nothing to choose from here")
    if device.type != "cuda":
        raise ConfigError(
            f"`bench start` times kernels that are compiled at first use on a CUDA device, this is {device}."
        )
    bench_start(device, console, save)


def _refuse_only(wish: Wish, why: str) -> None:
    if wish.only is not None:
        raise ConfigError(f"--tags {why}.")


RUNNERS = {
    "scan": _scan,
    "lengths": _lengths,
    "block": _block,
    "block_parts": _block_parts,
    "stack": _stack,
    "stream": _stream,
    "cross": _cross,
    "model": _model,
    "start": _start,
    "vision": _vision,
}


def _plot(wish: Wish) -> Path:

    if wish.file is None or wish.out is None:
        raise ConfigError("a picture is made by `selectra bench plot RECORD.json --out FILE.png`; give both files.")
    record = read_record(wish.file)
    kind = record.get("benchmark", record.get("what"))
    if kind != "lengths":
        raise ConfigError(f"'{wish.file}' is a record of `{kind}`; pictures are made from `bench lengths`.")
    writable_folder(wish.out.parent)
    with replacing(wish.out) as partial:
        length_figure(record).savefig(partial, format="png", dpi=130)
    return wish.out


def _tables(wish: Wish) -> Path:
    if wish.file is None or not wish.file.is_file():
        raise ConfigError(
            f"`selectra bench tables FILE.md` fills the tables of a Markdown file; there is no '{wish.file}'."
        )
    text = filled(wish.file.read_text(encoding="utf-8"), wish.file.parent)
    with replacing(wish.file) as partial:
        partial.write_text(text, encoding="utf-8")
    return wish.file


FROM_FILES = {"plot": _plot, "tables": _tables}


def _saver(wish: Wish) -> Save:
    """Writes the record so far; what cannot be written is found before anything is timed."""
    if wish.out is not None and wish.record is not None:
        raise ConfigError("--out is a folder for the record and --record the record itself; give one of them.")
    if wish.out is not None:
        writable_folder(wish.out)
    if wish.record is not None:
        writable_folder(wish.record.parent)

    def save(record: dict[str, Any]) -> None:
        path = wish.record or (None if wish.out is None else wish.out / file_name(wish.what, record))
        if path is not None:
            with replacing(path) as partial:
                command = shlex.join(["selectra", *sys.argv[1:]])
                stamped = {"command": command, "date": _today(), **record}
                partial.write_text(json.dumps(stamped, indent=2) + "\n")

    return save


def file_name(what: str, record: dict[str, Any]) -> str:
    """Named by benchmark, hardware and date."""
    hardware = record["environment"]["hardware"]
    on_gpu = record["device"].startswith("cuda")
    name = hardware["gpus"][0] if on_gpu else hardware["processor"]
    words = re.findall(r"[a-z0-9]+", name.lower())
    if on_gpu:
        return f"{'_'.join([what, 'gpu', *words, _today()])}.json"
    return f"{'-'.join([what, *words, _today()])}.json"


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
