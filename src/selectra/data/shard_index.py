"""Which shards there are, how many samples each holds, and where in it they begin.

The index is a JSON file as webdataset's tools write it, `{"shardlist": [{"url": ..., "nsamples": ...}, ...]}`, and may
say more: `"offsets"` of the samples, so that reading begins in a shard's middle, and `"classes"`.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urljoin

import numpy as np
from jaxtyping import Int64

from selectra.data.download import Limits
from selectra.data.shard_streams import WEB, Ahead, SlowError, is_local, webdataset
from selectra.errors import DataError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
CLASS = "cls"


@dataclass(frozen=True)
class Shard:
    """One shard.

    Args:
        url: Where it is.
        count: Its samples.
        offsets: The byte at which each begins; None where that is not known.
    """

    url: str
    count: int
    offsets: Int64[np.ndarray, " n"] | None = None


@dataclass(frozen=True)
class Index:
    """Shards in order.

    Args:
        where: What was asked for, for messages.
        shards: All of them.
        classes: Names of the classes; None where nothing says how many there are.
        damage: What was found wrong with shards that end early, where that was asked for.
    """

    where: str
    shards: tuple[Shard, ...]
    classes: tuple[str, ...] | None
    damage: tuple[str, ...] = ()

    @property
    def counts(self) -> Int64[np.ndarray, " n"]:
        """Samples of every shard."""
        return np.array([shard.count for shard in self.shards], np.int64)

    @property
    def digest(self) -> str:
        """Changes when a shard is added, renamed or holds another number of samples."""
        names = "\n".join(f"{shard.url.rpartition('/')[2]} {shard.count}" for shard in self.shards)
        return hashlib.sha256(names.encode()).hexdigest()[:16]


class Sample(NamedTuple):
    """The files of one sample, by what follows the first dot of their names."""

    key: str
    files: dict[str, bytes]


class DamagedShardError(DataError):
    """A shard that cannot be read to its end."""


def find_shards(where: str, limits: Limits, skip: bool = False) -> Index:
    """The shards that are meant by an index, a folder, a file, or a pattern such as "train-{000..099}.tar".

    Local shards need no index: their heads are read, which takes a seek a file in them.

    Args:
        skip: Take of a damaged shard what comes before the damage; else it is an error.

    Raises:
        DataError: There are none, one is damaged, or they are elsewhere and nothing says what they hold.
    """
    if where.endswith(".json"):
        return _read_index(where, limits)
    urls = shard_urls([where])
    far = [url for url in urls if not is_local(url)]
    if far:
        raise DataError(
            f"'{far[0]}' is not on this machine, and without an index its samples are not known; make one with: "
            f"selectra data shards '{where}' --to index.json, and name that file."
        )
    return index_of(urls, where, limits, skip)


def shard_urls(wheres: Sequence[str]) -> list[str]:
    """Folders become the tar files in them, patterns in braces what they stand for."""
    expand, found = webdataset("shardlists").expand_urls, []
    for where in wheres:
        folder = Path(where).expanduser()
        if is_local(where) and folder.is_dir():
            found += sorted(str(path) for path in folder.iterdir() if path.name.endswith(SUFFIXES))
            continue
        # A command may hold braces of its own.
        found += [where] if where.startswith("pipe:") and "{" not in where else expand(where)
    missing = [url for url in found if is_local(url) and not Path(url).expanduser().is_file()]
    if missing or not found:
        what = f"'{missing[0]}' is no file" if missing else "there is no shard"
        raise DataError(
            f"{what}: {list(wheres)} must name tar files, a folder of them, or an index that ends in .json."
        )
    return found


def index_of(urls: Sequence[str], where: str, limits: Limits, skip: bool = False) -> Index:
    """Read every shard once: its samples, where they begin, and the greatest class."""
    shards, greatest, damage = [], -1, []
    for url in urls:
        shard, last, problem = _scan(url, limits)
        if problem is not None:
            if not skip or isinstance(problem, SlowError):
                raise problem
            damage.append(str(problem))
        shards.append(shard)
        greatest = max(greatest, last)
    classes = tuple(map(str, range(greatest + 1))) if greatest >= 0 else None
    if not sum(shard.count for shard in shards):
        raise DataError(f"the shards of '{where}' hold no samples (KEY.jpg beside KEY.cls).{' '.join(damage)}")
    return Index(where, tuple(shards), classes, tuple(damage))


def write_index(index: Index, path: Path) -> None:
    """Write an index; paths become absolute, so that the file may lie anywhere."""
    rows = []
    for shard in index.shards:
        url = str(Path(shard.url).expanduser().absolute()) if is_local(shard.url) else shard.url
        rows.append({"url": url, "nsamples": shard.count})
        if shard.offsets is not None:
            rows[-1]["offsets"] = shard.offsets.tolist()
    content: dict[str, Any] = {"wids_version": 1, "shardlist": rows}
    if index.classes is not None:
        content["classes"] = list(index.classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def _read_index(where: str, limits: Limits) -> Index:
    try:
        stream = Ahead(where if not is_local(where) else str(Path(where).expanduser()), 0, limits)
        content = json.loads(b"".join(iter(lambda: stream.read(1 << 20), b"")))
        base = where if where.startswith(WEB) else f"{Path(where).expanduser().absolute()}"
        shards = tuple(_row(row, base) for row in content["shardlist"])
        classes = content.get("classes")
    except (DataError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"'{where}' cannot be read as an index of shards ({type(error).__name__}: {error}); it must be JSON: "
            '{"shardlist": [{"url": "a.tar", "nsamples": 1000}, ...]}. `selectra data shards` writes one.'
        ) from error
    if not shards:
        raise DataError(f"'{where}' lists no shards.")
    names = range(classes) if isinstance(classes, int) else classes
    return Index(where, shards, None if names is None else tuple(map(str, names)))


def _row(row: Any, base: str) -> Shard:
    url, count, offsets = row["url"], int(row["nsamples"]), row.get("offsets")
    if is_local(url):
        url = urljoin(base, url) if base.startswith(WEB) else str(Path(base).parent / url)
    if count < 0 or (offsets is not None and len(offsets) != count):
        raise ValueError(f"{url} has {count} samples and {len(offsets or [])} offsets")
    return Shard(url, count, None if offsets is None else np.array(offsets, np.int64))


def _scan(url: str, limits: Limits) -> tuple[Shard, int, DataError | None]:
    """A shard's whole samples, its greatest class, and what is wrong with it; of a local file only heads are read."""
    stream = None if is_local(url) and url.endswith(".tar") else Ahead(url, 0, limits)
    offsets: list[int] = []
    greatest, problem, place = -1, None, "at its first sample"
    try:
        for key, offset, label in _heads(url, stream):
            greatest = max(greatest, label)
            if offset is not None:
                offsets.append(offset)
            place = f"in sample {len(offsets) - 1}, '{key}'"
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        cause = stream.problem if stream is not None and stream.problem is not None else error
        problem = damaged(url, place, cause)
        # The last one may want files.
        offsets = offsets[:-1]
    finally:
        if stream is not None:
            stream.close()
    known = np.array(offsets, np.int64) if url.endswith(".tar") else None
    return Shard(url, len(offsets), known), greatest, problem


