"""The command beside a cell trains what the cell trained."""

import shlex

import pytest

from selectra.choices import Sort
from selectra.compare.questions import Asked, find_study
from selectra.compare.results import command_of
from selectra.runs import registries
from selectra.spec import Optim, Parallel, Run, Spec, Train
from selectra.train.job import typed
from tests.compare.studies import repeated


@pytest.mark.parametrize(
    ("optim", "train"),
    [
        (Optim(clip=None), Train(epochs=1, batch_size=512, precision="bfloat16")),
        (Optim(), Train(epochs=10)),
        (Optim(betas=(0.9, 0.95), schedule="constant"), Train(epochs=0.5, eval_every=7, ema=0.99)),
        (Optim(lr=2e-5, clip=0.1), Train(steps=3, device="cpu", freeze="all", channels_last=True)),
    ],
)
def test_commands_say_all_that_a_bare_command_has_otherwise(optim: Optim, train: Train) -> None:
    base = Run(model=Spec("dlinear", kernel=5), data=Spec("series_file", seq_len=24, horizon=8),
               task=Spec("forecasting"), optim=optim, train=train, parallel=Parallel(kind="none"))  # fmt: skip
    assert repeated(base) == typed(base).model_copy(update={"name": ""})


def test_a_tuple_of_one_and_a_model_within_a_model_are_repeated() -> None:
    run = Run(model=Spec("upernet", backbone=Spec("convnext_smoke", dims=(8,), depths=(1,))), data=Spec("images"),
              task=Spec("segmentation"))  # fmt: skip
    words = shlex.split(command_of(run))
    assert {"model.backbone=convnext_smoke", "model.backbone.dims=8,"} <= set(words)


@pytest.mark.parametrize("name", sorted(registries()[Sort.studies].names()))
def test_commands_of_built_in_studies_repeat_their_runs(name: str) -> None:
    study = find_study(name, Asked())
    for base in study.bases:
        for variant in study.variants:
            run = study.run(base, variant, 2, dict.fromkeys(study.tuning.names if study.tuning else (), 3e-4))
            assert repeated(run) == typed(run).model_copy(update={"name": ""})
