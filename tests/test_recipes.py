"""Every recipe resolves, documents itself, and trains with the smallest model."""

from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from selectra import recipes as _recipes
from selectra.data.images import Images
from selectra.recipes.cifar10 import PARAMETERS
from selectra.registry import models, recipes
from selectra.spec import Optim, Run, Spec, override
from selectra.train import job
from selectra.train.loop import fit
from selectra.train.optim import make_schedule


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


AT_224 = ("vmamba_imagenet", "vim2_imagenet", "vim_imagenet", "vmamba_finetune")


@pytest.fixture
def drawn_folder(tmp_path):
    """Drawn shapes of 40 x 48 pixels in folders of classes: of each 8 images for training and one for the test."""
    images = Images("shapes", per_class=8)
    for part, each in (("train", 8), ("test", 1)):
        rows, seen = images.rows[part], Counter()
        for row in rows:
            label = int(images.listing.labels[row])
            if seen[label] < each:
                path = tmp_path / "set" / part / images.classes[label] / f"{row}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = images.raw(int(row)).permute(1, 2, 0).numpy()
                Image.fromarray(pixels.squeeze()).convert("RGB").resize((48, 40)).save(path)
                seen[label] += 1
    return tmp_path / "set"


def on_folder(name, folder, *more):
    """A recipe with its smallest model at 32 pixels."""
    run = recipes.build(Spec(name))
    small = f"model={run.model.name.partition('_')[0]}_smoke"
    words = [small, f"data.path={folder}", "data.img_size=32", "data.val=0.25", "train.device=cpu", "train.workers=0"]
    return job.typed(override(run, [*words, "train.batch_size=8", "train.accumulate=1", *more]))


@pytest.mark.parametrize("name", AT_224)
def test_recipes_at_224_train_three_steps_on_a_folder(name, drawn_folder):
    pytest.importorskip("torchvision")
    run = on_folder(name, drawn_folder, "train.steps=3")
    built = job.build(run)
    fitted = fit(built.model, built.task, built.data.windows("train"), built.data.windows("val"), run, progress=False)
    assert fitted.steps == 3 and set(fitted.best) == {"top1", "loss"} and np.isfinite(fitted.best["loss"])


@pytest.mark.parametrize("name", AT_224)
def test_recipes_at_224_change_views_by_randaugment_and_mix_them(name, drawn_folder):
    pytest.importorskip("torchvision")
    run = recipes.build(Spec(name))
    assert run.data.args["img_size"] == 224 and run.train.ema and run.train.channels_last
    off = ["data.mixup=0", "data.cutmix=0", "data.erase=0", "data.scale=none", "data.flip=0", "data.val=0"]

    def views(*words):
        found = job.build(on_folder(name, drawn_folder, *off, *words)).data.windows("train")
        found.at_pass(1, 0)
        return found[list(range(len(found)))].to("cpu")

    plain, changed, again = views("data.randaugment=none"), views(), views()
    differ = (plain.x != changed.x).flatten(1).any(1)
    # Some of two operations may be the identity, or leave these pixels alone; most are not.
    assert differ.sum() > len(differ) // 2 and torch.equal(changed.x, again.x)
    mixed = views("data.mixup=0.8", "data.cutmix=1.0")
    assert mixed.target is not None and ((mixed.target > 0).sum(1) == 2).any()


def test_warm_up_by_share_is_that_of_the_steps():
    def rates(steps, **how):
        schedule = make_schedule(torch.optim.AdamW([torch.zeros(1)], lr=1.0), Optim(lr=1.0, **how), steps)
        found = []
        for _ in range(steps):
            found.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return found

    for steps in (30, 300):
        assert rates(steps, warmup_share=20 / 300) == rates(steps, warmup_steps=steps // 15)
    assert rates(30, warmup_share=20 / 300).index(1.0) == 2
    with pytest.raises(ValidationError, match="give either 'warmup_steps' or 'warmup_share', and not both"):
        Optim(warmup_steps=3, warmup_share=0.1)


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
