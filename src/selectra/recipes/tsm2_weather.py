"""The first run to read: every part of a training, named."""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train


@recipes.register("tsm2_weather", kind="series", source="arXiv:2403.19888")
def tsm2_weather() -> Run:
    """TSM2 on New York's hourly weather of 2013, which comes with the package, gaps and all.

    Train it with `selectra train tsm2_weather`; change anything on the way, such as `model.d_state=8 train.epochs=2`,
    and see where every value comes from with `selectra show tsm2_weather`.
    """
    return Run(
        name="tsm2_weather",
        # A registered model and the arguments that differ from its defaults; lengths and counts come from the data.
        model=Spec("tsm2_base"),
        # Four days of every series in, one day out. Without a path it is the bundled file.
        data=Spec("series_file", seq_len=96, horizon=24),
        task=Spec("forecasting", loss="mse"),
        optim=Optim(lr=1e-3, weight_decay=0.01, warmup_steps=50),
        # Training ends early when three evaluations in a row bring nothing; the best weights are kept.
        train=Train(epochs=5, batch_size=32, patience=3),
    )
