"""Semantic segmentation: cross-entropy and Dice over pixels that count, and metrics that no batch size can change."""

import copy
import importlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from selectra.errors import ConfigError
from selectra.registry import tasks
from selectra.tasks.sliding import sliding_scores
from selectra.tasks.task import Loss

# The label of pixels that do not count, as the data has it.
IGNORED = 255
Size = int | tuple[int, int]


class Piece(Protocol):
    """Images and masks of one size."""

    @property
    def x(self) -> Float[Tensor, "b c h w"]: ...
    @property
    def y(self) -> Int64[Tensor, "b h2 w2"]: ...


class LabelledPixels(Protocol):
    """What the task reads of a batch."""

    @property
    def pieces(self) -> Sequence[Piece]: ...


def vision(module: str) -> Any:
    """A module of the extra "vision".

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"this needs {error.name}, which is not installed: pip install 'selectra[vision]'."
        ) from error


def wide(scores: Tensor) -> Tensor:
    """In float32 at least."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def scores_of(model: nn.Module, x: Tensor, n_classes: int | None) -> tuple[Tensor, Tensor | None]:
    """The model's scores of every pixel, and those of its auxiliary head where it has one and trains.

    Raises:
        ConfigError: They are not one of each class for each pixel.
    """
    found = model(x)
    main, aux = found if isinstance(found, tuple) else (found, None)
    wanted = (len(x), main.shape[1] if n_classes is None else n_classes, *x.shape[2:])
    if main.shape != wanted:
        raise ConfigError(
            f"{type(model).__name__} gives scores of shape {tuple(main.shape)}, and the data asks for {wanted} "
            "(images, classes, height, width)."
        )
    return wide(main), None if aux is None else wide(aux)


class PixelEvaluator:
    """torchmetrics' intersection over union, F1 and confusion of classes, and the cross-entropy in float64.

    Args:
        classes: Names.
        window: Height and width of what is seen at once; None sees whole images.
        stride: Pixels from one window to the next.
    """

    def __init__(
        self, classes: Sequence[str], window: tuple[int, int] | None = None, stride: tuple[int, int] = (1, 1)
    ) -> None:
        metrics = vision("torchmetrics.classification")
        self.classes, self.window, self.stride = tuple(classes), window, stride
        common = {"num_classes": len(classes), "ignore_index": IGNORED, "validate_args": False,
                  "sync_on_compute": False}  # fmt: skip
        made = {
            "iou": metrics.MulticlassJaccardIndex(average="none", **common),
            "miou": metrics.MulticlassJaccardIndex(average="macro", **common),
            "confusion": metrics.MulticlassConfusionMatrix(**common),
            "f1": metrics.MulticlassF1Score(average="macro", **common),
            "accuracy": metrics.MulticlassAccuracy(average="micro", **common),
        }
        # Those of one confusion matrix count once.
        groups = [["confusion", "iou", "miou"], ["f1"], ["accuracy"]]
        self.metrics = vision("torchmetrics").MetricCollection(made, compute_groups=groups)
        self.sums = torch.zeros(2, dtype=torch.float64)

    @torch.no_grad()
    def update(self, model: nn.Module, batch: LabelledPixels) -> None:
        """Add one batch."""
        for piece in batch.pieces:
            scores = self.scores(model, piece.x)
            if scores.shape[2:] != piece.y.shape[1:]:
                # Images were brought to another size; masks count as they are.
                scores = functional.interpolate(scores, piece.y.shape[1:], mode="bilinear", align_corners=False)
            self.metrics.to(scores.device)
            self.metrics.update(scores.argmax(1), piece.y)
            total = functional.cross_entropy(scores, piece.y, ignore_index=IGNORED, reduction="sum")
            self.sums += torch.stack([total.double(), (piece.y != IGNORED).sum().double()]).cpu()

    def scores(self, model: nn.Module, x: Tensor) -> Tensor:
        """Of every pixel, seen whole or in windows."""

        def whole(images: Tensor) -> Tensor:
            return scores_of(model, images, len(self.classes))[0]

        return whole(x) if self.window is None else sliding_scores(whole, x, self.window, self.stride)

    def reduce(self, gather: Callable[[Any], list[Any]]) -> None:
        """Add the counts of all processes."""
        states = {name: _cpu(metric.metric_state) for name, metric in self.metrics.items(copy_state=True)}
        others = gather((states, self.sums))
        self.sums = torch.stack([sums for _, sums in others]).sum(0)
        self.metrics.to("cpu")
        for name, metric in self.metrics.items(copy_state=True):
            metric.reset()
            for each, _ in others:
                metric.merge_state(each[name])
            metric._update_count = 1

    def compute(self) -> dict[str, float]:
        """Means over classes that occur: "miou" and "f1"; "accuracy" of pixels, "loss", and "iou CLASS" of each."""
        total, count = self.sums.tolist()
        if not count:
            return dict.fromkeys(("miou", "f1", "accuracy", "loss"), float("nan"))
        found = self.metrics.compute()
        means = {name: float(found[name]) for name in ("miou", "f1", "accuracy")}
        each = {f"iou {name}": float(value) for name, value in zip(self.classes, found["iou"], strict=True)}
        return {**means, "loss": total / count, **each}

    def details(self) -> dict[str, Any]:
        """The confusion of classes: pixels of each true class (rows) by what they were taken for (columns)."""
        return {"classes": list(self.classes), "confusion": self.metrics["confusion"].compute().tolist()}


def _cpu(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cpu() for name, value in state.items()}


