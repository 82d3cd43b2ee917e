"""Tokenised shards hold what the files hold, train alike, and say what is wrong with them."""

import gzip
import json
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from typer.testing import CliRunner

import selectra.models  # noqa: F401
from selectra.cli import app
from selectra.data.held_text import held_split, hold
from selectra.data.shards import TextShards, stream_documents, write_shards
from selectra.data.text import IGNORED, TextFile, WikiText2
from selectra.errors import ConfigError, DataError
from selectra.language.tokens import Words, find_tokenizer
from selectra.registry import models
from selectra.spec import Spec

DOCUMENTS = ["the first one", "ß and €", "a third document that is longer than a piece", "four", "the fifth is last"]


@pytest.fixture
def files(tmp_path):
    """The same documents in every kind of file."""
    lines = "".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate([*DOCUMENTS, ""]))
    (tmp_path / "rows.jsonl").write_text(lines + "\n")
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    table = pa.table({"text": [*DOCUMENTS, None], "n": range(6)})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet", row_group_size=2)
    (tmp_path / "all.txt").write_text("".join(DOCUMENTS))
    return tmp_path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.parquet"])
@pytest.mark.parametrize("packed", [False, True])
def test_shards_are_the_file(files, name, packed):
    found = write_shards([files / name], files / "shards", shard_tokens=20)
    assert len(found["shards"]) > 2 and sum(shard["documents"] for shard in found["shards"]) == 5
    assert np.load(files / "shards" / "tokens-00000.npy").dtype == np.uint16
    options = {"seq_len": 8, "packed": packed, "shares": (0.5, 0.25, 0.25)}
    data, whole = TextShards(path=str(files / "shards"), **options), TextFile(path=str(files / "rows.jsonl"), **options)
    assert data.facts == whole.facts and np.array_equal(data.starts, whole.starts)
    for split in ("train", "val", "test"):
        ours, theirs = data.windows(split), whole.windows(split)
        assert len(ours) == len(theirs)
        batch, wanted = ours[list(range(len(ours)))], theirs[list(range(len(ours)))]
        assert torch.equal(batch.tokens, wanted.tokens) and torch.equal(batch.targets, wanted.targets)
        assert packed == (batch.cu_seqlens is not None)
        if batch.cu_seqlens is not None and wanted.cu_seqlens is not None:
            assert torch.equal(batch.cu_seqlens, wanted.cu_seqlens)
    if not packed:
        split, held = held_split(data, "val"), hold(data, torch.device("cpu"))
        batch = held.batch(split.first + split.stride * torch.arange(split.count), torch.tensor(split.end))
        wanted = data.windows("val")[list(range(split.count))]
        assert torch.equal(batch.targets, wanted.targets)
        kept = wanted.targets != IGNORED
        assert torch.equal(batch.tokens[kept], wanted.tokens[kept])


def test_several_files_and_an_end(files):
    written = write_shards([files / "all.txt", files / "rows.parquet"], files / "out", end="\n", tokenizer="bytes")
    assert written["sources"] == ["all.txt", "rows.parquet"]
    data = TextShards(path=str(files / "out"), packed=True, shares=(1.0, 0.0, 0.0))
    ids = np.asarray(data.ids)
    ends = [*data.starts[1:], len(ids)]
    texts = [data.tokenizer.decode(ids[start:end].tolist()) for start, end in zip(data.starts, ends, strict=True)]
    assert texts == ["".join(DOCUMENTS) + "\n", *(text + "\n" for text in DOCUMENTS)]
    assert find_tokenizer(files / "out").vocab_size == 256
    with pytest.raises(ConfigError, match="holds shards already"):
        write_shards([files / "all.txt"], files / "out")
    with pytest.raises(ConfigError, match="is 2 tokens"):
        write_shards([files / "all.txt"], files / "other", end="ab")


