"""Which of SiMBA's channel mixers keeps a deep stack trainable (arXiv:2403.15360, Sec. 1: "stability")."""

from selectra.compare.study import Study, Tuning, Variant
from selectra.recipes.studies.shared import RATES, TUNED, weather
from selectra.registry import studies
from selectra.spec import Spec


@studies.register("channel_mixers_deep", kind="series", source="arXiv:2403.15360")
def channel_mixers_deep() -> Study:
    """Does EinFFT keep sixteen Mamba blocks trainable where other channel mixers, or none, do not?

    24 trainings of 500 steps, 117 s on an H200 with twelve side by side, costs and page included.
    A training that diverges is shown as failed.
    """
    return Study(
        name="channel_mixers_deep",
        question="Does EinFFT keep a deep stack of Mamba blocks trainable where others do not?",
        bases=(weather(24),),
        variants=tuple(
            Variant(name=mixer, model=Spec("simba_series", depth=16, channel_mixer=mixer, d_state=16))
            for mixer in ("einfft", "monarch", "mlp", "none")
        ),
        subject="einfft",
        subject_title="EinFFT",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": RATES}),
    )
