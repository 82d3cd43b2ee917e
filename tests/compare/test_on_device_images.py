"""Image trainings that stay on their device: the loop's batches, views, rates and means; studies of several of them."""

import json
import runpy
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from selectra import models as _models  # noqa: F401
from selectra.compare.on_device_images import ImagesOnDevice, order_of
from selectra.compare.packed_images import Library, build
from selectra.compare.vision import find_run, measure, train
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


def test_every_seed_is_trained_and_what_was_not_begun_is_told():
    library, both = Library(CPU), [("vmamba_cifar10", 0), ("vmamba_cifar10", 1)]
    with pytest.raises(ConfigError, match=r"mlp_ratios"):
        measure("simba_cifar10", CHANGES, library)
    found = measure("vmamba_cifar10", CHANGES, library)
    assert found["parameters"] > 0 and found["gflops"] > 0
    rows: list[dict] = []
    assert train(both, CHANGES, library, 2, time.monotonic() + 600, rows.append) == []
    assert sorted((row["recipe"], row["seed"]) for row in rows) == both
    assert all(row["steps"] == 3 and 0 <= row["test"]["top1"] <= 1 and row["packed"] == 2 for row in rows)
    assert rows[0]["last_loss"] != rows[1]["last_loss"]
    assert train(both, CHANGES, library, 2, time.monotonic() - 1, rows.append) == both and len(rows) == 2


def test_weights_are_drawn_as_the_loop_draws_them():
    run = find_run("vmamba_cifar10", 3, CHANGES)
    assert run.data.args["val"] == 0.0 and run.train.seed == 3
    parts = Library(CPU)(run.data)
    one, _ = build(run, parts, CPU)
    torch.manual_seed(3)
    other = models.build(run.model, parts.images.facts)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


MASKS = ("data.path=shapes", "train.steps=3", "train.batch_size=4", "train.precision=float32", "data.crop=32",
         "model.backbone.dims=8,16", "model.backbone.depths=1,1", "model.d_decoder=8", "model.d_aux=8")  # fmt: skip


def test_masks_are_trained_as_by_the_loop(tmp_path):
    """A pass is of whole batches here, so that both see the same."""
    changes = (*MASKS, "train.steps=5", "data.test=0.35", "model.backbone.drop_path=0", "model.dropout=0")
    run = find_run("vmamba_camvid", 0, changes)
    run = run.model_copy(update={"train": run.train.model_copy(update={"device": "cpu"})})
    parts = Library(CPU)(run.data)
    assert len(parts.train.labels) % 4 == 0
    model, task = build(run, parts, CPU)
    fit(model, task, parts.images.windows("train"), None, run, tmp_path, progress=False)
    other, _ = build(run, parts, CPU)
    training = ImagesOnDevice(other, task, parts.train, parts.images.augment, run)
    training.prepare()
    while training.advance(2):
        pass
    lines = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    # Weights differ where gradients are nothing but rounding: shifts before batch norms, which losses do not see.
    assert training.losses.tolist() == pytest.approx(losses, rel=1e-4) and len(losses) == 5


def test_masks_are_trained_and_measured():
    library, changes, rows = Library(CPU), (*MASKS, "data.test=0.02"), list[dict]()
    assert train([("vmamba_camvid", 1)], changes, library, 2, time.monotonic() + 600, rows.append) == []
    assert [(row["recipe"], row["seed"]) for row in rows] == [("vmamba_camvid", 1)]
    assert rows[0]["steps"] == 3 and 0 <= rows[0]["test"]["miou"] <= 1
    assert measure("vmamba_camvid", changes, library)["parameters"] > 0


def test_the_script_of_masks_goes_on_with_its_record(tmp_path, monkeypatch, capsys):
    out = tmp_path / "record.json"
    words = ["dense_camvid.py", "--out", str(out), "--recipes", "vmamba_camvid", *MASKS, "data.test=0.02"]

    def call(*more: str) -> None:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        # Settings for a GPU, which are not to stay.
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        runpy.run_path(str(ROOT / "results" / "dense_camvid.py"), run_name="__main__")

    for seeds in ("1", "2"):
        call("--seeds", seeds)
    record = json.loads(out.read_text())
    assert [row["seed"] for row in record["trainings"]] == [0, 1] and len(record["models"]) == 1
    assert len(record["calls"]) == 2 and record["not_begun"] == []
    with pytest.raises(SystemExit, match="is of other changes"):
        call("--steps", "2")
    assert "vmamba_camvid" in capsys.readouterr().out


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
    subprocess.run([sys.executable, *words, "--random", "40"], cwd=ROOT, check=True, capture_output=True, timeout=600)
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
    parts = Library(device)(run.data)
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
    library = Library(torch.device("cuda"))
    found = measure("vmamba_cifar10", small, library)
    assert found["train_images_per_s"] > 0 and found["inference_images_per_s"] > 0 and found["peak_gib"] > 0
    wanted, rows = [(name, seed) for name in ("resnet18_cifar10", "vmamba_cifar10") for seed in (0, 1)], list[dict]()
    assert train(wanted, small, library, 2, time.monotonic() + 200, rows.append) == []
    assert len(rows) == 4 and all(row["steps"] == 9 for row in rows)