@tasks.register("segmentation", kind="segmentation")
class Segmentation:
    """Say of which class every pixel is.

    Args:
        class_weights: Weights of the classes in the cross-entropy: "equal", "median" for the median of the classes'
            shares of the training pixels over each one's own (arXiv:1411.4734), or a number for each.
        dice: Weight of the Dice loss, image by image over the classes in it (arXiv:1606.04797).
        aux: Weight of the auxiliary head's cross-entropy, where the model has one.
        label_smoothing: Share of the target that is spread evenly over all classes.
        window: Evaluation: height and width of what is seen at once, or one number for both; None sees whole images.
        stride: Evaluation: pixels from one window to the next; None is two thirds of a window.
        select: By which metric on the validation images the weights are kept.
    """

    def __init__(
        self,
        *,
        class_weights: Literal["equal", "median"] | tuple[float, ...] = "equal",
        dice: float = 0.0,
        aux: float = 0.4,
        label_smoothing: float = 0.0,
        window: Size | None = None,
        stride: Size | None = None,
        select: Literal["miou", "loss"] = "miou",
    ) -> None:
        if not 0 <= label_smoothing < 1 or dice < 0 or aux < 0:
            raise ConfigError(
                f"label_smoothing={label_smoothing}, dice={dice}, aux={aux}: a share below 1, weights from 0"
            )
        if isinstance(class_weights, tuple) and not all(weight >= 0 for weight in class_weights):
            raise ConfigError(f"class_weights={class_weights}: none is below 0")
        if window is None and stride is not None:
            raise ConfigError(f"stride={stride} without a window has no effect; give task.window, too.")
        self.class_weights, self.dice, self.aux = class_weights, dice, aux
        self.label_smoothing, self.select = label_smoothing, select
        self.window = None if window is None else _pair(window)
        self.stride = _strides(self.window, stride)
        self.classes: tuple[str, ...] | None = None
        self.weights: Tensor | None = torch.tensor(class_weights) if isinstance(class_weights, tuple) else None
        self._dice = (
            vision("segmentation_models_pytorch.losses").DiceLoss("multiclass", ignore_index=IGNORED) if dice else None
        )

    def for_data(self, data: Any) -> Self:
        """The same task for the data's classes.

        Raises:
            ConfigError: There are not as many weights as classes.
        """
        task = copy.copy(self)
        task.classes = tuple(data.classes)
        if isinstance(self.class_weights, tuple) and len(self.class_weights) != len(data.classes):
            raise ConfigError(
                f"class_weights has {len(self.class_weights)} numbers, and the data {len(data.classes)} classes."
            )
        if self.class_weights == "median":
            shares = torch.tensor(data.shares)
            there = shares > 0
            # A class that never occurs has no part in any sum.
            task.weights = torch.where(there, shares[there].median() / shares.clamp(min=1e-12), 0.0)
        return task

    def loss(self, model: nn.Module, batch: LabelledPixels) -> Loss:
        """Summed over pixels that count, each with its class's weight, which is also what is counted.

        The Dice loss of an image stands for all of its pixels, so that sums are right over batches and processes.
        """
        n_classes = None if self.classes is None else len(self.classes)
        sums: dict[str, Tensor] = {}
        count: Any = 0
        for piece in batch.pieces:
            scores, aux = scores_of(model, piece.x, n_classes)
            weights = None if self.weights is None else self.weights.to(scores.device, scores.dtype)
            own = _counts(piece.y, weights)
            parts = {"cross_entropy": self._cross_entropy(scores, piece.y, weights)}
            if aux is not None and self.aux:
                parts["aux"] = self.aux * self._cross_entropy(aux, piece.y, weights)
            if self._dice is not None:
                each = torch.stack([self._dice(scores[i : i + 1], piece.y[i : i + 1]) for i in range(len(scores))])
                parts["dice"] = self.dice * (each * own).sum()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value
            count = count + own.sum()
        total = sum(sums.values(), torch.zeros_like(count, dtype=torch.float32))
        shown = {name: value.detach() for name, value in sums.items()} if len(sums) > 1 else {}
        return Loss(total, count, shown)

    def _cross_entropy(self, scores: Tensor, y: Tensor, weights: Tensor | None) -> Tensor:
        return functional.cross_entropy(
            scores, y, weights, ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )

    def evaluator(self) -> PixelEvaluator:
        """A fresh evaluator.

        Raises:
            ConfigError: The task does not know the data's classes.
        """
        if self.classes is None:
            raise ConfigError("segmentation is evaluated by class: call for_data(data) first.")
        return PixelEvaluator(self.classes, self.window, self.stride)

    def score(self, metrics: dict[str, float]) -> float:
        """The number that decides, lower is better; NaN where the cross-entropy is."""
        if self.select == "loss" or metrics["loss"] != metrics["loss"]:
            return metrics["loss"]
        return 1 - metrics["miou"]


def _pair(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _strides(window: tuple[int, int] | None, stride: Size | None) -> tuple[int, int]:
    if window is None:
        return (1, 1)
    steps = (max(1, 2 * window[0] // 3), max(1, 2 * window[1] // 3)) if stride is None else _pair(stride)
    if min(window) < 1 or not all(0 < step <= side for step, side in zip(steps, window, strict=True)):
        raise ConfigError(f"window={window}, stride={steps}: strides are at least 1 and not longer than the window")
    return steps


def _counts(y: Int64[Tensor, "b h w"], weights: Tensor | None) -> Float[Tensor, " b"]:
    """What counts of every image: its pixels, or the sum of their weights."""
    there = y != IGNORED
    if weights is None:
        return there.flatten(1).sum(1).float()
    return torch.where(there, weights[torch.where(there, y, 0)], 0.0).flatten(1).sum(1)
