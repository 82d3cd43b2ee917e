"""Every recipe resolves, documents itself, and trains with the smallest model."""

import pytest

from selectra import recipes as _recipes
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
