"""Tokenised shards: a corpus made tokens once, in files that are read where they lie.

A folder holds `tokens-00000.npy`, ... (16 or 32 bits a token), the places where their documents begin, the tokenizer
and, written last, `shards.json`. Files are mapped into memory: a corpus may be larger than it.
"""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from jaxtyping import Int

from selectra.data.text import TokenData, kind_of, read_documents
from selectra.errors import ConfigError, DataError
from selectra.language.tokens import Characters, Tokenizer, find_tokenizer
from selectra.registry import datasets

INDEX, FORMAT = "shards.json", 1
SHARD_TOKENS = 2**26


@dataclass(frozen=True)
class Joined:
    """Arrays behind each other as one, without a copy of them; indexed by places and cut by slices.

    Args:
        parts: The arrays.
        start: Its first place in all of them.
        end: Behind its last.
    """

    parts: tuple[Int[np.ndarray, " n"], ...]
    start: int
    end: int

    @classmethod
    def of(cls, parts: Sequence[Int[np.ndarray, " n"]]) -> "Joined":
        """All of the arrays."""
        return cls(tuple(parts), 0, sum(map(len, parts)))

    def __len__(self) -> int:
        return self.end - self.start

    def __getitem__(self, places: Any) -> Any:
        if isinstance(places, slice):
            start, end, _ = places.indices(len(self))
            return Joined(self.parts, self.start + start, self.start + end)
        wanted = self.start + np.asarray(places)
        borders = np.cumsum([0, *map(len, self.parts)])
        found = np.empty(wanted.shape, np.int64)
        for part, (first, behind) in zip(self.parts, pairwise(borders), strict=True):
            here = (wanted >= first) & (wanted < behind)
            if here.any():
                found[here] = part[wanted[here] - first]
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts)[self.start : self.end].astype(dtype or np.int32)


@datasets.register("text_shards", kind="language")
class TextShards(TokenData):
    """A folder of tokenised shards, as `selectra tokenize` writes it.

    Args:
        path: The folder.
        seq_len: Tokens of a piece.
        packed: Whether documents are kept apart, so that no token sees another document's; else they are one stream.
        shares: Parts of training, validation and test.
        stride: Tokens from one training piece's start to the next's; `seq_len` by default, and less for pieces that
            overlap.
    """

    def __init__(
        self,
        *,
        path: str,
        seq_len: int = 256,
        packed: bool = False,
        shares: tuple[float, float, float] = (0.9, 0.05, 0.05),
        stride: int | None = None,
    ) -> None:
        folder = Path(path)
        self.index = read_index(folder)
        parts = [_array(folder, shard, "tokens") for shard in self.index["shards"]]
        firsts = np.cumsum([0, *map(len, parts)])
        starts = [_array(folder, each, "starts") + first
                  for each, first in zip(self.index["shards"], firsts, strict=False)]  # fmt: skip
        super().__init__(
            Joined.of(parts), np.concatenate(starts), find_tokenizer(folder), seq_len, shares, packed, stride
        )

    def describe(self) -> dict[str, Any]:
        """What identifies the data: the sums of all files, taken when they were written."""
        sums = "".join(shard["sha256"] for shard in self.index["shards"])
        fingerprint = hashlib.sha256(sums.encode()).hexdigest()[:16]
        return {"fingerprint": fingerprint, "tokens": len(self.ids), "documents": len(self.starts)}


