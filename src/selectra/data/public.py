"""Public sets by name: found on disk, brought with a checksum, read as tables.

Copies are looked for in the folder that SELECTRA_DATA names, in its folders, and where `selectra data get` puts them.
Nothing is loaded from anywhere unless `get` is asked to.
"""

# pandas' own annotations widen most results to unions that cannot occur here.
# pyright: reportArgumentType=false

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from selectra.data.download import Limits, Progress, digest_of, download
from selectra.data.sources import PublicFile, PublicSet
from selectra.data.table import Table, read_file, read_table
from selectra.errors import DataError
from selectra.ops.cuda import cache

FOLDER_VARIABLE = "SELECTRA_DATA"
NANOSECOND_YEARS = 500


@dataclass(frozen=True)
class Copies:
    """What is on disk of one file: the right copy, and files of its name with another content."""

    file: PublicFile
    right: Path | None
    wrong: tuple[tuple[Path, str], ...]


def download_folder() -> Path:
    """Where downloads go: `data` in SELECTRA_CACHE or in the user's cache folder.

    Raises:
        DataError: There is no such folder.
    """
    kernels = cache.folder()
    if kernels is None:
        raise DataError("there is no home folder for downloads; name one with --to or in SELECTRA_CACHE")
    return kernels.parent / "data"


def folders() -> list[Path]:
    """Where copies are looked for, in this order."""
    named = os.environ.get(FOLDER_VARIABLE)
    found = [Path(named).expanduser()] if named else []
    kernels = cache.folder()
    return found + ([] if kernels is None else [kernels.parent / "data"])


def look(file: PublicFile, places: list[Path] | None = None) -> Copies:
    """Search the folders, and the folders in them, for a file; packed copies count alike."""
    wrong: list[tuple[Path, str]] = []
    for place in folders() if places is None else places:
        for name in (file.name, f"{file.name}.gz"):
            for path in (place / name, *sorted(place.glob(f"*/{name}"))):
                if not path.is_file():
                    continue
                problem = _problem(path, file)
                if problem is None:
                    return Copies(file, path, tuple(wrong))
                wrong.append((path, problem))
    return Copies(file, None, tuple(wrong))


def _problem(path: Path, file: PublicFile) -> str | None:
    try:
        found = digest_of(path)
    except DataError as error:
        return str(error)
    if found == file.sha256:
        return None
    return f"its content is not the published one (sha256 {found[:16]}..., published {file.sha256[:16]}...)"


def locate(source: PublicSet) -> list[Path]:
    """The right copy of each file of a set.

    Raises:
        DataError: One is missing or damaged; the message says how to get it.
    """
    paths = []
    for file in source.files:
        copies = look(file)
        if copies.right is None:
            raise DataError(_missing(source, copies))
        paths.append(copies.right)
    return paths


def _missing(source: PublicSet, copies: Copies) -> str:
    advice = f"Get it with: selectra data get {source.name}"
    if copies.wrong:
        path, problem = copies.wrong[0]
        return f"{source.name}: {str(path)!r}: {problem}. {advice}, or name the file by its path to read it as it is."
    looked = " and ".join(repr(str(place)) for place in folders()) or "no folder"
    return (
        f"{source.name} ({copies.file.name}) is not on this machine; looked in {looked}. {advice}, or name the folder "
        f"that holds it in {FOLDER_VARIABLE}."
    )


def get(
    source: PublicSet,
    folder: Path | None = None,
    *,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> list[tuple[Path, bool]]:
    """Every file of a set on disk: the path, and whether it was loaded now.

    A right copy anywhere in `folders()` is used; with `folder` only one that lies there.

    Raises:
        DataError: A file cannot be had.
    """
    paths = []
    for file in source.files:
        copies = look(file, None if folder is None else [folder])
        if copies.right is not None:
            paths.append((copies.right, False))
            continue
        target = (folder or download_folder()) / file.saved_name
        packed = file.url.endswith(".gz")
        download(
            file.url,
            target,
            sha256=file.sha256,
            size=None if packed else file.size,
            limits=limits,
            progress=progress,
        )
        paths.append((target, True))
    return paths


def read_public(source: PublicSet) -> Table:
    """A set as a table, with the rows that the papers count.

    Raises:
        DataError: It is not on this machine, or its shape is not the published one.
    """
    paths = locate(source)
    if source.layout == "wide":
        table = read_table(paths[0], freq=source.freq, stamps=source.stamps)
    elif source.layout == "bare":
        table = read_table(_bare(source, paths[0]), freq=source.freq)
    else:
        table = _m4_table(source, paths)
    if (table.rows, len(table.names)) != (source.rows, source.n_series):
        raise DataError(
            f"{source.name} has {table.rows:,} rows of {len(table.names)} series, and {source.rows:,} of "
            f"{source.n_series} are published"
        )
    return table


def _bare(source: PublicSet, path: Path) -> pd.DataFrame:
    numbers = pd.read_csv(path, header=None)
    numbers.columns = [str(name) for name in numbers.columns]
    return numbers.assign(ds=pd.date_range(source.start, periods=len(numbers), freq=source.freq))


def read_m4(source: PublicSet) -> dict[str, np.ndarray]:
    """The series of a part of M4 by name, training values and then test values, as the competition joins them."""
    train, test = (read_file(path).set_index("V1") for path in locate(source))
    values = {}
    for name, ahead in zip(test.index, test.to_numpy(np.float64), strict=True):
        known = train.loc[name].to_numpy(np.float64)
        values[str(name)] = np.concatenate([known[~np.isnan(known)], ahead])
    return values


def _m4_table(source: PublicSet, paths: list[Path]) -> Table:
    """Series that end in the same row; what is before a series' first value is unobserved. Stamps are made up."""
    if source.rows > NANOSECOND_YEARS and source.freq.startswith("YS"):
        raise DataError(
            f"{source.name} has series of {source.rows} years, more than time stamps in nanoseconds hold; read its "
            f"files {' and '.join(repr(str(path)) for path in paths)} as they are"
        )
    series = read_m4(source)
    rows = max(len(values) for values in series.values())
    wide = np.full((rows, len(series)), np.nan)
    for column, values in enumerate(series.values()):
        wide[rows - len(values) :, column] = values
    # So that the longest series of every part lies in the range of nanoseconds.
    start = source.start if source.freq[0] not in "MQ" else "1800-01-01"
    stamps = pd.date_range(start, periods=rows, freq=source.freq)
    note = "time stamps are counted: the competition gives each series its own, and none in these files"
    return Table(
        tuple(series), stamps, wide, ~np.isnan(wide), source.freq, rows, notes=(note,), layout="m4", time_name="ds"
    )
