"""The loss and the metrics of pixels' classes."""

import copy
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selectra.data import Masks
from selectra.errors import ConfigError
from selectra.tasks import Segmentation
from selectra.tasks.sliding import sliding_scores, window_starts

CLASSES = ("a", "b", "c")


class Piece(NamedTuple):
    x: Tensor
    y: Tensor


class Batch(NamedTuple):
    pieces: Sequence[Piece]


class Scores(nn.Module):
    """Scores are the image's channels, and the auxiliary ones half of them."""

    def __init__(self, aux: bool = False) -> None:
        super().__init__()
        self.aux, self.factor = aux, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Any:
        return (x * self.factor, x * self.factor / 2) if self.aux else x * self.factor


def task(**arguments: Any) -> Segmentation:
    data = SimpleNamespace(classes=CLASSES, shares=(0.7, 0.2, 0.1))
    return Segmentation(**arguments).for_data(data)


def piece(n: int = 2, size: tuple[int, int] = (5, 7), ignored: bool = True) -> Piece:
    y = torch.randint(0, 3, (n, *size))
    return Piece(torch.randn(n, 3, *size), torch.where(torch.rand(n, *size) < 0.2, 255, y) if ignored else y)


def mean(loss: Any) -> Tensor:
    return loss.sum / loss.count


def test_cross_entropy_of_pixels_that_count():
    one = piece()
    found = task().loss(Scores(), Batch([one]))
    assert torch.allclose(mean(found), F.cross_entropy(one.x, one.y, ignore_index=255))
    assert found.count == (one.y != 255).sum()


def test_what_is_ignored_changes_nothing_and_gets_no_gradient():
    one = piece()
    x = one.x.clone().requires_grad_()
    task(dice=1.0).loss(Scores(), Batch([Piece(x, one.y)])).sum.backward()
    assert x.grad is not None
    where = (one.y == 255)[:, None].expand_as(x)
    assert (x.grad[where] == 0).all() and (x.grad[~where] != 0).all()


@pytest.mark.parametrize("weights", [(1.0, 2.0, 0.5), "median"])
def test_weights_of_classes(weights):
    one, made = piece(), task(class_weights=weights)
    expected = torch.tensor([0.2 / 0.7, 1.0, 2.0] if weights == "median" else weights)
    assert made.weights is not None and torch.allclose(made.weights, expected)
    assert torch.allclose(
        mean(made.loss(Scores(), Batch([one]))), F.cross_entropy(one.x, one.y, expected, ignore_index=255)
    )


def plain_dice(scores: Tensor, y: Tensor) -> Tensor:
    """Of one image (k, h, w): 1 less twice the overlap over the sizes, a mean over classes; 0 where a class is not."""
    p, there = scores.double().softmax(0), y != 255
    losses = []
    for label in range(len(scores)):
        true = (y == label).double()
        overlap, sizes = (p[label] * true * there).sum(), ((p[label] + true) * there).sum()
        losses.append(1 - 2 * overlap / sizes if true.any() else torch.zeros(()).double())
    return torch.stack(losses).mean()


def test_dice_is_image_by_image():
    one = piece(3)
    one.y[0][one.y[0] == 2] = 255
    found = task(dice=0.5).loss(Scores(), Batch([one]))
    counts = (one.y != 255).flatten(1).sum(1)
    dice = torch.stack([plain_dice(x, y) for x, y in zip(one.x, one.y, strict=True)])
    expected = F.cross_entropy(one.x, one.y, ignore_index=255).double() + 0.5 * (dice * counts).sum() / counts.sum()
    assert torch.allclose(mean(found).double(), expected, atol=1e-6)
    assert set(found.parts) == {"cross_entropy", "dice"}


def test_sums_are_right_over_batches_and_sizes():
    first, second = piece(2), piece(1, (4, 3))
    made = task(dice=0.3, class_weights=(1.0, 3.0, 2.0), label_smoothing=0.1)
    whole = made.loss(Scores(), Batch([first, second]))
    parts = [made.loss(Scores(), Batch([Piece(one.x[i : i + 1], one.y[i : i + 1])]))
             for one in (first, second) for i in range(len(one.x))]  # fmt: skip
    assert torch.allclose(whole.sum, torch.stack([part.sum for part in parts]).sum(), rtol=1e-5)
    assert torch.allclose(whole.count, torch.stack([part.count for part in parts]).sum())


def test_the_auxiliary_head_counts_in_training_alone():
    one = piece()
    found = task(aux=0.4).loss(Scores(aux=True), Batch([one]))
    main, aux = (F.cross_entropy(x, one.y, ignore_index=255) for x in (one.x, one.x / 2))
    assert torch.allclose(mean(found), main + 0.4 * aux)
    evaluator = task().evaluator()
    evaluator.update(Scores(aux=True), Batch([one]))
    assert evaluator.compute()["loss"] == pytest.approx(float(main))


def test_a_batch_where_nothing_counts_is_zero():
    one = piece()
    found = task(dice=1.0).loss(Scores(aux=True), Batch([Piece(one.x, torch.full_like(one.y, 255))]))
    found.sum.backward()
    assert found.sum == 0 and found.count == 0


def plain_metrics(batches: list[Batch]) -> dict[str, float]:
    """By loops over pixels."""
    confusion = torch.zeros(3, 3, dtype=torch.long)
    for batch in batches:
        for x, y in batch.pieces:
            for true, guess in zip(y.flatten().tolist(), x.argmax(1).flatten().tolist(), strict=True):
                if true != 255:
                    confusion[true, guess] += 1
    hit, true, guess = confusion.diag().double(), confusion.sum(1).double(), confusion.sum(0).double()
    there = true + guess > 0
    return {
        "miou": float((hit / (true + guess - hit))[there].mean()),
        "f1": float((2 * hit / (true + guess))[there].mean()),
        "accuracy": float(hit.sum() / true.sum()),
    }


