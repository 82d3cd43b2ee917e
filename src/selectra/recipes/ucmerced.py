"""UC Merced land use at 128 x 128 pixels (SELECTRA_DATA), 80 of 100 images a class: RSMamba and baselines of its size.

Only the model differs: the same images, views, steps and optimizer; the models have about 6.28 million parameters.
Pictures from above may be turned upside down.
"""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train

PARAMETERS = 6_280_000
"""What every model here has, within 2 %."""


def on_ucmerced(name: str, model: Spec) -> Run:
    """The shared part: about 140 passes over the training images."""
    views = {"crop": 16, "flip": 0.5, "flip_vertical": 0.5, "erase": 0.25, "mixup": 0.2, "cutmix": 1.0}
    return Run(
        name=name,
        model=model,
        data=Spec("images", path="ucmerced", val=0.1, test=0.2, **views),
        task=Spec("classification", label_smoothing=0.1),
        optim=Optim(lr=1e-3, weight_decay=0.05, warmup_steps=150, clip=1.0),
        train=Train(steps=3_000, batch_size=64, ema=0.998, precision="bfloat16", channels_last=True),
    )


@recipes.register("rsmamba_ucmerced", kind="image", source="arXiv:2403.19654")
def rsmamba_ucmerced() -> Run:
    """RSMamba-B on UC Merced: 256 overlapping patches, three paths through them."""
    return on_ucmerced("rsmamba_ucmerced", Spec("rsmamba_base", drop_path=0.1))


@recipes.register("resnet18_ucmerced", kind="image", source="arXiv:1512.03385")
def resnet18_ucmerced() -> Run:
    """ResNet-18 on UC Merced, narrower."""
    return on_ucmerced("resnet18_ucmerced", Spec("resnet_18", dims=(56, 112, 192, 376)))


@recipes.register("vit_ucmerced", kind="image", source="arXiv:2010.11929")
def vit_ucmerced() -> Run:
    """ViT on UC Merced: 256 patches of 8 pixels."""
    return on_ucmerced("vit_ucmerced", Spec("vit_tiny", patch_size=8, depth=14, drop_path=0.1))
