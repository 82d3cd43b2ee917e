"""Image trainings that stay on their device: the loop's batches, views, rates and means; studies of several of them."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from selectra import models as _models  # noqa: F401
from selectra.compare.on_device_images import ImagesOnDevice, order_of
from selectra.compare.vision import Study, build, find_run
from selectra.data.images import HeldImages, Images
from selectra.errors import ConfigError
from selectra.registry import models
from selectra.spec import Optim, Run, Spec, Train
from selectra.tasks import Classification
from selectra.train.batches import TrainingOrder
from selectra.train.evaluation import evaluate
from selectra.train.loop import fit
from selectra.train.parallel import World

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def make_run(**train) -> Run:
    settings = {"steps": 12, "batch_size": 36, "device": "cpu", "ema": 0.7, **train}
    shape = {"dims": (8, 16), "depths": (1, 1), "d_state": 2, "patch_size": 4}
    return Run(
        model=Spec("vmamba_smoke", **shape), data=Spec("images"), task=Spec("classification", label_smoothing=0.1),
        optim=Optim(lr=3e-3, warmup_steps=3, weight_decay=0.1), train=Train(**settings),
    )  # fmt: skip


def test_the_order_is_that_of_the_loop():
    images = Images("shapes", val=0)
    run = make_run(steps=20)
    order, epochs = order_of(320, run)
    expected = TrainingOrder(images.windows("train"), run.train, World())
    rows = []
    for epoch in range(3):
        expected.sampler.set_epoch(epoch)
        rows += [(i, epoch) for i in expected.sampler]
    found = list(zip(order.flatten().tolist(), epochs.flatten().tolist(), strict=True))
    assert found == rows[: 20 * 36]


def test_it_is_the_loops_training():
    """Where passes are of whole batches, both see the same; what is kept is the running mean."""
    images = Images("shapes", val=0, test=0.1, crop=3, flip=0.5, erase=0.5, mixup=0.3, cutmix=1.0)
    windows, test = images.windows("train"), images.windows("test")
    assert isinstance(windows, HeldImages) and len(windows) % 36 == 0
    run, task = make_run(steps=12), Classification(label_smoothing=0.1).for_data(images)
    torch.manual_seed(0)
    model = models.build(run.model, images.facts)
    fit(model, task, windows, None, run, progress=False)
    torch.manual_seed(0)
    other = models.build(run.model, images.facts)
    training = ImagesOnDevice(other, task, windows.held, images.augment, run)
    training.prepare()
    while training.advance(5):
        pass
    here, there = model.state_dict(), training.final.state_dict()
    for name, value in here.items():
        assert torch.allclose(value, there[name], atol=2e-5), name
    assert evaluate(training.final, task, test, 7) == pytest.approx(evaluate(model, task, test, 40), abs=1e-4)
    assert training.losses.isfinite().all() and training.seconds > 0


@pytest.mark.parametrize(
    "train",
    [{"accumulate": 2}, {"patience": 2}, {"precision": "float16"}, {"compile": True}, {"steps": None, "epochs": 1.0}],
)
def test_what_only_the_loop_does_is_refused(train):
    images = Images("shapes", val=0)
    windows = images.windows("train")
    assert isinstance(windows, HeldImages)
    model = models.build(make_run().model, images.facts)
    with pytest.raises(ConfigError, match=r"stays on the device"):
        ImagesOnDevice(model, Classification(), windows.held, images.augment, make_run(**train))


CHANGES = ("data.path=shapes", "train.steps=3", "train.batch_size=16", "train.precision=float32", "model.dims=8,16",
           "model.depths=1,1", "model.drop_path=0")  # fmt: skip


def test_a_study_trains_every_seed_and_counts_what_was_not_begun():
    study = Study(("vmamba_cifar10", "simba_cifar10"), (0, 1), (*CHANGES,), CPU, 2, {"simba_cifar10": 1})
    with pytest.raises(ConfigError, match=r"mlp_ratios"):
        study.measure("simba_cifar10")
    study = Study(("vmamba_cifar10",), (0, 1), CHANGES, CPU, 2)
    found = study.measure("vmamba_cifar10")
    assert found["parameters"] > 0 and found["gflops"] > 0
    rows: list[dict] = []
    assert study.train(time.monotonic() + 100, rows.append) == []
    assert sorted((row["recipe"], row["seed"]) for row in rows) == [("vmamba_cifar10", 0), ("vmamba_cifar10", 1)]
    assert all(row["steps"] == 3 and 0 <= row["test"]["top1"] <= 1 for row in rows)
    assert rows[0]["last_loss"] != rows[1]["last_loss"]
    assert study.train(time.monotonic() - 1, rows.append) == [("vmamba_cifar10", 0), ("vmamba_cifar10", 1)]


def test_a_study_draws_weights_as_the_loop_does():
    study = Study(("vmamba_cifar10",), (3,), CHANGES, CPU)
    run = find_run("vmamba_cifar10", 3, CHANGES)
    assert run.data.args["val"] == 0.0 and run.train.seed == 3
    parts = study.library(run.data)
    one, _ = build(run, parts, CPU)
    torch.manual_seed(3)
    other = models.build(run.model, parts.images.facts)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
def test_the_script_writes_a_record(tmp_path):
    out = tmp_path / "record.json"
    words = [
        "results/vision_cifar10.py",
        "--out",
        str(out),
        "--recipes",
        "vmamba_cifar10",
        "--seeds",
        "1",
        *CHANGES[1:],
    ]
    subprocess.run([sys.executable, *words, "--random", "40"], cwd=ROOT, check=True, capture_output=True, timeout=200)
    record = json.loads(out.read_text())
    assert record["models"][0]["recipe"] == "vmamba_cifar10" and record["trainings"][0]["steps"] == 3
    assert record["not_begun"] == [] and record["versions"]["torch"] == torch.__version__


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["vmamba_cifar10", "vim2_cifar10", "vim_cifar10", "simba_cifar10", "vit_cifar10",
                                  "convnext_cifar10", "resnet18_cifar10", "mlp_mixer_cifar10"])  # fmt: skip
def test_the_graph_does_what_the_steps_do(name):
    device, losses = torch.device("cuda"), []
    run = find_run(name, 0, ("data.path=shapes", "train.steps=10", "train.batch_size=32", "data.cutmix=1.0"))
    if "drop_path" in run.model.args:
        # Drawn from a generator, and a graph has its own.
        run = run.model_copy(update={"model": run.model.replace(drop_path=0.0)})
    study = Study((name,), (0,), (), device)
    parts = study.library(run.data)
    for stream in (None, torch.cuda.Stream()):
        model, task = build(run, parts, device)
        pool = torch.cuda.graph_pool_handle() if stream else None
        training = ImagesOnDevice(model, task, parts.train, parts.images.augment, run, stream, pool)
        training.prepare()
        training.advance(10)
        torch.cuda.synchronize()
        losses.append(training.losses)
    assert torch.allclose(losses[0], losses[1], rtol=2e-2), (losses[0], losses[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_model_alone_is_measured_and_several_share_the_gpu():
    small = ("data.path=shapes", "train.steps=9", "train.batch_size=32")
    study = Study(("resnet18_cifar10", "vmamba_cifar10"), (0, 1), small, torch.device("cuda"), packed=2)
    found = study.measure("vmamba_cifar10")
    assert found["train_images_per_s"] > 0 and found["inference_images_per_s"] > 0 and found["peak_gib"] > 0
    rows: list[dict] = []
    assert study.train(time.monotonic() + 200, rows.append) == []
    assert len(rows) == 4 and all(row["steps"] == 9 for row in rows)
