"""Every recipe resolves, documents itself, and trains with the smallest model."""

import pytest
import torch

from selectra import recipes as _recipes
from selectra.recipes.cifar10 import PARAMETERS
from selectra.registry import models, recipes
from selectra.spec import Run, Spec, override
from selectra.train import job
from selectra.train.loop import fit


@pytest.mark.parametrize("name", recipes.names())
def test_recipe_resolves(name):
    run = recipes.build(Spec(name))
    assert run.name == name
    assert set(job.check(job.typed(run))) == {"model", "data", "task"}
    assert Run.from_json(run.to_json()) == run
    assert recipes.entry(name).summary


def test_every_file_is_a_recipe():
    assert {"tsm2_weather", "tsm2_etth1"} <= set(recipes.names())
    assert _recipes.tsm2_weather() == recipes.build(Spec("tsm2_weather"))


CIFAR10 = [name for name in recipes.names("image") if name.endswith("_cifar10")]
FACTS = {"n_classes": 10, "in_channels": 3, "img_size": 32}


def test_models_on_cifar10_are_of_one_size_and_share_the_rest():
    assert len(CIFAR10) >= 9
    first = recipes.build(Spec(CIFAR10[0]))
    for name in CIFAR10:
        run = recipes.build(Spec(name))
        with torch.device("meta"):
            model = models.build(run.model, FACTS)
        count = sum(p.numel() for p in model.parameters())
        assert abs(count / PARAMETERS - 1) < 0.02, (name, count)
        assert run.model_copy(update={"model": first.model, "name": first.name}) == first


@pytest.mark.parametrize("name", ["vim2_cifar10", "rsmamba_ucmerced"])
def test_images_train_two_steps(name, tmp_path):
    run = recipes.build(Spec(name))
    small = f"model={run.model.name.partition('_')[0]}_smoke"
    words = [small, "data.path=shapes", "train.steps=2", "train.batch_size=4", "train.precision=float32"]
    run = override(run, [*words, "data.per_class=2", "train.device=cpu"])
    built = job.build(job.typed(run))
    fitted = fit(built.model, built.task, built.data.windows("train"), built.data.windows("val"), run, progress=False)
    assert fitted.steps == 2 and set(fitted.best) == {"top1", "loss"}


CAMVID = [name for name in recipes.names("segmentation") if name.endswith("_camvid")]


def test_models_on_camvid_differ_in_the_backbone_alone():
    assert {"samba_camvid", "vmamba_camvid", "vim2_camvid", "vim_camvid", "convnext_camvid", "vit_camvid"} <= set(
        CAMVID
    )
    first = recipes.build(Spec(CAMVID[0]))
    for name in CAMVID:
        run = recipes.build(Spec(name))
        backbone = run.model.args["backbone"]
        normed = {} if "normed" not in run.model.args else {"normed": True}
        like = run.model.replace(backbone=first.model.args["backbone"], **normed)
        assert {k: v for k, v in like.pairs if k != "normed"} == {k: v for k, v in first.model.pairs if k != "normed"}
        assert run.model_copy(update={"model": first.model, "name": first.name}) == first
        # Samba's grids are normalised already.
        assert run.model.args.get("normed", True) == (backbone.name != "samba_base")


@pytest.mark.parametrize("name", CAMVID)
def test_masks_train_two_steps(name):
    run = recipes.build(Spec(name))
    small = f"model.backbone={run.model.args['backbone'].name.partition('_')[0]}_smoke"
    words = [small, "model.d_decoder=8", "model.d_aux=4", "data.path=shapes", "data.crop=32", "data.test=0.8"]
    run = override(run, [*words, "train.steps=2", "train.batch_size=4", "train.precision=float32", "train.device=cpu"])
    built = job.build(job.typed(run))
    fitted = fit(built.model, built.task, built.data.windows("train"), built.data.windows("val"), run, progress=False)
    assert fitted.steps == 2 and {"miou", "f1", "accuracy", "loss", "iou ring"} <= set(fitted.best)


def test_weather_trains_two_steps(tmp_path):
    run = recipes.build(Spec("tsm2_weather"))
    small = run.model.name.replace("_base", "_smoke")
    assert small in models.names("series")
    run = override(run, [f"model={small}", "train.steps=2", "train.batch_size=2", "train.threads=1"])
    built = job.build(job.typed(run))
    train, val = built.data.windows("train"), built.data.windows("val")
    val.count = 4
    fitted = fit(built.model, built.task, train, val, run, tmp_path, progress=False, resolved=built.resolved)
    assert fitted.steps == 2
    assert set(fitted.best) == {"mse", "mae", "mase"}
