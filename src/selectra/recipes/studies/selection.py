"""What MambaMixer's parts are worth (its ablation, arXiv:2403.19888, Sec. 6), for series."""

from selectra.compare.study import Study, Tuning, Variant
from selectra.recipes.studies.shared import RATES, TUNED, weather
from selectra.registry import studies
from selectra.spec import Spec

PARTS = {"without tokens": "time", "without channels": "channels", "without averages": "averages"}


@studies.register("selection", kind="series", source="arXiv:2403.19888")
def selection() -> Study:
    """Does TSM2 need both selections, of tokens and of channels, and the averaging?

    24 trainings of 500 steps, 27 s on an H200 with twelve side by side, costs and page included.
    A variant without a part has fewer parameters; the report tells how many. Two blocks give averages a choice.
    """
    whole = Spec("tsm2", depth=2)
    return Study(
        name="selection",
        question="Does TSM2 need token selection, channel selection and weighted averaging?",
        bases=(weather(24),),
        variants=(
            Variant(name="both", model=whole),
            *(Variant(name=name, model=whole.replace(without=part)) for name, part in PARTS.items()),
        ),
        subject="both",
        subject_title="the whole TSM2",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
    )
