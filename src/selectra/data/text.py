"""Text as token ids: one file, cut into pieces, documents packed behind each other or a stream without borders."""

import gzip
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.json
import pyarrow.parquet
import torch
from jaxtyping import Int, Int32
from torch import Tensor

from selectra.data.public import folders
from selectra.errors import ConfigError, DataError
from selectra.language.tokens import Bytes, Characters, Tokenizer, Words, find_tokenizer
from selectra.registry import datasets

IGNORED = -100


@dataclass(frozen=True)
class TextBatch:
    """Pieces of text; a target is the token that follows, and `IGNORED` where none does in the same document."""

    tokens: Int[Tensor, "b l"]
    targets: Int[Tensor, "b l"]
    cu_seqlens: Int32[Tensor, " borders"] | None = None
    """Borders of packed documents; then b is 1."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TextBatch":
        """The same batch on another device."""
        borders = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=non_blocking)
        tokens, targets = (tensor.to(device, non_blocking=non_blocking) for tensor in (self.tokens, self.targets))
        return TextBatch(tokens, targets, borders)

    def along_length(self, rank: int, size: int) -> "TextBatch":
        """One of `size` parts that follow each other along the pieces; a target stays with its token.

        Raises:
            ConfigError: Documents are packed, which have borders of their own.
        """
        if self.cu_seqlens is not None:
            raise ConfigError(
                "documents are packed behind each other, which cannot be split along their length; leave packing off "
                "(data.packed=false) with parallel.kind=length."
            )
        tokens, targets = (tensor.tensor_split(size, 1)[rank] for tensor in (self.tokens, self.targets))
        return TextBatch(tokens, targets)

    def __len__(self) -> int:
        return len(self.tokens)


class Pieces:
    """Pieces of `seq_len` tokens; the last of consecutive ones may be shorter and is filled with ignored targets.

    Args:
        ids: All tokens of a split.
        starts: Where documents begin, first 0; None for one stream without borders.
        seq_len: Tokens of a piece.
        stride: Tokens from one piece's start to the next's; where it is smaller than `seq_len`, pieces overlap and all
            are whole.
    """

    def __init__(
        self,
        ids: Int[np.ndarray, " n"],
        starts: Int[np.ndarray, " d"] | None,
        seq_len: int,
        stride: int | None = None,
    ) -> None:
        self.ids, self.starts, self.seq_len = ids, starts, seq_len
        self.stride = seq_len if stride is None else stride
        # The last token of all is only a target.
        last = len(ids) - 1 if starts is None else len(ids)
        whole = (last - seq_len) // self.stride + 1
        self.count = max(-(-last // seq_len) if self.stride == seq_len else whole, 0)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: int | Sequence[int]) -> TextBatch:
        return self.__getitems__([indices] if isinstance(indices, int) else indices)

    def __getitems__(self, indices: Sequence[int]) -> TextBatch:
        """The pieces with these numbers, in this order; packed one behind the other where there are documents."""
        rows = np.asarray(indices)[:, None] * self.stride + np.arange(self.seq_len + 1)
        there = rows < len(self.ids)
        ids = np.where(there, self.ids[np.minimum(rows, len(self.ids) - 1)], 0).astype(np.int64)
        targets = np.where(there[:, 1:], ids[:, 1:], IGNORED)
        if self.starts is None:
            return TextBatch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets))
        # A document that a piece cuts goes on as one of its own in the next piece.
        first = self.starts[np.minimum(self.starts.searchsorted(rows), len(self.starts) - 1)] == rows
        targets = np.where(first[:, 1:], IGNORED, targets)
        begins = first[:, :-1].copy()
        begins[:, 0] = True
        borders = [*np.flatnonzero(begins).tolist(), begins.size]
        tokens = torch.from_numpy(ids[:, :-1].reshape(1, -1).copy())
        packed = torch.tensor(borders, dtype=torch.int32)
        return TextBatch(tokens, torch.from_numpy(targets.reshape(1, -1)), packed)


Shares = tuple[float, float, float]


class TokenData:
    """Tokens and their split by position: the first part trains, the last tests.

    Args:
        ids: All tokens: an array, or what is indexed and cut like one.
        starts: Where documents begin, first 0.
        tokenizer: That made them.
        seq_len: Tokens of a piece.
        shares: Parts of training, validation and test.
        packed: Whether documents are kept apart; else they are one stream.
        stride: Tokens from one training piece's start to the next's; `seq_len` by default.
    """

    def __init__(
        self, ids: Any, starts: Int[np.ndarray, " d"], tokenizer: Tokenizer, seq_len: int, shares: Shares,
        packed: bool, stride: int | None = None,
    ) -> None:  # fmt: skip
        require_pieces(seq_len, stride, packed)
        if min(shares) < 0 or abs(sum(shares) - 1) > 1e-6 or shares[0] <= 0:
            raise ConfigError(f"shares={shares}: need to be at least 0, with training's above 0, and sum to 1")
        self.ids, self.starts = ids, starts
        self.tokenizer, self.seq_len, self.packed, self.stride = tokenizer, seq_len, packed, stride
        ends = np.round(np.cumsum([0, *shares]) * len(self.ids)).astype(int)
        self._borders = dict(zip(("train", "val", "test"), pairwise(ends.tolist()), strict=True))

    @property
    def facts(self) -> dict[str, Any]:
        """What a model takes from the data."""
        return {"vocab_size": self.tokenizer.vocab_size, "seq_len": self.seq_len}

    def windows(self, split: Literal["train", "val", "test"]) -> Pieces:
        """The pieces of a split."""
        start, end = self._borders[split]
        inside = self.starts[(self.starts >= start) & (self.starts < end)] - start
        stride = self.stride if split == "train" else None
        return Pieces(self.ids[start:end], np.union1d([0], inside) if self.packed else None, self.seq_len, stride)

    def first(self, split: Literal["train", "val", "test"]) -> int:
        """The place of a split's first token among all."""
        return self._borders[split][0]

    def summary(self) -> list[str]:
        """Lines for the terminal."""
        parts = ", ".join(f"{name} {end - start:,}" for name, (start, end) in self._borders.items())
        return [f"{len(self.starts):,} documents, {len(self.ids):,} tokens of {self.tokenizer.vocab_size:,}: {parts}"]

    def describe(self) -> dict[str, Any]:
        """What identifies the data."""
        fingerprint = hashlib.sha256(self.ids.tobytes()).hexdigest()[:16]
        return {"fingerprint": fingerprint, "tokens": len(self.ids), "documents": len(self.starts)}


