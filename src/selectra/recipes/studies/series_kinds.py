"""Mamba against attention, a recurrent net, an MLP and linear models, at equal parameters."""

from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.recipes.studies.shared import LENGTHS, RATES, TUNED, weather
from selectra.registry import studies
from selectra.spec import Spec

MODELS = {
    "tsm2": "mamba", "s_mamba": "mamba", "patchtst": "attention", "gru": "recurrent", "tsmixer": "mlp",
    "dlinear": "linear", "linear": "linear",
}  # fmt: skip


@studies.register("series_kinds", kind="series")
def series_kinds() -> Study:
    """Is Mamba better than other kinds of forecasters of the same size, 50,000 parameters?

    74 trainings of 500 steps; the time of all of them has not been measured.
    Linear models have no width and stay as small as they are. A convolutional forecaster is not registered yet.
    """
    return Study(
        name="series_kinds",
        question="Is Mamba better than other kinds of forecasters of the same size?",
        bases=(weather(24), weather(96)),
        variants=tuple(Variant(name=name, model=Spec(name), kind=kind) for name, kind in MODELS.items()),
        subject="mamba",
        subject_title="Mamba",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
        budget=Budget(quantity="params", amount=50_000),
        lengths=LENGTHS,
    )
