"""The models that a comparison takes where nobody names any, and the sort of every registered one."""

from collections.abc import Mapping
from types import MappingProxyType

from selectra.spec import Spec

KINDS: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("tsm2", "timemachine", "s_mamba", "simba_series"), "mamba"),
        **dict.fromkeys(("vim", "vim2", "vmamba", "simba", "rsmamba", "videomamba"), "mamba"),
        **dict.fromkeys(("mamba_lm", "jamba"), "mamba"),
        **dict.fromkeys(("patchtst", "itransformer", "vit", "deit", "swin", "gpt"), "attention"),
        **dict.fromkeys(("convnext", "resnet", "hyena", "modern_tcn"), "convolution"),
        **dict.fromkeys(("tsmixer", "mlp_mixer"), "mlp"),
        **dict.fromkeys(("dlinear", "nlinear", "rlinear", "linear"), "linear"),
        **dict.fromkeys(("gru", "rwkv", "retnet"), "recurrent"),
        "naive": "naive", "seasonal_naive": "naive", "mambavision": "hybrid",
    }
)  # fmt: skip
FORECASTERS = ("tsm2", "s_mamba", "simba_series", "patchtst", "itransformer", "modern_tcn", "gru", "tsmixer",
               "dlinear", "linear", "seasonal_naive")  # fmt: skip
# One of each kind, small enough for minutes on two cores; sizes that are registered, or stated here.
QUICK_FORECASTERS: Mapping[str, Spec] = MappingProxyType(
    {
        "tsm2": Spec("tsm2"), "patchtst": Spec("patchtst_etth1"), "gru": Spec("gru", d_model=32, depth=1),
        "dlinear": Spec("dlinear"), "linear": Spec("linear"),
    }
)  # fmt: skip
IMAGE_MODELS: Mapping[str, Spec] = MappingProxyType(
    {
        "vim": Spec("vim_tiny", patch_size=4, depth=10), "vit": Spec("vit_tiny", patch_size=4, depth=10),
        "vmamba": Spec("vmamba_tiny", patch_size=2, dims=(64, 128, 256), depths=(2, 2, 2)),
        "convnext": Spec("convnext_tiny", patch_size=2, dims=(64, 128, 256, 256), depths=(2, 2, 2, 1)),
        "resnet": Spec("resnet_18", stem="small", dims=(48, 96, 168, 336)),
    }
)  # fmt: skip
# The same kinds of a quarter of a million parameters, for minutes on two cores.
QUICK_IMAGE_MODELS: Mapping[str, Spec] = MappingProxyType(
    {
        "vim": Spec("vim_tiny", patch_size=4, depth=5, d_model=72),
        "vit": Spec("vit_tiny", patch_size=4, depth=5, d_model=64, n_heads=2),
        "vmamba": Spec("vmamba_tiny", patch_size=2, dims=(24, 48, 88), depths=(1, 1, 2)),
        "convnext": Spec("convnext_tiny", patch_size=2, dims=(24, 48, 96, 96), depths=(1, 1, 1, 1)),
        "resnet": Spec("resnet_18", stem="small", dims=(8, 16, 38, 76)),
    }
)  # fmt: skip


def kind_of(spec: Spec) -> str:
    """The sort of a registered model; sizes follow the name of the family."""
    matches = [family for family in KINDS if spec.name == family or spec.name.startswith(f"{family}_")]
    return KINDS[max(matches, key=len)] if matches else ""