def test_metrics_are_those_of_all_pixels_together():
    batches = [Batch([piece(3), piece(2, (4, 6))]), Batch([piece(1)])]
    evaluator = task().evaluator()
    for batch in batches:
        evaluator.update(Scores(), batch)
    found, expected = evaluator.compute(), plain_metrics(batches)
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    confusion = torch.tensor(evaluator.details()["confusion"])
    each = confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())
    assert [found[f"iou {name}"] for name in CLASSES] == pytest.approx(each.tolist())


def test_a_class_that_never_occurs_is_in_no_mean():
    one = piece()
    x = one.x.clone()
    x[:, 2] = -100.0
    batch = Batch([Piece(x, torch.where(one.y == 2, 1, one.y))])
    evaluator = task().evaluator()
    evaluator.update(Scores(), batch)
    found, expected = evaluator.compute(), plain_metrics([batch])
    assert found["miou"] == pytest.approx(expected["miou"]) and found["f1"] == pytest.approx(expected["f1"])


def test_processes_add_up():
    batches = [Batch([piece(3)]), Batch([piece(2)])]
    whole, first, second = (task().evaluator() for _ in range(3))
    for batch in batches:
        whole.update(Scores(), batch)
    first.update(Scores(), batches[0])
    second.update(Scores(), batches[1])
    items: list[Any] = []
    second.reduce(lambda item: items.append(copy.deepcopy(item)) or [item])
    first.reduce(lambda item: [item, *items])
    assert first.compute() == pytest.approx(whole.compute())
    assert first.details() == whole.details()
    empty = task().evaluator()
    empty.reduce(lambda item: [item, *items])
    assert empty.compute()["miou"] == pytest.approx(second.compute()["miou"])


def test_masks_of_another_size_count_as_they_are():
    x, y = torch.randn(1, 3, 4, 6), torch.randint(0, 3, (1, 8, 12))
    evaluator = task().evaluator()
    evaluator.update(Scores(), Batch([Piece(x, y)]))
    larger = F.interpolate(x, (8, 12), mode="bilinear", align_corners=False)
    assert evaluator.compute()["accuracy"] == pytest.approx(float((larger.argmax(1) == y).float().mean()))


def test_nothing_evaluated_is_not_a_number():
    found = task().evaluator().compute()
    assert all(math.isnan(value) for value in found.values()) and math.isnan(task().score(found))


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (20, 31)])
def test_windows_cover_every_pixel_alike(size):
    x = torch.randn(2, 3, *size).double()
    # A model of single pixels gives the same from any window.
    found = sliding_scores(lambda crops: crops * 2, x, (8, 8), (5, 6))
    assert torch.allclose(found, x * 2)


def test_windows_scores_are_averaged():
    """What a window sees decides; overlapping ones are averaged."""
    x = torch.arange(12.0).view(1, 1, 1, 12)
    found = sliding_scores(lambda crops: crops.mean((2, 3), keepdim=True).expand_as(crops), x, (1, 8), (1, 4))
    assert torch.allclose(found[0, 0, 0], torch.tensor([3.5] * 4 + [5.5] * 4 + [7.5] * 4))


def test_no_window_is_larger_than_asked():
    seen: list[tuple[int, ...]] = []

    def scores(crops: Tensor) -> Tensor:
        seen.append(tuple(crops.shape))
        return crops

    sliding_scores(scores, torch.randn(1, 3, 50, 20), (16, 32), (10, 32), batch_size=3)
    assert {shape[1:] for shape in seen} == {(3, 16, 20)} and max(shape[0] for shape in seen) == 3
    assert window_starts(50, 16, 10) == [0, 10, 20, 30, 34] and window_starts(20, 20, 5) == [0]


def test_evaluation_in_windows():
    x, y = torch.randn(1, 3, 20, 30), torch.randint(0, 3, (1, 20, 30))
    results = []
    for made in (task(), task(window=8), task(window=(8, 12), stride=4)):
        evaluator = made.evaluator()
        evaluator.update(Scores(), Batch([Piece(x, y)]))
        results.append(evaluator.compute())
    assert results[1] == pytest.approx(results[0]) and results[2] == pytest.approx(results[0])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, "class_weights has 2 numbers, and the data 3 classes"),
        ({"class_weights": (1.0, -1.0, 0.0)}, "none is below 0"),
        ({"dice": -1.0}, "dice=-1.0"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"stride": 4}, "stride=4 without a window"),
        ({"window": 8, "stride": 9}, r"window=\(8, 8\), stride=\(9, 9\)"),
        ({"window": 0}, r"window=\(0, 0\)"),
    ],
)
def test_what_cannot_be_is_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        task(**arguments)


def test_a_model_of_other_classes_is_named():
    one = piece()
    with pytest.raises(
        ConfigError, match=r"Scores gives scores of shape \(2, 4, 5, 7\), and the data asks for \(2, 3,"
    ):
        task().loss(Scores(), Batch([Piece(torch.randn(2, 4, 5, 7), one.y)]))
    with pytest.raises(ConfigError, match="call for_data"):
        Segmentation().evaluator()


def test_shares_come_from_the_data():
    data = Masks("shapes")
    made = Segmentation(class_weights="median").for_data(data)
    assert made.weights is not None and len(made.weights) == 5 and made.weights[0] < 1 < made.weights[4]
