"""Generated strings that ask for memory: copy what was read, or recall what stood beside a key."""

import hashlib
from collections.abc import Callable, Sequence
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
# Examples, each with one token more than positions, and which positions are followed by an answer.
Drawn = tuple[Int[np.ndarray, "n l1"], Bool[np.ndarray, "n l"]]


class Examples:
    """A range of examples.

    Args:
        tokens: Of every example one more than positions: the last one is only a target.
        counts: Which targets count.
    """

    def __init__(self, tokens: Int[np.ndarray, "n l1"], counts: Bool[np.ndarray, "n l"]) -> None:
        self.tokens, self.counts = tokens, counts

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: int | Sequence[int]) -> TextBatch:
        return self.__getitems__([indices] if isinstance(indices, int) else indices)

    def __getitems__(self, indices: Sequence[int]) -> TextBatch:
        """The examples with these numbers, in this order."""
        chosen = np.asarray(indices, dtype=np.int64)
        ids = self.tokens[chosen].astype(np.int64)
        targets = np.where(self.counts[chosen], ids[:, 1:], IGNORED)
        return TextBatch(torch.from_numpy(ids[:, :-1].copy()), torch.from_numpy(targets))


class Generated:
    """Examples drawn from a seed, in parts for training, validation and test; only answers are targets.

    Args:
        parts: Of each part the examples, and which of their positions are followed by an answer.
        vocab_size: Tokens there are.
    """

    def __init__(self, parts: dict[Split, Drawn], vocab_size: int) -> None:
        self.tokens = np.concatenate([tokens for tokens, _ in parts.values()])
        self.counts = np.concatenate([counts for _, counts in parts.values()])
        self.vocab_size, self.seq_len = vocab_size, self.counts.shape[1]
        ends = np.cumsum([len(tokens) for tokens, _ in parts.values()]).tolist()
        self._borders = dict(zip(parts, zip([0, *ends], ends, strict=False), strict=True))

    @property
    def facts(self) -> dict[str, Any]:
        """What a model takes from the data."""
        return {"vocab_size": self.vocab_size, "seq_len": self.seq_len}

    def windows(self, split: Split) -> Examples:
        """The examples of a split."""
        start, end = self._borders[split]
        return Examples(self.tokens[start:end], self.counts[start:end])

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
        parts = ", ".join(
            f"{name} {end - start:,} with {self.counts[start:end].sum(1).mean():.1f}"
            for name, (start, end) in self._borders.items()
        )
        return [f"examples of {self.seq_len} tokens of {self.vocab_size}, with so many answers each: {parts}"]

    def describe(self) -> dict[str, Any]:
        """What identifies the data."""
        return {"fingerprint": hashlib.sha256(self.tokens.tobytes()).hexdigest()[:16], "examples": len(self.tokens)}


