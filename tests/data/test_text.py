"""Text files as pieces of tokens: nothing is lost, nothing leaks, and files of every kind are read."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import selectra.models  # noqa: F401
from selectra.data.text import IGNORED, TextFile, TinyShakespeare
from selectra.errors import ConfigError, DataError
from selectra.registry import models
from selectra.spec import Spec
from selectra.train.same_data import describe_data

DOCUMENTS = ["first document", "ß", "the third one, which is longer than a piece", "fourth"]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate([*DOCUMENTS, ""])))
    return path


def test_a_stream_keeps_every_token_and_its_successor(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 3 + "xyz")
    data = TextFile(path=str(path), seq_len=7, shares=(1.0, 0.0, 0.0))
    windows = data.windows("train")
    assert data.facts == {"vocab_size": 256, "seq_len": 7} and len(windows) == 5
    batch = windows.__getitems__(range(5))
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    kept = targets != IGNORED
    # The last token is only a target.
    assert bytes(tokens[kept].tolist()).decode() == ("abcdefghij" * 3 + "xyz")[:-1]
    assert bytes(targets[kept].tolist()).decode() == ("abcdefghij" * 3 + "xyz")[1:]
    assert len(data.windows("val")) == len(data.windows("test")) == 0


def test_packed_documents_do_not_leak(rows):
    data = TextFile(path=str(rows), seq_len=16, packed=True, shares=(1.0, 0.0, 0.0))
    windows = data.windows("train")
    batch = windows[list(range(len(windows)))]
    assert batch.cu_seqlens is not None and batch.tokens.shape[0] == 1 and batch.cu_seqlens.dtype == torch.int32
    # No target is another document's token: one of every document's tokens is no target.
    n_targets = int((batch.targets != IGNORED).sum())
    assert n_targets == sum(len(text.encode()) - 1 for text in DOCUMENTS)
    borders = batch.cu_seqlens.tolist()
    text = "".join(DOCUMENTS).encode()
    starts = np.cumsum([0, *(len(d.encode()) for d in DOCUMENTS)])[:-1]
    assert set(starts) <= set(borders) and set(range(0, len(text), 16)) <= set(borders)
    # A model's logits in a packed piece are those of the document's part alone.
    model = models.build(Spec("mamba_lm_smoke"), {"vocab_size": 256}).double().eval()
    logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens)
    for start, end in pairwise(borders):
        assert torch.allclose(logits[:, start:end], model(batch.tokens[:, start:end]))


def test_files_of_every_kind_are_read(rows, tmp_path):
    table = pa.table({"text": [*DOCUMENTS, None], "body": ["x"] * 5, "n": range(5)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    (tmp_path / "all.txt.gz").write_bytes(gzip.compress("".join(DOCUMENTS).encode()))
    found = [TextFile(path=str(path)) for path in (rows, tmp_path / "rows.parquet", tmp_path / "all.txt.gz")]
    assert all(np.array_equal(data.ids, found[0].ids) for data in found)
    assert [len(data.starts) for data in found] == [4, 4, 1]
    assert TextFile(path=str(tmp_path / "rows.parquet"), column="body").ids.tolist() == [120] * 5
    characters = TextFile(path=str(rows), tokenizer="characters")
    assert characters.facts["vocab_size"] == len(set("".join(DOCUMENTS)))
    assert describe_data(characters) != describe_data(found[0])


def test_parts_follow_each_other(rows):
    data = TextFile(path=str(rows), seq_len=4, shares=(0.5, 0.25, 0.25))
    parts = [data.windows(split).ids for split in ("train", "val", "test")]
    assert np.array_equal(np.concatenate(parts), data.ids) and len(parts[0]) == len(data.ids) // 2


def test_what_cannot_be_read_is_said(rows, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "broken.jsonl").write_text("{")
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "broken.txt.gz").write_text("x")
    for path, message in (
        (tmp_path / "absent.txt", "there is no text file"),
        (tmp_path / "empty.txt", "the text is empty"),
        *((tmp_path / f"{name}", "cannot be read as text") for name in ("binary.txt", "broken.jsonl", "broken.txt.gz")),
        (tmp_path / "broken.parquet", "cannot be read as text"),
    ):
        with pytest.raises(DataError, match=message):
            TextFile(path=str(path))
    with pytest.raises(DataError, match="no column 'body'; it has text, n"):
        TextFile(path=str(rows), column="body")
    with pytest.raises(DataError, match="column 'n' is int64"):
        TextFile(path=str(rows), column="n")
    with pytest.raises(ConfigError, match="seq_len=0"):
        TextFile(path=str(rows), seq_len=0)
    for shares in ((0.5, 0.5, 0.5), (0.0, 0.5, 0.5)):
        with pytest.raises(ConfigError, match="shares"):
            TextFile(path=str(rows), shares=shares)


def test_tiny_shakespeare_is_the_known_text(data_folder):
    data = TinyShakespeare()
    assert len(data.ids) == 1_115_394 and data.facts["vocab_size"] == 65
    assert len(data.windows("train").ids) == 1_003_855 and len(data.windows("val").ids) == 111_539
    assert data.tokenizer.decode(data.ids[:14].tolist()) == "First Citizen:"
