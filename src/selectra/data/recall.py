"""Generated strings that ask for memory: copy what was read, or recall what stood beside a key."""

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from selectra.data.held_text import HeldSplit, HeldText
from selectra.data.text import IGNORED, TextBatch
from selectra.errors import ConfigError
from selectra.registry import datasets

Split = Literal["train", "val", "test"]


class Examples:
    """A range of examples.

    Args:
        tokens: Of every example one more than positions: the last one is only a target.
        counts: Which targets count.
    """

    def __init__(self, tokens: Int[np.ndarray, "n l1"], counts: Bool[np.ndarray, " l"]) -> None:
        self.tokens, self.counts = tokens, counts

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: int | Sequence[int]) -> TextBatch:
        return self.__getitems__([indices] if isinstance(indices, int) else indices)

    def __getitems__(self, indices: Sequence[int]) -> TextBatch:
        """The examples with these numbers, in this order."""
        ids = self.tokens[np.asarray(indices, dtype=np.int64)].astype(np.int64)
        targets = np.where(self.counts, ids[:, 1:], IGNORED)
        return TextBatch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets))


class Generated:
    """Examples drawn from a seed, the first ones for training; only answers are targets.

    Args:
        tokens: All examples, `(n, positions + 1)`.
        counts: Which positions are followed by an answer.
        vocab_size: Tokens there are.
        held_out: Examples of validation, and as many of the test.
    """

    def __init__(
        self, tokens: Int[np.ndarray, "n l1"], counts: Bool[np.ndarray, " l"], vocab_size: int, held_out: int
    ) -> None:
        self.tokens, self.counts, self.vocab_size = tokens, counts, vocab_size
        self.seq_len = len(counts)
        train = len(tokens) - 2 * held_out
        self._borders = {"train": (0, train), "val": (train, train + held_out), "test": (train + held_out, len(tokens))}

    @property
    def facts(self) -> dict[str, Any]:
        """What a model takes from the data."""
        return {"vocab_size": self.vocab_size, "seq_len": self.seq_len}

    def windows(self, split: Split) -> Examples:
        """The examples of a split."""
        start, end = self._borders[split]
        return Examples(self.tokens[start:end], self.counts)

    def held(self, device: torch.device) -> HeldText:
        """All examples on a device."""
        counts: Tensor = torch.from_numpy(self.counts).to(device)
        return HeldText(torch.from_numpy(self.tokens).to(device), self.seq_len, counts)

    def held_split(self, split: Split) -> HeldSplit:
        """Where a split lies in `held`."""
        start, end = self._borders[split]
        return HeldSplit(start, end, 1, end - start)

    def summary(self) -> list[str]:
        """Lines for the terminal."""
        parts = ", ".join(f"{name} {end - start:,}" for name, (start, end) in self._borders.items())
        return [
            f"examples of {self.seq_len} tokens of {self.vocab_size}, {int(self.counts.sum())} answers each: {parts}"
        ]

    def describe(self) -> dict[str, Any]:
        """What identifies the data."""
        return {"fingerprint": hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16], "examples": len(self.tokens)}


def _require(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: needs at least 1")


@datasets.register("copying", kind="language", source="arXiv:2402.01032")
class Copying(Generated):
    """A random string, a sign, and the string again: Jelassi et al. 2024, "Repeat After Me", Sec. 3.

    A model whose state is smaller than the string cannot copy it.

    Args:
        length: Letters of the string.
        letters: Different letters.
        examples: Training examples.
        held_out: Examples of validation, and as many of the test.
        seed: Of all examples.
    """

    def __init__(
        self, *, length: int = 64, letters: int = 26, examples: int = 50_000, held_out: int = 1000, seed: int = 0
    ) -> None:
        _require(length=length, letters=letters, examples=examples, held_out=held_out)
        draw = np.random.default_rng(seed)
        text = draw.integers(0, letters, (examples + 2 * held_out, length), dtype=np.int16)
        sign = np.full((len(text), 1), letters, np.int16)
        counts = np.arange(2 * length) >= length
        super().__init__(np.concatenate([text, sign, text], 1), counts, letters + 1, held_out)


@datasets.register("recall", kind="language", source="arXiv:2312.04927")
class Recall(Generated):
    """Pairs of a key and a value, then every key again in another order: what was its value?

    Multi-query associative recall, Arora et al. 2023, "Zoology", Sec. 3.1. Departures: every key is asked for once, at
    even distances in a random order; theirs come at distances of a power law.

    Args:
        pairs: Pairs to remember.
        keys: Different keys, and as many different values.
        examples: Training examples.
        held_out: Examples of validation, and as many of the test.
        seed: Of all examples.
    """

    def __init__(
        self, *, pairs: int = 16, keys: int = 128, examples: int = 50_000, held_out: int = 1000, seed: int = 0
    ) -> None:
        _require(pairs=pairs, keys=keys, examples=examples, held_out=held_out)
        if pairs > keys:
            raise ConfigError(f"pairs={pairs}: every pair has a key of its own, and there are keys={keys}")
        draw = np.random.default_rng(seed)
        n = examples + 2 * held_out
        chosen = draw.random((n, keys), dtype=np.float32).argsort(1)[:, :pairs]
        values = keys + draw.integers(0, keys, (n, pairs))
        order = draw.random((n, pairs), dtype=np.float32).argsort(1)
        told = np.stack([chosen, values], 2)
        asked = np.take_along_axis(told, order[:, :, None], 1)
        tokens = np.concatenate([told, asked], 1).reshape(n, 4 * pairs).astype(np.int16)
        place = np.arange(4 * pairs - 1)
        super().__init__(tokens, (place >= 2 * pairs) & (place % 2 == 0), 2 * keys, held_out)
