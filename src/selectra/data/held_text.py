"""Splits of text that lie on a device: a batch is cut out there, from starts that are on the device too."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from selectra.data.text import IGNORED, Pieces, TextBatch, TokenData
from selectra.errors import ConfigError


@dataclass(frozen=True)
class HeldText:
    """All tokens of a data set, as one stream or as a table of examples.

    Args:
        tokens: One stream `(n,)`, or examples `(n, l + 1)`, each with the token that follows its last position.
        seq_len: Positions of a piece or an example.
        counts: Of examples: which targets of each count; None for a stream, where all do.
    """

    tokens: Int[Tensor, "..."]
    seq_len: int
    counts: Bool[Tensor, "n l"] | None = None

    def batch(self, starts: Int[Tensor, " b"], end: Int[Tensor, ""]) -> TextBatch:
        """Pieces from these places on; targets at `end` and behind it are ignored, and pieces may lie there whole.

        Args:
            starts: Places in the stream, or numbers of examples.
            end: The split's end, as a place or a number.
        """
        if self.tokens.dim() == 1:
            places = starts[:, None] + torch.arange(self.seq_len + 1, device=starts.device)
            there = places[:, 1:] < end
            ids = self.tokens[places.clamp(max=len(self.tokens) - 1)].long()
        else:
            rows = starts.clamp(max=len(self.tokens) - 1)
            ids = self.tokens[rows].long()
            there = (starts < end)[:, None].expand(-1, self.seq_len)
            if self.counts is not None:
                there = there & self.counts[rows]
        return TextBatch(ids[:, :-1], torch.where(there, ids[:, 1:], IGNORED))


@dataclass(frozen=True)
class HeldSplit:
    """Where a split lies in what is held: piece i begins at `first + i * stride`, for `count` pieces."""

    first: int
    end: int
    stride: int
    count: int

    @classmethod
    def of(cls, pieces: Pieces, first: int) -> "HeldSplit":
        """The place of pieces whose tokens begin at `first` of the whole stream.

        Raises:
            ConfigError: The pieces are of packed documents.
        """
        if pieces.starts is not None:
            raise ConfigError("packed documents are not held on a device; set data.packed=false, or train by the loop.")
        return cls(first, first + len(pieces.ids), pieces.stride, len(pieces))


def hold(data: Any, device: torch.device) -> HeldText:
    """All tokens of a data set on a device."""
    if isinstance(data, TokenData):
        return HeldText(torch.from_numpy(np.asarray(data.ids).astype(np.int32, copy=False)).to(device), data.seq_len)
    return data.held(device)


def held_split(data: Any, split: Any) -> HeldSplit:
    """Where a split lies in what `hold` gives.

    Raises:
        ConfigError: The text is packed documents.
    """
    if isinstance(data, TokenData):
        return HeldSplit.of(data.windows(split), data.first(split))
    return data.held_split(split)
