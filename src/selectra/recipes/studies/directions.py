"""What a second direction is worth where there is no order: across series."""

from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.recipes.studies.shared import RATES, TUNED, weather
from selectra.registry import studies
from selectra.spec import Spec


@studies.register("directions", kind="series", source="arXiv:2403.11144")
def directions() -> Study:
    """Does scanning the series both ways beat one way with as many parameters?

    12 trainings of 500 steps, 25 s on an H200 with twelve side by side, costs and page included.
    """
    return Study(
        name="directions",
        question="Does scanning the series both ways beat one way of the same size?",
        bases=(weather(24),),
        variants=tuple(
            Variant(name=name, model=Spec("s_mamba", d_model=64, directions=name)) for name in ("both", "ahead")
        ),
        subject="both",
        subject_title="scanning both ways",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
        budget=Budget(quantity="params", amount=60_000),
    )
