"""A GPU comes to the CPU's metrics, for every model: the same weights, and the same training."""

import inspect

import pytest
import torch

import selectra.models  # noqa: F401
from selectra.data.series import SeriesData
from selectra.data.table import read_table
from selectra.forecaster.scoring import build_model, build_task, in_batches, score
from selectra.registry import models
from selectra.spec import Optim, Run, Spec, Train
from selectra.train.loop import fit
from tests.data.frames import hourly

SMOKE = [name for name in models.names("series") if name.endswith("_smoke")]
USUAL = [name.removesuffix("_smoke") for name in SMOKE]
STEPS = 20
# Relative; sums of float32 in another order, and what so many steps make of that.
SAME_WEIGHTS, SAME_TRAINING = 1e-4, 1e-3
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
pytestmark = needs_gpu


def weather(seq_len: int, horizon: int, rows: int = 700) -> SeriesData:
    """Three series with gaps."""
    frame = hourly(rows, ("a", "b", "c"))
    frame.loc[500:504, "b"] = float("nan")
    frame.loc[::7, "c"] = float("nan")
    return SeriesData(read_table(frame), seq_len=seq_len, horizon=horizon)


def run_of(spec: Spec, device: str) -> Run:
    return Run(
        model=spec, data=Spec("series_file"), task=Spec("forecasting"), optim=Optim(lr=1e-3, warmup_steps=5),
        train=Train(steps=STEPS, batch_size=16, eval_every=STEPS // 2, device=device),
    )  # fmt: skip


def metrics(spec: Spec, data: SeriesData, device: str) -> dict[str, float]:
    """Of a model that was trained on this device."""
    model, run = build_model(spec, data, 0), run_of(spec, device)
    task = build_task(run, data)
    fit(model, task, data.windows("train"), data.windows("val"), run, progress=False)
    return score(model.to(device), task, data, 32).metrics


@pytest.mark.parametrize("name", USUAL)
def test_the_same_weights_have_the_same_metrics(name: str) -> None:
    """Every model at its usual size."""
    data = weather(96, 24)
    model, task = build_model(Spec(name), data, 0), build_task(run_of(Spec(name), "cpu"), data)
    if hasattr(model, "solve"):
        model.solve(in_batches(data.windows("train"), 50))  # type: ignore[operator]
    on_cpu = score(model, task, data, 64).metrics
    on_gpu = score(model.cuda(), task, data, 64).metrics
    assert on_gpu == pytest.approx(on_cpu, rel=SAME_WEIGHTS)


@pytest.mark.parametrize("name", SMOKE)
def test_the_same_training_comes_to_the_same_metrics(name: str) -> None:
    """Without dropout, whose draws differ from device to device."""
    data = weather(24, 8)
    spec = Spec("seasonal_naive" if name == "seasonal_naive_smoke" else name)
    if "dropout" in inspect.signature(models.entry(spec.name).target).parameters:
        spec = spec.replace(dropout=0.0)
    assert metrics(spec, data, "cuda") == pytest.approx(metrics(spec, data, "cpu"), rel=SAME_TRAINING)