def read_index(folder: Path) -> dict[str, Any]:
    """What `shards.json` says.

    Raises:
        DataError: There is none, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise DataError(f"'{folder}' holds no {INDEX}; `selectra tokenize FILES --out '{folder}'` writes one, last.")
    try:
        content = json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not content.get("shards"):
        raise DataError(f"'{path}' is no index of format {FORMAT}, or names no shards; tokenize the text again.")
    return content


def _array(folder: Path, shard: dict[str, Any], what: str) -> np.ndarray:
    path = folder / f"{what}-{shard['name']}.npy"
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"'{path}' cannot be read as a shard: {error}; tokenize the text again.") from error
    if found.ndim != 1 or len(found) != shard[{"tokens": "tokens", "starts": "documents"}[what]]:
        raise DataError(f"'{path}' holds {found.shape}, and {INDEX} says otherwise; tokenize the text again.")
    return found


def stream_documents(path: Path, column: str) -> Iterator[str]:
    """The texts of a file one after the other; of parquet and JSONL files no more than a part is in memory.

    Raises:
        DataError: The file is damaged, or has no such column of text.
    """
    kind = kind_of(path)
    try:
        if kind == "parquet":
            yield from _of_parquet(path, column)
        elif kind == "jsonl":
            yield from _of_jsonl(path, column)
        else:
            yield from (text for text in read_documents(path, column) if text)
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError, pa.ArrowInvalid) as error:
        raise DataError(f"'{path}' cannot be read as text: {str(error).partition(chr(10))[0]}") from error


def _of_parquet(path: Path, column: str) -> Iterator[str]:
    file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if column not in names:
        raise DataError(f"'{path}' has no column '{column}'; it has {', '.join(names)}.")
    sort = file.schema_arrow.field(column).type
    if not (pa.types.is_string(sort) or pa.types.is_large_string(sort)):
        raise DataError(f"'{path}': column '{column}' is {sort}; it must be text.")
    for batch in file.iter_batches(columns=[column]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _of_jsonl(path: Path, column: str) -> Iterator[str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get(column) or "", str):
                raise DataError(f"'{path}', line {number}: there is no text in '{column}'.")
            if row.get(column):
                yield row[column]


def write_shards(
    files: Sequence[Path],
    out: Path,
    *,
    tokenizer: str = "bytes",
    column: str = "text",
    end: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> dict[str, Any]:
    """Make a folder of shards from files of text, JSONL or parquet; what its index says.

    Args:
        out: A folder that holds no shards yet; one that a stopped call left without an index is written anew.
        tokenizer: "bytes", "characters" (those of all files), or a tokenizer.json.
        column: Of JSONL and parquet files: where the text is; each row is a document.
        end: A text of one token that is put behind every document, such as "<|endoftext|>".
        shard_tokens: A shard is closed with the document that brings it to so many tokens.

    Raises:
        ConfigError: The folder holds shards, or `end` is not one token.
        DataError: A file cannot be read, or there is no text.
    """
    if (out / INDEX).exists():
        raise ConfigError(f"'{out}' holds shards already; name another folder, or delete it.")
    if shard_tokens < 1:
        raise ConfigError(f"shard_tokens={shard_tokens}: needs at least 1")
    chosen = _characters(files, column) if tokenizer == "characters" else find_tokenizer(tokenizer)
    tail = [] if end is None else chosen.encode(end)
    if end is not None and len(tail) != 1:
        raise ConfigError(f"end={end!r} is {len(tail)} tokens of this tokenizer; it must be one.")
    out.mkdir(parents=True, exist_ok=True)
    sort = np.uint16 if chosen.vocab_size <= 2**16 else np.uint32
    shards = []
    for number, documents in enumerate(_shards(files, column, chosen, tail, shard_tokens)):
        shards.append(_write(out, f"{number:05}", documents, sort))
    if not shards:
        raise DataError("the text is empty.")
    chosen.save(out)
    content = {"format": FORMAT, "vocab_size": chosen.vocab_size, "end": end, "column": column,
               "sources": [file.name for file in files], "shards": shards}  # fmt: skip
    # Last: a folder without it is not whole.
    (out / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def _characters(files: Iterable[Path], column: str) -> Characters:
    known: set[str] = set()
    for file in files:
        for text in stream_documents(file, column):
            known |= set(text)
    if not known:
        raise DataError("the text is empty.")
    return Characters("".join(sorted(known)))


def _shards(
    files: Iterable[Path], column: str, tokenizer: Tokenizer, tail: list[int], most: int
) -> Iterator[list[list[int]]]:  # fmt: skip
    """Documents as tokens, a shard at a time."""
    shard: list[list[int]] = []
    count = 0
    for file in files:
        for text in stream_documents(file, column):
            ids = [*tokenizer.encode(text), *tail]
            if ids:
                shard.append(ids)
                count += len(ids)
            if count >= most:
                yield shard
                shard, count = [], 0
    if shard:
        yield shard


def _write(out: Path, name: str, documents: list[list[int]], sort: Any) -> dict[str, Any]:
    tokens = np.concatenate([np.asarray(ids, dtype=sort) for ids in documents])
    starts = np.cumsum([0, *map(len, documents)])[:-1]
    np.save(out / f"tokens-{name}.npy", tokens)
    np.save(out / f"starts-{name}.npy", starts)
    digest = hashlib.sha256(tokens.tobytes() + starts.tobytes()).hexdigest()
    return {"name": name, "tokens": len(tokens), "documents": len(documents), "sha256": digest}
