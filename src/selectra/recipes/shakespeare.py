"""Language models of characters on Tiny Shakespeare."""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train


@recipes.register("shakespeare", kind="language", source="github.com/karpathy/char-rnn")
def shakespeare() -> Run:
    """Mamba on Tiny Shakespeare, character by character; any language model fits, as `model=jamba_base`.

    For a GPU; `shakespeare_small` is for a CPU. Train it with `selectra train shakespeare`, and let it write with
    `selectra generate runs/shakespeare/pretrained "ROMEO:" --temperature 0.8`.
    """
    return Run(
        name="shakespeare",
        # About 10 million parameters; a fifth of what blocks add is dropped, since the text is short.
        model=Spec("mamba_lm_base", dropout=0.2),
        data=Spec("tiny_shakespeare", seq_len=256),
        task=Spec("language"),
        optim=Optim(lr=1e-3, weight_decay=0.1, warmup_steps=100),
        train=Train(steps=5000, batch_size=64, eval_every=250, patience=5),
    )


@recipes.register("shakespeare_small", kind="language", source="github.com/karpathy/char-rnn")
def shakespeare_small() -> Run:
    """Mamba of 0.4 million parameters on Tiny Shakespeare, character by character: minutes on two cores."""
    return Run(
        name="shakespeare_small",
        model=Spec("mamba_lm", d_model=128, depth=3),
        data=Spec("tiny_shakespeare", seq_len=128),
        task=Spec("language"),
        optim=Optim(lr=4e-3, weight_decay=0.1, warmup_steps=50),
        train=Train(steps=1000, batch_size=16, eval_every=250),
    )
