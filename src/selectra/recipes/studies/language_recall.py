"""Associative recall by how much there is to remember: six families of equal size."""

from selectra.compare.study import Budget, Study, Tuning
from selectra.recipes.studies.language_shared import REMEMBERING, TITLE, TUNED, families
from selectra.registry import studies
from selectra.spec import Optim, Run, Spec, Train

RATES = (1e-3, 4e-3)
PAIRS = (8, 16, 32)
BATCH = 64


@studies.register("language_recall", kind="language", source="arXiv:2312.04927")
def language_recall() -> Study:
    """Can Mamba recall what stood beside a key, among 8 to 32 pairs, as a Transformer of 0.4 million parameters can?

    126 trainings of 1,200 steps of 64 examples of up to their own number of pairs, most of them of few pairs that come
    back: from examples of all pairs alone, no family learned anything in a quarter of these steps. What is measured is
    recall of all pairs, each told once. Whether a family finds a way to look back differs by seed at a high learning
    rate (a Transformer's, above all), so every rate is tried with two.
    """
    return Study(
        name="language_recall",
        question="Does Mamba recall what it has read as well as a Transformer of the same size?",
        bases=tuple(
            remembering(f"recall of {pairs} pairs", Spec("recall", pairs=pairs, keys=64), steps=1200) for pairs in PAIRS
        ),
        variants=families(REMEMBERING),
        subject="mamba",
        subject_title=TITLE,
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}, repeats=2),
        budget=Budget(quantity="params", amount=430_000, align=8),
        metric="accuracy",
        higher_is_better=True,
    )


def remembering(name: str, data: Spec, steps: int) -> Run:
    """What all bases of both studies of memory share."""
    return Run(
        name=name,
        model=Spec("gpt_smoke"),
        data=data,
        task=Spec("language"),
        optim=Optim(lr=RATES[0], weight_decay=0.1, betas=(0.9, 0.99), warmup_steps=100),
        train=Train(steps=steps, batch_size=BATCH, eval_every=steps // 5, precision="bfloat16"),
    )