class TextData(TokenData):
    """Texts as tokens.

    Args:
        documents: Texts.
        tokenizer: Makes tokens of them.
        seq_len: Tokens of a piece.
        shares: Parts of training, validation and test.
        packed: Whether documents are kept apart; else they are one stream.
        stride: Tokens from one training piece's start to the next's; `seq_len` by default.

    Raises:
        DataError: There is no text.
    """

    def __init__(
        self, documents: Sequence[str], tokenizer: Tokenizer, seq_len: int, shares: Shares, packed: bool,
        stride: int | None = None,
    ) -> None:  # fmt: skip
        encoded = [tokenizer.encode(text) for text in documents if text]
        if not encoded:
            raise DataError("the text is empty.")
        ids = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in encoded])
        starts = np.cumsum([0, *map(len, encoded)])[:-1]
        super().__init__(ids, starts, tokenizer, seq_len, shares, packed, stride)


def require_pieces(seq_len: int, stride: int | None, packed: bool) -> None:
    """Refuse pieces that cannot be cut.

    Raises:
        ConfigError: A length is below 1, pieces would leave tokens out, or documents would stand in two pieces.
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len}: needs at least 1")
    if stride is not None and not 1 <= stride <= seq_len:
        raise ConfigError(
            f"stride={stride}: needs at least 1 and at most seq_len={seq_len}, so that no token is left out"
        )
    if stride not in (None, seq_len) and packed:
        raise ConfigError(f"stride={stride}: packed documents are cut into pieces that do not overlap; leave it out.")


@datasets.register("text_file", kind="language")
class TextFile(TextData):
    """A text, JSONL or parquet file as tokens.

    Args:
        path: The file, `.gz` or not; a name without folders is also looked for in SELECTRA_DATA.
        seq_len: Tokens of a piece.
        tokenizer: "bytes", "characters" (those of the file), or a tokenizer.json.
        column: Of JSONL and parquet files: where the text is; each row is a document.
        packed: Whether rows are kept apart, so that no token sees another document's; else they are one stream.
        shares: Parts of training, validation and test.
        stride: Tokens from one training piece's start to the next's; `seq_len` by default, and less for pieces that
            overlap.
    """

    def __init__(
        self,
        *,
        path: str,
        seq_len: int = 256,
        tokenizer: str = "bytes",
        column: str = "text",
        packed: bool = False,
        shares: tuple[float, float, float] = (0.9, 0.05, 0.05),
        stride: int | None = None,
    ) -> None:
        documents = read_documents(find_text(path), column)
        chosen = Characters.of("".join(documents)) if tokenizer == "characters" else find_tokenizer(tokenizer)
        super().__init__(documents, chosen, seq_len, shares, packed, stride)


@datasets.register("tiny_shakespeare", kind="language", source="github.com/karpathy/char-rnn")
class TinyShakespeare(TextData):
    """Tiny Shakespeare, 1.1 million characters, from SELECTRA_DATA; the first 90 % train, the last 10 % validate.

    Args:
        seq_len: Tokens of a piece.
        tokenizer: "characters" (65) or "bytes".
        shares: Parts of training, validation and test.
        stride: Tokens from one training piece's start to the next's; `seq_len` by default, and less for pieces that
            overlap.
    """

    def __init__(
        self,
        *,
        seq_len: int = 256,
        tokenizer: Literal["characters", "bytes"] = "characters",
        shares: tuple[float, float, float] = (0.9, 0.1, 0.0),
        stride: int | None = None,
    ) -> None:
        text = read_documents(find_text("tinyshakespeare.txt.gz"), "text")[0]
        chosen = Characters.of(text) if tokenizer == "characters" else Bytes()
        super().__init__([text], chosen, seq_len, shares, packed=False, stride=stride)


@datasets.register("wikitext2", kind="language", source="arXiv:1609.07843")
class WikiText2(TokenData):
    """WikiText-2 from SELECTRA_DATA: trains on its file of training where that is there, else on that of validation.

    Files are `wikitext2.{train,valid,test}.txt`, `.gz` or not. Without the file of training, which is large, the first
    nine tenths of the validation file train and the rest validates, so that results are no published perplexities; the
    test is always the whole test file.

    Args:
        seq_len: Tokens of a piece.
        tokenizer: "words" (as the files are split, unknown ones as `<unk>`), "characters", "bytes", or a
            tokenizer.json.
    """

    def __init__(self, *, seq_len: int = 256, tokenizer: str = "words") -> None:
        train, valid, test = (_wikitext(part) for part in ("train", "valid", "test"))
        if valid is None or test is None:
            find_text("wikitext2.test.txt.gz" if valid else "wikitext2.valid.txt.gz")
        texts = [valid or "", test or ""] if train is None else [train, valid or "", test or ""]
        makers = {"words": Words.of, "characters": Characters.of}
        # Words of validation and test that training does not have are unknown; characters must all have an id.
        known = texts[0] if tokenizer == "words" else "".join(texts)
        chosen = makers[tokenizer](known) if tokenizer in makers else find_tokenizer(tokenizer)
        encoded = [np.asarray(chosen.encode(text), dtype=np.int32) for text in texts]
        self.whole = train is not None
        total = sum(map(len, encoded))
        n_test = len(encoded[-1])
        n_train = len(encoded[0]) if self.whole else round(0.9 * len(encoded[0]))
        shares = (n_train / total, (total - n_train - n_test) / total, n_test / total)
        starts = np.cumsum([0, *map(len, encoded)])[:-1]
        super().__init__(np.concatenate(encoded), starts, chosen, seq_len, shares, packed=False)

    def summary(self) -> list[str]:
        """Lines for the terminal."""
        note = "the file of training is not there: the validation file's first nine tenths train"
        return [*super().summary(), *([] if self.whole else [note])]


def _wikitext(part: str) -> str | None:
    """A file's text; None where there is none."""
    for ending in (".txt", ".txt.gz"):
        try:
            return read_documents(find_text(f"wikitext2.{part}{ending}"), "text")[0]
        except DataError as error:
            if "there is no text file" not in str(error):
                raise
    return None


