"""What discretisation buys: Mamba's, zero-order hold, Euler, and a plain gate (arXiv:2312.00752, Sec. 3.5 and 3.6)."""

from typing import get_args

from selectra.compare.study import Study, Tuning, Variant
from selectra.mixers import Discretisation
from selectra.recipes.studies.shared import RATES, TUNED, weather
from selectra.registry import studies
from selectra.spec import Spec


@studies.register("discretisation", kind="series", source="arXiv:2312.00752")
def discretisation() -> Study:
    """Does Mamba need a discretised differential equation, or does a plain gate do?

    24 trainings of 500 steps, 1 h 27 min on one busy CPU core: all but Mamba's own run in plain PyTorch.
    Sizes are alike but for A, which the plain gate does not have.
    """
    model = Spec("simba_series", channel_mixer="mlp", d_state=16)
    return Study(
        name="discretisation",
        question="Does Mamba need its discretisation, or does a plain gate do?",
        bases=(weather(24),),
        variants=tuple(
            Variant(name=name if name != "none" else "plain gate", model=model.replace(discretisation=name))
            for name in get_args(Discretisation)
        ),
        subject="mamba",
        subject_title="Mamba's discretisation",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
    )
