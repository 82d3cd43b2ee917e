"""TSM2 on ETTh1 with the benchmark's borders."""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train


@recipes.register("tsm2_etth1", kind="series", source="arXiv:2403.19888")
def tsm2_etth1(path: str = "ETTh1", horizon: int = 96) -> Run:
    """TSM2 on ETTh1: 12, 4 and 4 months, look-back 96.

    The set is found where SELECTRA_DATA says or where `selectra data get ETTh1` puts it; a file elsewhere, gzipped or
    not, is named: `selectra train tsm2_etth1 data.path=ETTh1.csv.gz data.horizon=336`.
    """
    return Run(
        name="tsm2_etth1",
        model=Spec("tsm2_base"),
        data=Spec("series_file", path=path, seq_len=96, horizon=horizon, split="ett"),
        task=Spec("forecasting", loss="mse"),
        optim=Optim(lr=1e-3, weight_decay=0.01, warmup_steps=50),
        train=Train(epochs=10, batch_size=32, patience=3),
    )