def find_text(path: str) -> Path:
    """The file, or the one of that name in the data folder.

    Raises:
        DataError: There is none.
    """
    given = Path(path)
    if given.is_file():
        return given
    places = folders() if given.name == path else []
    found = sorted(file for place in places if place.is_dir() for file in place.rglob(path))
    if not found:
        where = "".join(f", nor in '{place}'" for place in places)
        raise DataError(f"there is no text file '{path}'{where}; SELECTRA_DATA names the folder of public sets.")
    return found[0]


def kind_of(path: Path) -> str:
    """What a file's name ends with, `.gz` left out."""
    return path.name.removesuffix(".gz").rpartition(".")[2]


def read_documents(path: Path, column: str) -> list[str]:
    """The texts of a file: one of a text file, one a row of JSONL and parquet.

    Raises:
        DataError: The file is damaged, or has no such column of text.
    """
    kind = kind_of(path)
    try:
        if kind in ("jsonl", "parquet"):
            reader = pyarrow.json.read_json if kind == "jsonl" else pyarrow.parquet.read_table
            return _column(path, reader(path), column)
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return [content.decode("utf-8")]
    except (OSError, EOFError, UnicodeDecodeError, pa.ArrowInvalid) as error:
        raise DataError(f"'{path}' cannot be read as text: {str(error).partition(chr(10))[0]}") from error


def _column(path: Path, table: Any, column: str) -> list[str]:
    if column not in table.column_names:
        raise DataError(f"'{path}' has no column '{column}'; it has {', '.join(table.column_names)}.")
    values = table.column(column).to_pylist()
    if not all(value is None or isinstance(value, str) for value in values):
        raise DataError(f"'{path}': column '{column}' is {table.schema.field(column).type}; it must be text.")
    return [value for value in values if value]
