"""Mamba against attention, a convolutional and a recurrent net, an MLP and linear models, at equal parameters."""

from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.recipes.studies.shared import LENGTHS, RATES, TUNED, weather
from selectra.registry import studies
from selectra.spec import Spec

MODELS = {
    "tsm2": "mamba", "s_mamba": "mamba", "patchtst": "attention", "modern_tcn": "convolution", "gru": "recurrent",
    "tsmixer": "mlp", "dlinear": "linear", "linear": "linear",
}  # fmt: skip
# An inner width of its own can be turned more finely than all widths together.
SIZES = {"modern_tcn": {"d_model": 12, "d_ff": 12}}


@studies.register("series_kinds", kind="series")
def series_kinds() -> Study:
    """Is Mamba better than other kinds of forecasters of the same size, 50,000 parameters?

    86 trainings of 500 steps, 83 s on an H200 with twelve side by side, costs included and the page not.
    Linear models have no width and stay as small as they are.
    """
    return Study(
        name="series_kinds",
        question="Is Mamba better than other kinds of forecasters of the same size?",
        bases=(weather(24), weather(96)),
        variants=tuple(
            Variant(name=name, model=Spec(name, **SIZES.get(name, {})), kind=kind) for name, kind in MODELS.items()
        ),
        subject="mamba",
        subject_title="Mamba",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
        budget=Budget(quantity="params", amount=50_000),
        lengths=LENGTHS,
    )