def test_packed_shards_do_not_leak_through_any_mixer(files):
    """Logits in a packed piece are those of each document's part alone: scan, convolution, attention and shift."""
    write_shards([files / "rows.jsonl"], files / "out", shard_tokens=20)
    windows = TextShards(path=str(files / "out"), seq_len=16, packed=True, shares=(1.0, 0.0, 0.0)).windows("train")
    batch = windows[list(range(len(windows)))]
    assert batch.cu_seqlens is not None
    borders = batch.cu_seqlens.tolist()
    for name in ("mamba_lm_smoke", "jamba_smoke", "gpt_smoke", "rwkv_smoke", "retnet_smoke", "hyena_smoke"):
        model = models.build(Spec(name), {"vocab_size": 256}).double().eval()
        logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens)
        for start, end in pairwise(borders):
            assert torch.allclose(logits[:, start:end], model(batch.tokens[:, start:end]), rtol=1e-9, atol=1e-10), name


def test_the_command(files):
    words = ["tokenize", str(files / "rows.parquet"), "--out", str(files / "out"), "--tokenizer", "characters"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0 and "5 documents" in result.output
    data = TextShards(path=str(files / "out"))
    assert data.facts["vocab_size"] == len(set("".join(DOCUMENTS)))


def test_a_trained_tokenizer(files):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=80, special_tokens=["?", "<|end|>"], show_progress=False)
    made.train_from_iterator(DOCUMENTS, trainer)
    made.save(str(files / "tokenizer.json"))
    write_shards([files / "rows.jsonl"], files / "out", tokenizer=str(files / "tokenizer.json"), end="<|end|>")
    data = TextShards(path=str(files / "out"), packed=True, shares=(1.0, 0.0, 0.0))
    assert data.facts["vocab_size"] == made.get_vocab_size()
    ids = np.asarray(data.ids)
    assert (ids[data.starts[1:] - 1] == 1).all() and ids[-1] == 1
    assert ids[: data.starts[1] - 1].tolist() == made.encode(DOCUMENTS[0]).ids


def test_damage_is_named(files):
    out = files / "out"
    with pytest.raises(DataError, match="selectra tokenize"):
        TextShards(path=str(out))
    write_shards([files / "rows.jsonl"], out)
    tokens = np.load(out / "tokens-00000.npy")
    np.save(out / "tokens-00000.npy", tokens[:-1])
    with pytest.raises(DataError, match="says otherwise"):
        TextShards(path=str(out))
    np.save(out / "tokens-00000.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="cannot be read as a shard"):
        TextShards(path=str(out))
    (out / "shards.json").write_text("[]")
    with pytest.raises(DataError, match="no index"):
        TextShards(path=str(out))
    (files / "broken.jsonl").write_text('{"text": 3}\n')
    with pytest.raises(DataError, match="line 1"):
        list(stream_documents(files / "broken.jsonl", "text"))
    with pytest.raises(DataError, match="no column 'body'"):
        list(stream_documents(files / "rows.parquet", "body"))
    with pytest.raises(DataError, match="'n' is int64"):
        list(stream_documents(files / "rows.parquet", "n"))
    (files / "empty.txt").write_text("")
    with pytest.raises(DataError, match="the text is empty"):
        write_shards([files / "empty.txt"], files / "nothing")


def test_words():
    tokenizer = Words.of(" the cat \n the hat \n")
    assert tokenizer.vocab_size == 5 and tokenizer.encode("the dog \n") == [4, 1, 0]
    assert tokenizer.decode([4, 2]) == "the cat "
    with pytest.raises(ConfigError, match="<unk>"):
        Words(["a"])


def test_wikitext2(data_folder, tmp_path, monkeypatch):
    data = WikiText2()
    # The counts of words with line ends that the sets are known by.
    assert len(data.windows("test").ids) == 245_569
    assert len(data.windows("train").ids) + len(data.windows("val").ids) == 217_646
    assert not data.whole and "nine tenths" in data.summary()[1]
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path))
    for part, text in (("train", "a b \n"), ("valid", "a c \n"), ("test", "b \n")):
        (tmp_path / f"wikitext2.{part}.txt").write_text(text)
    data = WikiText2()
    assert data.whole and data.windows("train").ids.tolist() == data.tokenizer.encode("a b \n")
    assert data.windows("val").ids.tolist() == data.tokenizer.encode("a <unk> \n")
    (tmp_path / "wikitext2.test.txt").unlink()
    with pytest.raises(DataError, match=r"wikitext2\.test"):
        WikiText2()
