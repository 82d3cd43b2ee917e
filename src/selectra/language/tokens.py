"""Text to token ids and back: bytes, characters, or a trained vocabulary of the package `tokenizers`."""

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from selectra.errors import ConfigError, DataError

TRAINED, OURS = "tokenizer.json", "selectra_tokenizer.json"
# What bytes that are no character are shown as; at the end of a text the character may still be coming.
BROKEN = "\N{REPLACEMENT CHARACTER}"


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        ...

    def save(self, folder: Path) -> None:
        """Keep it beside a model."""
        ...


class Bytes:
    """Every byte of the text's UTF-8 is a token."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; of bytes that are no UTF-8, and ids above 255, a replacement character each."""
        return b"".join(bytes([i]) if i < 256 else BROKEN.encode() for i in ids).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Keep it beside a model."""
        (folder / OURS).write_text(json.dumps({"kind": "bytes"}) + "\n")


class Characters:
    """Every character is a token.

    Args:
        characters: All of them; the place of one is its id.
    """

    def __init__(self, characters: str) -> None:
        if not characters or len(set(characters)) != len(characters):
            raise ConfigError("characters: needs at least one, and each only once")
        self.characters = characters
        self._ids = {character: i for i, character in enumerate(characters)}

    @classmethod
    def of(cls, text: str) -> "Characters":
        """Those that occur in a text, in their order in Unicode."""
        return cls("".join(sorted(set(text))))

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.characters)

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            DataError: A character is not among those that are known.
        """
        unknown = sorted(set(text) - self._ids.keys())
        if unknown:
            raise DataError(f"the model has no token for {unknown[0]!r}; it knows {self.characters!r}.")
        return [self._ids[character] for character in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return "".join(self.characters[i] if i < len(self.characters) else BROKEN for i in ids)

    def save(self, folder: Path) -> None:
        """Keep it beside a model."""
        (folder / OURS).write_text(json.dumps({"kind": "characters", "characters": self.characters}) + "\n")


UNKNOWN = "<unk>"


class Words:
    """Every word between spaces is a token, and every line's end; unknown words are one.

    Args:
        words: All of them; the place of one is its id. Among them `<unk>`.
    """

    def __init__(self, words: Sequence[str]) -> None:
        if UNKNOWN not in words or len(set(words)) != len(words):
            raise ConfigError(f"words: needs each only once, {UNKNOWN!r} among them")
        self.words = list(words)
        self._ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def of(cls, text: str) -> "Words":
        """Those that occur in a text, in alphabetical order."""
        return cls(sorted({UNKNOWN, *cls.split(text)}))

    @staticmethod
    def split(text: str) -> list[str]:
        """The words of a text, line ends too."""
        return [word for word in text.replace("\n", " \n ").split(" ") if word]

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        unknown = self._ids[UNKNOWN]
        return [self._ids.get(word, unknown) for word in self.split(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with a space behind every word."""
        return "".join(f"{self.words[i] if i < len(self.words) else UNKNOWN} " for i in ids)

    def save(self, folder: Path) -> None:
        """Keep it beside a model."""
        content = json.dumps({"kind": "words", "words": self.words}, ensure_ascii=False)
        (folder / OURS).write_text(content + "\n", encoding="utf-8")


class Pieces:
    """A vocabulary of the package `tokenizers`.

    Args:
        path: Its tokenizer.json.
    """

    def __init__(self, path: Path) -> None:
        try:
            package: Any = importlib.import_module("tokenizers")
        except ImportError as error:
            raise ConfigError(f"'{path}' needs tokenizers: pip install 'selectra[language]'.") from error
        if not path.is_file():
            raise DataError(f"there is no tokenizer '{path}'.")
        text = path.read_text(encoding="utf-8", errors="replace")
        if not isinstance(_json(path, text).get("model"), dict):
            raise DataError(f"'{path}' is no tokenizer: it has no 'model'.")
        self._tokenizer = package.Tokenizer.from_str(text)

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._tokenizer.encode(text).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""
        return self._tokenizer.decode(list(ids))

    def save(self, folder: Path) -> None:
        """Keep it beside a model."""
        self._tokenizer.save(str(folder / TRAINED))


def find_tokenizer(where: str | Path) -> Tokenizer:
    """A tokenizer: "bytes", a tokenizer.json, or the folder of a model that has one.

    Raises:
        DataError: There is none.
    """
    if str(where) == "bytes":
        return Bytes()
    path = Path(where)
    if path.is_dir() and (path / OURS).is_file():
        return _read_ours(path / OURS)
    if path.is_dir() and not (path / TRAINED).is_file():
        raise DataError(f"'{path}' has no {TRAINED}; give one, or `bytes` for a model of bytes, with --tokenizer.")
    return Pieces(path / TRAINED if path.is_dir() else path)


def _read_ours(path: Path) -> Tokenizer:
    content = _json(path, path.read_text(encoding="utf-8", errors="replace"))
    kind = content.get("kind")
    if kind == "bytes":
        return Bytes()
    if kind == "characters" and isinstance(content.get("characters"), str):
        return Characters(content["characters"])
    if kind == "words" and isinstance(content.get("words"), list):
        return Words(content["words"])
    raise DataError(f"'{path}' is of kind {kind!r}; there are 'bytes', 'characters' and 'words'.")


def _json(path: Path, text: str) -> dict[str, Any]:
    """The object that a text is."""
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"'{path}' is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"'{path}' holds no JSON object.")
    return content


class Writer:
    """The text of tokens as they come, as far as no later token can change it, and its end at a stop string.

    Args:
        tokenizer: Of the tokens.
        stops: Where any of these strings appears, the text ends before it.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        if any(not stop for stop in stops):
            raise ConfigError("a stop string is empty; it would end every text at once.")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._ids: list[int] = []
        # Tokens from `_start` on are decoded together; those before `_read` have been put into the text.
        self._start = self._read = 0
        self._told = 0
        self.text = ""
        self.ended = False

    def add(self, token: int) -> str:
        """What can be shown now that was not before."""
        if self.ended:
            return ""
        self._ids.append(token)
        before = self._tokenizer.decode(self._ids[self._start : self._read])
        both = self._tokenizer.decode(self._ids[self._start :])
        # A piece of a character: the rest is still to come. Behind what is no text, such as a special token, the next
        # one would be decoded as the first, without its space.
        if len(both) > len(before) and not both.endswith(BROKEN):
            self.text += both[len(before) :]
            self._start, self._read = self._read, len(self._ids)
        return self._news(final=False)

    def end(self) -> str:
        """What is left when no token follows."""
        if not self.ended:
            before = self._tokenizer.decode(self._ids[self._start : self._read])
            self.text += self._tokenizer.decode(self._ids[self._start :])[len(before) :]
            self._start = self._read = len(self._ids)
        return self._news(final=True)

    def _news(self, final: bool) -> str:
        places = [place for stop in self._stops if (place := self.text.find(stop)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True
        shown = len(self.text)
        if not (final or self.ended):
            shown -= max((_overlap(self.text, stop) for stop in self._stops), default=0)
        news, self._told = self.text[self._told : shown], max(self._told, shown)
        return news


def _overlap(text: str, stop: str) -> int:
    """How many last characters of the text may be the beginning of the stop string."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
