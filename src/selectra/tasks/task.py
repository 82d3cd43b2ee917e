"""What the training loop knows of a task; nothing else crosses the border."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from jaxtyping import Float, Real
from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """A loss before it is divided: sums over batches, accumulation and processes stay exact.

    Args:
        sum: Sum of the loss over everything that counts; carries the gradient.
        count: How many targets are in the sum, or the sum of their weights.
        parts: Sums of named terms, for the record alone.
    """

    sum: Float[Tensor, ""]
    count: Real[Tensor, ""]
    parts: dict[str, Tensor] = field(default_factory=dict)


def nothing_of(loss: Loss) -> Loss:
    """A loss that counts for nothing, with gradients of zero: for a process that has no share of a batch."""
    parts = {name: part * 0 for name, part in loss.parts.items()}
    return Loss(loss.sum * 0, loss.count * 0, parts)


class Evaluator(Protocol):
    """Streamed metrics over a split."""

    def update(self, model: nn.Module, batch: Any) -> None:
        """Run the model on one batch and add what the metrics need."""
        ...

    def reduce(self, gather: Callable[[Any], list[Any]]) -> None:
        """Bring the sums of all processes together; `gather` gives every process's item, in order of rank."""
        ...

    def compute(self) -> dict[str, float]:
        """The metrics by name."""
        ...


class Task(Protocol):
    """A loss and metrics for one kind of model."""

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """The loss of one batch, as a sum and a count."""
        ...

    def evaluator(self) -> Evaluator:
        """A fresh evaluator."""
        ...

    def score(self, metrics: dict[str, float]) -> float:
        """The one number that decides which weights are kept: lower is better."""
        ...

    def for_data(self, data: Any) -> "Task":
        """The same task with what its metrics take from the data, such as a scale in user units."""
        ...
