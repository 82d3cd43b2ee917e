"""What SiMBA's channel mixer is worth (its ablation, arXiv:2403.15360, Table 4), for series."""

from selectra.compare.study import Study, Tuning, Variant
from selectra.recipes.studies.shared import RATES, TUNED, weather
from selectra.registry import studies
from selectra.spec import Spec


@studies.register("channel_mixers", kind="series", source="arXiv:2403.15360")
def channel_mixers() -> Study:
    """Does EinFFT beat Monarch matrices, an MLP and no channel mixer beside Mamba?

    24 trainings of 500 steps, 24 s on an H200 with twelve side by side, costs and page included.
    Sizes differ by the mixer, and stand in the report.
    """
    return Study(
        name="channel_mixers",
        question="Does EinFFT beat other channel mixers beside Mamba, or none?",
        bases=(weather(24),),
        variants=tuple(
            Variant(name=mixer, model=Spec("simba_series", channel_mixer=mixer, d_state=16))
            for mixer in ("einfft", "monarch", "mlp", "none")
        ),
        subject="einfft",
        subject_title="EinFFT",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
    )
