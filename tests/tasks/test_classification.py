"""Classification: losses and accuracies against plain ones, whatever the batches."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selectra.errors import ConfigError
from selectra.tasks import Classification
from selectra.tasks.classification import rank_of


class Given(nn.Module):
    """Scores that are the images."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def batch(x: Tensor, y: Tensor, target: Tensor | None = None) -> Any:
    return SimpleNamespace(x=x, y=y, target=target)


def scores(n: int = 50, k: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(n, k), torch.randint(k, (n,))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_loss_against_its_formula(smoothing, soft):
    x, y = scores(7)
    target = torch.rand(7, 10).softmax(1) if soft else None
    loss = Classification(label_smoothing=smoothing).loss(Given(), batch(x, y, target))
    wanted = 0.0
    for i in range(7):
        for k in range(10):
            share = float(target[i, k]) if target is not None else float(k == y[i])
            share = (1 - smoothing) * share + smoothing / 10
            wanted -= share * (float(x[i, k]) - math.log(sum(math.exp(float(v)) for v in x[i])))
    assert float(loss.sum) == pytest.approx(wanted, rel=1e-5) and int(loss.count) == 7


@pytest.mark.parametrize("size", [1, 7, 50])
def test_metrics_do_not_depend_on_batches(size):
    x, y = scores()
    evaluator = Classification().evaluator()
    for start in range(0, 50, size):
        evaluator.update(Given(), batch(x[start : start + size], y[start : start + size]))
    order = x.argsort(1, descending=True)
    wanted = {
        "top1": (order[:, 0] == y).double().mean().item(),
        "top5": (order[:, :5] == y[:, None]).any(1).double().mean().item(),
        "loss": nn.functional.cross_entropy(x.double(), y).item(),
    }
    assert evaluator.compute() == pytest.approx(wanted, abs=1e-12)


def test_sums_of_processes_are_added():
    x, y = scores()
    one, other, whole = (Classification().evaluator() for _ in range(3))
    one.update(Given(), batch(x[:9], y[:9]))
    other.update(Given(), batch(x[9:], y[9:]))
    whole.update(Given(), batch(x, y))
    one.reduce(lambda mine: [mine, None, other.sums])
    assert one.compute() == pytest.approx(whole.compute(), abs=1e-12)


def test_equal_scores_are_told_apart_as_argmax_does():
    x = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert rank_of(x, torch.tensor([0, 1, 2])).tolist() == [0, 1, 2]


def test_few_classes_have_no_top5_and_nothing_is_no_number():
    x, y = scores(8, 4)
    evaluator = Classification().evaluator()
    evaluator.update(Given(), batch(x, y))
    assert set(evaluator.compute()) == {"top1", "loss"}
    assert all(math.isnan(value) for value in Classification().evaluator().compute().values())


def test_what_decides():
    metrics = {"top1": 0.75, "loss": 2.0}
    assert Classification().score(metrics) == 0.25
    assert Classification(select="loss").score(metrics) == 2.0
    assert math.isnan(Classification().score({"top1": 0.75, "loss": float("nan")}))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"label_smoothing=1.0"):
        Classification(label_smoothing=1.0)
    task = Classification().for_data(SimpleNamespace(classes=("a", "b", "c")))
    with pytest.raises(ConfigError, match=r"Given gives scores of shape \(8, 4\), and the data asks for \(8, 3\)"):
        task.loss(Given(), batch(*scores(8, 4)))


def test_half_precision_scores_are_summed_in_float32():
    x, y = scores(300)
    low = Classification().loss(Given(), batch(x.bfloat16(), y))
    assert low.sum.dtype == torch.float32
    assert float(low.sum) == pytest.approx(float(Classification().loss(Given(), batch(x.bfloat16().float(), y)).sum))
