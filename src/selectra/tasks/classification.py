"""Classification: cross-entropy with smoothed or mixed labels, and accuracies that no batch size can change."""

import copy
from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from selectra.errors import ConfigError
from selectra.registry import tasks
from selectra.tasks.task import Loss

TOP = 5


class LabelledImages(Protocol):
    """What the task reads of a batch."""

    @property
    def x(self) -> Tensor: ...
    @property
    def y(self) -> Int64[Tensor, " b"]: ...
    @property
    def target(self) -> Float[Tensor, "b k"] | None: ...


def scores_of(model: nn.Module, batch: LabelledImages, n_classes: int | None) -> Float[Tensor, "b k"]:
    """The model's scores, of the shape that the task expects, in float32 at least."""
    scores = model(batch.x)
    wanted = (len(batch.y), scores.shape[-1] if n_classes is None else n_classes)
    if scores.shape != wanted:
        raise ConfigError(
            f"{type(model).__name__} gives scores of shape {tuple(scores.shape)}, and the data asks for {wanted} "
            "(images, classes)."
        )
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def rank_of(scores: Float[Tensor, "b k"], y: Int64[Tensor, " b"]) -> Int64[Tensor, " b"]:
    """How many classes come before the true one: those with a higher score, and of equal ones those before it."""
    true = scores.gather(1, y[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < y[:, None]
    return ((scores > true) | ((scores == true) & before)).sum(1)


class AccuracyEvaluator:
    """Sums over images: correct first choices, correct among the first five, and cross-entropy in float64."""

    scores = staticmethod(scores_of)

    def __init__(self, n_classes: int | None = None) -> None:
        self.n_classes = n_classes
        self.sums: Float[Tensor, " 4"] | None = None
        self.top5 = n_classes is None or n_classes > TOP

    @torch.no_grad()
    def update(self, model: nn.Module, batch: LabelledImages) -> None:
        """Add one batch."""
        scores = self.scores(model, batch, self.n_classes).double()
        self.top5 = scores.shape[1] > TOP
        rank = rank_of(scores, batch.y)
        loss = functional.cross_entropy(scores, batch.y, reduction="sum")
        count = torch.full_like(loss, len(batch.y))
        sums = torch.stack([(rank < 1).sum().double(), (rank < TOP).sum().double(), loss, count])
        self.sums = sums if self.sums is None else self.sums + sums

    def reduce(self, gather: Callable[[Any], list[Any]]) -> None:
        """Add the sums of all processes; one that had no image brings none."""
        sums = [each for each in gather(None if self.sums is None else self.sums.cpu()) if each is not None]
        self.sums = torch.stack(sums).sum(dim=0) if sums else None

    def compute(self) -> dict[str, float]:
        """Shares of images: "top1", and "top5" where there are more than five classes; and the mean cross-entropy."""
        top1, top5, loss, count = [float("nan")] * 4 if self.sums is None else self.sums.tolist()
        shares = {"top1": top1 / count, "top5": top5 / count} if self.top5 else {"top1": top1 / count}
        return {**shares, "loss": loss / count}


@tasks.register("classification", kind="image")
class Classification:
    """Say of which class an image is.

    Args:
        label_smoothing: Share of the target that is spread evenly over all classes (arXiv:1512.00567).
        select: By which metric on the validation images the weights are kept: the share of correct first choices, or
            the cross-entropy.
    """

    scores = staticmethod(scores_of)

    def __init__(self, *, label_smoothing: float = 0.0, select: Literal["top1", "loss"] = "top1") -> None:
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing={label_smoothing}: must be at least 0 and less than 1")
        self.label_smoothing, self.select = label_smoothing, select
        self.n_classes: int | None = None

    def for_data(self, data: Any) -> Self:
        """The same task for the data's classes."""
        task = copy.copy(self)
        task.n_classes = len(data.classes)
        return task

    def loss(self, model: nn.Module, batch: LabelledImages) -> Loss:
        """The cross-entropy summed over images, in nats."""
        scores = self.scores(model, batch, self.n_classes)
        target = batch.y if batch.target is None else batch.target.to(scores.dtype)
        total = functional.cross_entropy(scores, target, reduction="sum", label_smoothing=self.label_smoothing)
        return Loss(total, torch.full((), len(batch.y), device=scores.device))

    def evaluator(self) -> AccuracyEvaluator:
        """A fresh evaluator."""
        return AccuracyEvaluator(self.n_classes)

    def score(self, metrics: dict[str, float]) -> float:
        """The number that decides, lower is better; NaN where the cross-entropy is."""
        if self.select == "loss" or metrics["loss"] != metrics["loss"]:
            return metrics["loss"]
        return 1 - metrics["top1"]
