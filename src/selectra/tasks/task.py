"""What the training loop knows of a task; nothing else crosses the border."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
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

    def shared(self, total: Callable[[Tensor], Tensor]) -> "Loss":
        """This process's share of the loss of a batch that several have; sums of shares are sums of the batch.

        Args:
            total: The sum over all processes, which all of them ask for.
        """
        return self

    def nothing(self) -> "Loss":
        """One that counts for nothing, with gradients of zero: for a process that has no share of a batch."""
        return Loss(self.sum * 0, self.count * 0, {name: part * 0 for name, part in self.parts.items()})


@dataclass(frozen=True)
class Means(Loss):
    """A sum of means over different numbers of targets, such as positions and proposals, times a batch's images.

    It is the loss of this process's share by itself; `shared` has means over all processes' targets.

    Args:
        terms: Of every term the mean, which carries the gradient, and over how many targets it is.
    """

    terms: dict[str, tuple[Float[Tensor, ""], Real[Tensor, ""]]] = field(default_factory=dict)

    @staticmethod
    def of(terms: dict[str, tuple[Tensor, Tensor]], images: Tensor) -> "Means":
        """The loss of so many images."""
        return Means(*_summed({name: mean * images for name, (mean, _) in terms.items()}, images), terms)

    def shared(self, total: Callable[[Tensor], Tensor]) -> Loss:
        own = torch.stack([self.count, *(count for _, count in self.terms.values())]).double()
        images, *counts = total(own)
        # Where nothing is counted means are sums.
        shares = zip(self.terms.items(), own[1:], counts, strict=True)
        parts = {
            name: mean * (images * here.clamp(min=1) / count.clamp(min=1)).to(mean.dtype)
            for (name, (mean, _)), here, count in shares
        }
        return Loss(*_summed(parts, self.count))

    def nothing(self) -> "Means":
        return Means.of({name: (mean * 0, count * 0) for name, (mean, count) in self.terms.items()}, self.count * 0)


def _summed(parts: dict[str, Tensor], count: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return torch.stack(list(parts.values())).sum(), count, {name: part.detach() for name, part in parts.items()}


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
