"""Generated strings: every target against what the tokens themselves say."""

from collections import Counter

import pytest
import torch

from selectra.data.recall import Copying, Generated, Recall, Split
from selectra.data.text import IGNORED
from selectra.errors import ConfigError

PARTS: tuple[Split, ...] = ("train", "val", "test")


def rows(data: Generated, part: Split) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of every example of a part."""
    windows = data.windows(part)
    batch = windows[list(range(len(windows)))]
    return list(zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True))


@pytest.mark.parametrize("pairs", [1, 2, 5, 8])
def test_every_answer_of_recall_follows_from_what_was_told(pairs: int) -> None:
    data = Recall(pairs=pairs, keys=9, examples=80, held_out=7)
    for part in PARTS:
        for tokens, targets in rows(data, part):
            assert len(tokens) == data.seq_len == 4 * pairs - 1
            told: dict[int, int] = {}
            for at, (token, target) in enumerate(zip(tokens, targets, strict=True)):
                if at % 2:
                    assert target == IGNORED and token >= 9
                    told[tokens[at - 1]] = token
                else:
                    assert token < 9
                    # Wherever the key was there before, and nowhere else.
                    assert target == told.get(token, IGNORED)
                    assert at + 1 == len(tokens) or target in (IGNORED, tokens[at + 1])


def test_held_out_recall_asks_for_every_pair_once() -> None:
    data = Recall(pairs=6, keys=6, examples=10, held_out=20)
    for tokens, targets in rows(data, "test"):
        keys = tokens[::2]
        assert sorted(keys[:6]) == sorted(keys[6:]) == list(range(6)) and keys[:6] != keys[6:]
        assert [at for at, target in enumerate(targets) if target != IGNORED] == list(range(12, 23, 2))


def test_training_has_few_pairs_more_often() -> None:
    data = Recall(pairs=8, keys=64, examples=80, held_out=1)
    # With eight pairs in sixteen places now and then one does not come.
    sizes = Counter(len(set(tokens[::2])) for tokens, _ in rows(data, "train"))
    assert sizes[2] == 40 and 17 <= sizes[4] <= 20 and sizes.total() - sizes[2] - sizes[4] - sizes[3] <= 20
    plain = Recall(pairs=8, keys=64, mixed=False, examples=80, held_out=1)
    assert {len(set(tokens[::2])) for tokens, _ in rows(plain, "train")} == {8}


@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_copies_repeat_their_string(length: int) -> None:
    data = Copying(length=length, letters=5, examples=64, held_out=6)
    for part in PARTS:
        seen: Counter[int] = Counter()
        for tokens, targets in rows(data, part):
            assert len(tokens) == data.seq_len == 2 * length
            ended = "".join(map(str, [*tokens, 6 if targets[-1] == IGNORED else targets[-1]])).split("6")
            wanted: list[int] = []
            for string in filter(None, ended):
                text, copied = string.split("5")
                assert copied == text
                seen[len(text)] += 1
                wanted += map(int, text)
            assert [target for target in targets if target != IGNORED] == wanted
        if part != "train":
            assert seen == {length: 6}
        elif length == 8:
            # Of 64 examples 32 have three strings of 2 letters, 16 one of 4, the others one of 8.
            assert seen == {2: 96, 4: 16, 8: 16}


def test_examples_follow_their_seed_and_nothing_else() -> None:
    for kind in (Copying, Recall):
        first, again, other = (kind(examples=20, held_out=2, seed=seed) for seed in (1, 1, 2))
        assert first.describe() == again.describe() != other.describe()
        assert torch.equal(first.windows("val")[[0, 1]].tokens, again.windows("val")[[0, 1]].tokens)
        assert "train 20 with" in first.summary()[0]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ConfigError, match="keys=4"):
        Recall(pairs=5, keys=4)
    with pytest.raises(ConfigError, match="length=0"):
        Copying(length=0)
