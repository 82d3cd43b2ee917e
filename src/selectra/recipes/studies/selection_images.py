"""What MambaMixer's parts are worth (its ablation, arXiv:2403.19888, Sec. 6), for images."""

from selectra.compare.study import Study, Tuning, Variant
from selectra.recipes.studies.shared import TUNED, shapes
from selectra.registry import studies
from selectra.spec import Spec

PARTS = {
    "channels by an MLP": {"channel_mixer": "mlp"},
    "without channels": {"channel_mixer": "none"},
    "without tokens": {"token_mixer": "none"},
    "without averages": {"averaging": False},
}


@studies.register("selection_images", kind="image", source="arXiv:2403.19888")
def selection_images() -> Study:
    """Does ViM2 need both selections, of tokens and of channels, and the averaging?

    25 trainings of 1,000 steps; of 600 steps on CIFAR-10-JPEG they took 9.3 minutes of an H200.
    A variant without a part has fewer parameters; the report tells how many.
    """
    shape = {"patch_size": 2, "dims": (64, 128, 256), "depths": (2, 2, 2), "channel_dims": (96, 192, 384)}
    whole = Spec("vim2_tiny", **shape)
    return Study(
        name="selection_images",
        question="Does ViM2 need token selection, channel selection and weighted averaging?",
        bases=(shapes(),),
        variants=(
            Variant(name="both", model=whole),
            *(Variant(name=name, model=whole.replace(**part)) for name, part in PARTS.items()),
        ),
        subject="both",
        subject_title="the whole ViM2",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": (1e-3, 3e-3)}),
        metric="top1",
        higher_is_better=True,
    )
