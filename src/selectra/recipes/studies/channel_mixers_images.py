"""What SiMBA's channel mixer is worth (its ablation, arXiv:2403.15360, Table 4), for images."""

from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.recipes.studies.shared import TUNED, shapes
from selectra.registry import studies
from selectra.spec import Spec


@studies.register("channel_mixers_images", kind="image", source="arXiv:2403.15360")
def channel_mixers_images() -> Study:
    """Does EinFFT beat Monarch matrices, an MLP and no channel mixer beside Mamba, on images?

    20 trainings of 1,000 steps; of 600 steps on CIFAR-10-JPEG, five side by side on an H200: 4.5 minutes.
    Widths make up for the parameters that a mixer saves.
    """
    shape = {"patch_size": 2, "dims": (64, 128, 256), "depths": (2, 2, 2), "mlp_ratios": (4, 4, 4), "d_state": 16}
    return Study(
        name="channel_mixers_images",
        question="Does EinFFT beat other channel mixers beside Mamba, or none, on images?",
        bases=(shapes(),),
        variants=tuple(
            Variant(name=mixer, model=Spec("simba_small", channel_mixer=mixer, **shape))
            for mixer in ("einfft", "monarch", "mlp", "none")
        ),
        subject="einfft",
        subject_title="EinFFT",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": (1e-3, 3e-3)}),
        budget=Budget(quantity="params", amount=2_200_000),
        metric="top1",
        higher_is_better=True,
    )