def _heads(url: str, stream: Ahead | None) -> Iterator[tuple[str, int | None, int]]:
    """For each file its sample, where the sample begins if the file is its first, and the class if it holds one."""
    split, key = webdataset("tariterators").base_plus_ext, None
    path = Path(url).expanduser()
    with tarfile.open(path, "r:") if stream is None else tarfile.open(fileobj=cast(Any, stream), mode="r|*") as archive:
        for member in archive:
            # The archive would remember every file.
            archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
            if stream is not None:
                stream.begin()
            base, suffix = split(member.name) if member.isreg() else (None, "")
            if base is None or Path(base).name.startswith("__"):
                continue
            found = archive.extractfile(member) if suffix.lower() == CLASS else None
            yield base, member.offset if base != key else None, -1 if found is None else int(found.read())
            key = base
        there = path.stat().st_size if stream is None else stream.count
        if url.endswith(".tar") and there <= archive.offset:
            raise tarfile.ReadError("it ends without tar's mark of the end, truncated or never closed by its writer")


def damaged(url: str, place: str, error: Exception) -> DataError:
    """What is wrong with a shard, and where in it."""
    reason = str(error).partition(" @ ")[0].partition("\n")[0] or type(error).__name__
    kind = SlowError if isinstance(error, SlowError) else DamagedShardError
    return kind(f"the shard '{url}' cannot be read to its end: {reason} ({place}).")


def read_samples(shard: Shard, first: int, limits: Limits) -> Generator[Sample, None, None]:
    """A shard's samples from number `first` on.

    Raises:
        DamagedShardError: It is truncated or damaged, or holds fewer samples than the index says; the message names
            the shard and the sample.
        SlowError: A sample did not come within the time limit.
    """
    tar = webdataset("tariterators")
    knows = shard.offsets is not None and first < shard.count
    stream = Ahead(shard.url, int(shard.offsets[first]) if knows and shard.offsets is not None else 0, limits)
    number, place = first if knows else 0, f"at sample {first if knows else 0}"
    files = ({**file, "__url__": shard.url} for file in tar.tar_file_iterator(stream))
    samples = tar.group_by_keys(files)
    try:
        while number < shard.count and (sample := next(samples, None)) is not None:
            place = f"after sample {number}, '{sample['__key__']}'"
            if number >= first:
                yield Sample(
                    sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")}
                )
            number += 1
            stream.begin()
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise damaged(shard.url, place, stream.problem or error) from error
    finally:
        stream.close()
    if number < shard.count:
        ended = DataError(f"it ends after {number} samples, and the index says {shard.count}")
        raise damaged(shard.url, place, ended)
