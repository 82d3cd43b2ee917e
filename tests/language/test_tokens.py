"""Text to tokens and back, and text as it comes."""

import gzip
import json
from pathlib import Path

import pytest

from selectra.errors import ConfigError, DataError
from selectra.language.tokens import Bytes, Characters, Pieces, Tokenizer, Writer, find_tokenizer

TEXT = "Schöne Grüße, 世界 🙂!\n"


@pytest.fixture
def pieces(data_folder: Path, tmp_path: Path) -> Pieces:
    """GPT-NeoX's vocabulary, which mamba_ssm's models have."""
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'selectra[language]')")
    packed = data_folder / "tokenizers" / "gpt-neox-20b.tokenizer.json.gz"
    (tmp_path / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    return Pieces(tmp_path / "tokenizer.json")


def test_text_is_kept():
    for tokenizer in (Bytes(), Characters.of(TEXT)):
        ids = tokenizer.encode(TEXT)
        assert tokenizer.decode(ids) == TEXT and max(ids) < tokenizer.vocab_size
    assert Bytes().encode("é") == [195, 169]
    assert Bytes().decode([255, 300, 65]) == "\ufffd\ufffdA"
    assert Characters("abc").encode("cab") == [2, 0, 1]
    with pytest.raises(DataError, match="no token for 'x'"):
        Characters("abc").encode("axb")
    with pytest.raises(ConfigError, match="only once"):
        Characters("aa")


def test_trained_vocabularies_are_read(pieces, tmp_path):
    ids = pieces.encode(TEXT)
    assert pieces.decode(ids) == TEXT and len(ids) < len(TEXT.encode())
    assert pieces.encode("Hello world") == [12092, 1533]
    pieces.save(tmp_path)
    assert find_tokenizer(tmp_path).encode(TEXT) == ids


def test_what_is_beside_a_model_is_found(tmp_path):
    assert isinstance(find_tokenizer("bytes"), Bytes)
    with pytest.raises(DataError, match=r"no tokenizer\.json; give one, or `bytes`"):
        find_tokenizer(tmp_path)
    Bytes().save(tmp_path)
    assert isinstance(find_tokenizer(tmp_path), Bytes)
    Characters("xyz").save(tmp_path)
    found = find_tokenizer(tmp_path)
    assert isinstance(found, Characters) and found.characters == "xyz"
    ours = tmp_path / "selectra_tokenizer.json"
    for content, message in (("{", "no JSON"), ("[]", "no JSON object"), ('{"kind": "words"}', "'words'")):
        ours.write_text(content)
        with pytest.raises(DataError, match=message):
            find_tokenizer(tmp_path)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    pytest.importorskip("tokenizers", reason="tokenizers is not installed (pip install 'selectra[language]')")
    path = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="there is no tokenizer"):
        Pieces(path)
    for content in ("nonsense", json.dumps({"version": "1.0"})):
        path.write_text(content)
        with pytest.raises(DataError, match=r"JSON|no tokenizer"):
            Pieces(path)


def shown(tokenizer: Tokenizer, ids: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], Writer]:
    writer = Writer(tokenizer, stops)
    news = [writer.add(token) for token in ids]
    return [*news, writer.end()], writer


def test_characters_come_whole():
    news, writer = shown(Bytes(), Bytes().encode(TEXT))
    assert "".join(news) == writer.text == TEXT
    assert "ö" in news and not any("\ufffd" in piece for piece in news)
    # What is never completed is shown at the end.
    news, writer = shown(Bytes(), [65, 195])
    assert news == ["A", "", "\ufffd"] and writer.text == "A\ufffd"


def test_pieces_keep_their_spaces(pieces):
    news, writer = shown(pieces, pieces.encode(TEXT + " and more words"))
    assert "".join(news) == writer.text == TEXT + " and more words"


def test_a_special_token_takes_no_space_with_it(tmp_path):
    """Llama's vocabularies decode without the first space; that of a token behind a special one is not the first."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install 'selectra[language]'")
    parts = tokenizers.decoders
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"\u2581the": 0, "\u2581end": 1, "<s>": 2}, "<s>"))
    made.add_special_tokens(["<s>"])
    made.decoder = parts.Sequence([parts.Replace("\u2581", " "), parts.Fuse(), parts.Strip(" ", 1, 0)])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer, ids = find_tokenizer(tmp_path), [0, 2, 1, 2, 2, 1, 2]
    news, writer = shown(tokenizer, ids)
    assert "".join(news) == writer.text == tokenizer.decode(ids) == "the end end"


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("one EEND", ("END", "two"), "one E"),
        ("a\n\nb", ("\n\n",), "a"),
        ("abab", ("bab", "ab"), ""),
        ("one EN", ("END",), "one EN"),
    ],
)
def test_a_stop_string_ends_the_text_and_is_not_shown(text, stops, wanted):
    news, writer = shown(Bytes(), Bytes().encode(text), stops)
    assert "".join(news) == writer.text == wanted
    assert writer.ended == (wanted != text)
    with pytest.raises(ConfigError, match="empty"):
        Writer(Bytes(), ("",))