def _require(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ConfigError(f"{name}={value}: needs at least 1")


def _parts(
    train: Callable[[int, int], Drawn], held: Callable[[int, int], Drawn], draw: np.random.Generator,
    shares: dict[int, float], examples: int, held_out: int,
) -> dict[Split, Drawn]:  # fmt: skip
    """All examples: those of training of all sizes in a random order, those held out of the largest alone."""
    ends = np.rint(examples * np.cumsum([0.0, *shares.values()])).astype(int)
    drawn = [train(n, size) for n, size in zip(np.diff(ends).tolist(), shares, strict=True)]
    tokens, counts = (np.concatenate(found) for found in zip(*drawn, strict=True))
    order, largest = draw.permutation(examples), max(shares)
    return {"train": (tokens[order], counts[order]), "val": held(held_out, largest), "test": held(held_out, largest)}


def _shares(largest: int, mixed: bool) -> dict[int, float]:
    """Of training's examples by size: half have size 2, a quarter 4, and so on, and the rest the largest."""
    smaller = [2**i for i in range(1, largest.bit_length()) if 2**i < largest] if mixed else []
    return {**{size: 1 / size for size in smaller}, largest: 1.0 - sum(1 / size for size in smaller)}


@datasets.register("copying", kind="language", source="arXiv:2402.01032")
class Copying(Generated):
    """A random string, a sign, and the string again: Jelassi et al. 2024, "Repeat After Me", Sec. 3.

    A model whose state is smaller than the string cannot copy it. Validation and test have strings of one length.
    Trained is, with `mixed`, on strings of 2, 4, 8 letters and so on up to that length too, each length in half as many
    examples as the one before, short strings several to an example with a second sign behind each; without, on strings
    of that length alone.

    Args:
        length: Letters of the string.
        letters: Different letters.
        mixed: Whether training has shorter strings too.
        examples: Training examples.
        held_out: Examples of validation, and as many of the test.
        seed: Of all examples.
    """

    def __init__(
        self, *, length: int = 64, letters: int = 26, mixed: bool = True, examples: int = 50_000,
        held_out: int = 1000, seed: int = 0,
    ) -> None:  # fmt: skip
        _require(length=length, letters=letters, examples=examples, held_out=held_out)
        draw = np.random.default_rng(seed)

        def strings(n: int, size: int) -> Drawn:
            many = (length + 1) // (size + 1)
            text = draw.integers(0, letters, (n, many, size), dtype=np.int16)
            again, end = (np.full((n, many, 1), letters + i, np.int16) for i in range(2))
            tokens = np.full((n, 2 * length + 2), letters + 1, np.int16)
            whole = np.concatenate([text, again, text, end], 2).reshape(n, many * (2 * size + 2))
            tokens[:, : whole.shape[1]] = whole
            place = np.arange(2 * size + 2)
            counts = np.zeros(2 * length + 2, dtype=bool)
            counts[: whole.shape[1]] = np.tile((place >= size) & (place < 2 * size), many)
            # The last sign is followed by nothing.
            return tokens[:, :-1], np.broadcast_to(counts[:-2], (n, 2 * length))

        parts = _parts(strings, strings, draw, _shares(length, mixed), examples, held_out)
        super().__init__(parts, letters + 2)


@datasets.register("recall", kind="language", source="arXiv:2312.04927")
class Recall(Generated):
    """Pairs of a key and a value, then keys again: what was the value?

    Multi-query associative recall, Arora et al. 2023, "Zoology", Sec. 3.1: a key has its value within one example only,
    and every example has many questions. In validation and test all pairs come once, then all of them again in another
    order: the values are the answers, with `pairs` to remember at the first of them. Trained is, with `mixed`, on pairs
    that come back at random, each value an answer wherever its pair was there before; 2, 4, 8 and so on up to `pairs`
    different ones make an example, each number in half as many examples as the one before. Without `mixed` training
    examples are as those of the test, from which models take far longer to learn anything.
    Departures: the paper asks once a pair, at distances of a power law.

    Args:
        pairs: Pairs to remember.
        keys: Different keys, and as many different values.
        mixed: Whether training has fewer pairs too, and pairs that come back.
        examples: Training examples.
        held_out: Examples of validation, and as many of the test.
        seed: Of all examples.
    """

    def __init__(
        self, *, pairs: int = 16, keys: int = 128, mixed: bool = True, examples: int = 50_000,
        held_out: int = 1000, seed: int = 0,
    ) -> None:  # fmt: skip
        _require(pairs=pairs, keys=keys, examples=examples, held_out=held_out)
        if pairs > keys:
            raise ConfigError(f"pairs={pairs}: every pair has a key of its own, and there are keys={keys}")
        draw = np.random.default_rng(seed)
        places = np.arange(2 * pairs)

        def told(n: int, size: int) -> Int[np.ndarray, "n size 2"]:
            chosen = draw.random((n, keys), dtype=np.float32).argsort(1)[:, :size]
            return np.stack([chosen, keys + draw.integers(0, keys, (n, size))], 2).astype(np.int16)

        def in_order(n: int, which: Int[np.ndarray, "n p"], size: int, seen: Bool[np.ndarray, "n p"]) -> Drawn:
            tokens = np.take_along_axis(told(n, size), which[:, :, None], 1).reshape(n, 4 * pairs)
            # A key is followed by its value, a value by nothing that could be known.
            return tokens, np.stack([seen, np.zeros_like(seen)], 2).reshape(n, 4 * pairs)[:, :-1]

        def coming_back(n: int, size: int) -> Drawn:
            which = draw.integers(0, size, (n, 2 * pairs))
            first = np.stack([np.where((which == i).any(1), (which == i).argmax(1), 2 * pairs) for i in range(size)], 1)
            return in_order(n, which, size, places > np.take_along_axis(first, which, 1))

        def once_more(n: int, size: int) -> Drawn:
            order = draw.random((n, size), dtype=np.float32).argsort(1)
            told_first = np.broadcast_to(np.arange(size), (n, size))
            seen = np.broadcast_to(places >= size, (n, 2 * size))
            return in_order(n, np.concatenate([told_first, order], 1), size, seen)

        train = coming_back if mixed else once_more
        super().__init__(_parts(train, once_more, draw, _shares(pairs, mixed), examples, held_out), 2 * keys)
