"""CamVid in 11 classes at 480 x 360 pixels (SELECTRA_DATA), official split: backbones below one UPerNet, from scratch.

Only the backbone differs: the same images, views, steps, optimizer and decoder; sizes are the papers' own.
"""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train


def on_camvid(name: str, backbone: Spec, **options: object) -> Run:
    """The shared part: about 65 passes over the training images."""
    views = {"crop": (288, 352), "zoom": (0.5, 2.0), "flip": 0.5, "jitter": 0.3}
    return Run(
        name=name,
        model=Spec("upernet_base", backbone=backbone, d_decoder=128, **options),
        data=Spec("masks", path="camvid", **views),
        task=Spec("segmentation", dice=0.5),
        optim=Optim(lr=1e-3, weight_decay=0.05, warmup_steps=150, clip=1.0),
        train=Train(steps=1_500, batch_size=16, ema=0.995, precision="bfloat16", channels_last=True),
    )


@recipes.register("samba_camvid", kind="segmentation", source="arXiv:2404.01705")
def samba_camvid() -> Run:
    """Samba with UPerNet on CamVid."""
    return on_camvid("samba_camvid", Spec("samba_base", drop_path=0.1), normed=False)


@recipes.register("vmamba_camvid", kind="segmentation", source="arXiv:2401.10166")
def vmamba_camvid() -> Run:
    """VMamba-T with UPerNet on CamVid."""
    return on_camvid("vmamba_camvid", Spec("vmamba_tiny_s1l8", drop_path=0.1))


@recipes.register("vim2_camvid", kind="segmentation", source="arXiv:2403.19888")
def vim2_camvid() -> Run:
    """ViM2-T with UPerNet on CamVid."""
    return on_camvid("vim2_camvid", Spec("vim2_tiny", drop_path=0.1))


@recipes.register("vim_camvid", kind="segmentation", source="arXiv:2401.09417")
def vim_camvid() -> Run:
    """Vim-S with UPerNet on CamVid: one resolution, a pyramid made of it."""
    return on_camvid("vim_camvid", Spec("vim_small", drop_path=0.1))


@recipes.register("convnext_camvid", kind="segmentation", source="arXiv:2201.03545")
def convnext_camvid() -> Run:
    """ConvNeXt-T with UPerNet on CamVid."""
    return on_camvid("convnext_camvid", Spec("convnext_tiny", drop_path=0.1, scale=1e-2))


@recipes.register("vit_camvid", kind="segmentation", source="arXiv:2010.11929")
def vit_camvid() -> Run:
    """ViT-S with UPerNet on CamVid: one resolution, a pyramid made of it."""
    return on_camvid("vit_camvid", Spec("vit_small", drop_path=0.1))
