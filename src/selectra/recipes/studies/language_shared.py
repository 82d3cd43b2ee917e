"""The language models that studies set against each other, in two sizes that a budget then makes equal."""

from selectra.compare.study import Variant
from selectra.spec import Spec

TUNED = {"optim.lr": "models want different learning rates, so each gets the best of the same trials"}
TITLE = "Mamba, alone or with an attention layer,"

# Shapes of about 10.6 million parameters. The hybrid is Jamba's block of 8 layers, one
# of them attention, with dense perceptrons: experts would give it more parameters than a token goes through.
TEN_MILLION = {
    "gpt": Spec("gpt", d_model=384, depth=6, n_heads=6, d_ff=1024),
    "mamba": Spec("mamba_lm", d_model=384, depth=11),
    "hybrid": Spec("jamba", d_model=320, depth=8, n_heads=5, n_kv_heads=5, d_ff=704, n_experts=1),
    "rwkv": Spec("rwkv", d_model=368, depth=6, d_ff=1472),
    "retnet": Spec("retnet", d_model=384, depth=6, n_heads=3, d_ff=768),
    "hyena": Spec("hyena", d_model=384, depth=9, d_ff=768),
}
# About 0.4 million: two layers, or as many halves.
SMALL = {
    "gpt": Spec("gpt", d_model=128, depth=2, n_heads=4, d_ff=344),
    "mamba": Spec("mamba_lm", d_model=128, depth=4),
    "hybrid": Spec("jamba", d_model=88, depth=4, n_heads=4, n_kv_heads=4, d_ff=176, n_experts=1, attn_period=4,
                   attn_offset=2),
    "rwkv": Spec("rwkv", d_model=124, depth=2, d_ff=496),
    "retnet": Spec("retnet", d_model=128, depth=2, n_heads=2, d_ff=256),
    "hyena": Spec("hyena", d_model=128, depth=3, d_ff=256),
}  # fmt: skip
# As small, with one head as in Zoology: two of 16 channels each take several times as many steps to find a key.
# RetNet's heads forget at different rates, so it has four.
REMEMBERING = {
    **SMALL,
    "gpt": SMALL["gpt"].replace(n_heads=1),
    "hybrid": SMALL["hybrid"].replace(n_heads=1, n_kv_heads=1),
    "retnet": SMALL["retnet"].replace(n_heads=4),
}
KINDS = {"gpt": "attention", "mamba": "mamba", "hybrid": "mamba", "rwkv": "recurrent", "retnet": "recurrent",
         "hyena": "convolution"}  # fmt: skip


def families(sizes: dict[str, Spec], dropout: float = 0.0) -> tuple[Variant, ...]:
    """The six families, each with this rate of dropout."""
    found = {name: spec.replace(dropout=dropout) if dropout else spec for name, spec in sizes.items()}
    return tuple(Variant(name=name, model=spec, kind=KINDS[name]) for name, spec in found.items())
