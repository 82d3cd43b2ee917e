"""What the built-in studies share."""

from selectra.spec import Optim, Run, Spec, Train

RATES = (2e-4, 1e-3, 5e-3)
TUNED = {"optim.lr": "models want different learning rates, so each gets the best of the same trials"}
LENGTHS = (96, 200, 336, 720)
STEPS = 500


def weather(horizon: int) -> Run:
    """Four days of New York's hourly weather in, `horizon` hours out; variants bring the model."""
    return Run(
        name=f"weather {horizon}",
        model=Spec("naive"),
        data=Spec("series_file", seq_len=96, horizon=horizon),
        task=Spec("forecasting", loss="mse"),
        optim=Optim(lr=RATES[1], weight_decay=0.01, warmup_steps=STEPS // 20),
        train=Train(steps=STEPS, batch_size=32, eval_every=STEPS // 5),
    )


def shapes() -> Run:
    """Drawn shapes, which need no file; name your own folder or `cifar10_jpeg`. Variants bring the model."""
    return Run(
        name="drawn shapes",
        model=Spec("vmamba_smoke"),
        data=Spec("images", val=0.1, crop=4, flip=0.5),
        task=Spec("classification", label_smoothing=0.1),
        optim=Optim(lr=RATES[1], weight_decay=0.05, warmup_steps=STEPS // 10, clip=1.0),
        train=Train(steps=2 * STEPS, batch_size=256, eval_every=2 * STEPS, precision="bfloat16"),
    )
