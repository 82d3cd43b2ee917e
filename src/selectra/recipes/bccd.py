"""BCCD's blood cells (SELECTRA_DATA), official test part: backbones below one RetinaNet, from scratch.

Only the backbone and the number of steps differ. Training and validation parts train together, as is usual for sets in
Pascal VOC's form; nothing is chosen on the test part. Images are seen at 384 x 288 pixels of their 640 x 480. Two boxes
of the set have no area, and are left out.
"""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train

STEPS = 1_000


def on_bccd(name: str, backbone: Spec, steps: int) -> Run:
    """The shared part: about 55 passes over the training images in 1,000 steps."""
    views = {"crop": (288, 384), "zoom": (0.8, 1.5), "flip": 0.5, "flip_vertical": 0.5, "jitter": 0.3}
    return Run(
        name=name,
        model=Spec("retinanet_base", backbone=backbone, anchor=3.0, short_side=288),
        data=Spec("objects", path="bccd", join=True, degenerate="skip", **views),
        task=Spec("detection", select="map50"),
        optim=Optim(lr=5e-4, weight_decay=0.05, warmup_steps=100, clip=1.0),
        train=Train(steps=steps, batch_size=16, ema=0.995, precision="bfloat16", channels_last=True),
    )


@recipes.register("vmamba_bccd", kind="detection", source="arXiv:2401.10166")
def vmamba_bccd() -> Run:
    """VMamba-T with RetinaNet on BCCD."""
    return on_bccd("vmamba_bccd", Spec("vmamba_tiny_s1l8", drop_path=0.1), STEPS)


@recipes.register("resnet_bccd", kind="detection", source="arXiv:1512.03385")
def resnet_bccd() -> Run:
    """ResNet-50 with RetinaNet on BCCD, twice the steps."""
    return on_bccd("resnet_bccd", Spec("resnet_50"), 2 * STEPS)
