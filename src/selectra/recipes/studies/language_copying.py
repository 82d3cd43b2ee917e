"""Copying by length: six families of equal size."""

from selectra.compare.study import Budget, Study, Tuning
from selectra.recipes.studies.language_recall import RATES, remembering
from selectra.recipes.studies.language_shared import REMEMBERING, TITLE, TUNED, families
from selectra.registry import studies
from selectra.spec import Spec

LENGTHS = (16, 32, 64)


@studies.register("language_copying", kind="language", source="arXiv:2402.01032")
def language_copying() -> Study:
    """Can Mamba copy strings of 16 to 64 letters as a Transformer of 0.4 million parameters can?

    126 trainings of 1,000 steps of 64 examples of strings of up to their own length, most of them short.
    """
    return Study(
        name="language_copying",
        question="Does Mamba copy what it has read as well as a Transformer of the same size?",
        bases=tuple(
            remembering(f"copies of {length} letters", Spec("copying", length=length), steps=1000) for length in LENGTHS
        ),
        variants=families(REMEMBERING),
        subject="mamba",
        subject_title=TITLE,
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}, repeats=2),
        budget=Budget(quantity="params", amount=420_000, align=8),
        metric="accuracy",
        higher_is_better=True,
    )
