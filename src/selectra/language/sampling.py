"""The choice of the next token."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectra.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; the filters apply one after the other, in this order."""

    temperature: float = 0.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only so many likeliest tokens."""
    top_p: float | None = None
    """Only the fewest likeliest tokens that together have at least this probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: needs a finite number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: needs at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: needs more than 0 and at most 1")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ConfigError("top_k and top_p have no effect at temperature 0; raise it, or leave them out.")

    def probabilities(self, logits: Float[Tensor, "b v"]) -> Float[Tensor, "b v"]:
        """What is drawn from, at a temperature above 0."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        # With the likeliest at 0 nothing overflows, however low the temperature is.
        temperature = max(self.temperature, torch.finfo(logits.dtype).tiny)
        logits = (logits - logits.amax(-1, keepdim=True)) / temperature
        if self.top_k is not None and self.top_k < logits.shape[1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True)
            # A token stays while those before it have less; so the likeliest always stays.
            kept = ordered.cumsum(-1) - ordered < self.top_p
            probabilities = probabilities.masked_fill(~kept.gather(1, order.argsort()), 0)
        return probabilities

    def draw(self, logits: Float[Tensor, "b v"], generator: torch.Generator | None = None) -> Int[Tensor, " b"]:
        """The next token of every row."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator)[:, 0]


GREEDY = Sampling()
