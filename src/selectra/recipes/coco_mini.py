"""Twenty images of COCO-mini (SELECTRA_DATA) learned by heart: does all of Mask R-CNN's path learn?

They are the first twenty by number of those without crowds whose objects all cover at least a hundredth of the image:
58 objects of 29 classes. Training and evaluation see the same images, with the longer side at 320 pixels; nothing is
augmented but for where an image lies in its square. What comes out is no result on COCO.
"""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train

TWENTY = tuple(
    f"{number:012}"
    for number in (25, 30, 42, 72, 73, 86, 92, 136, 143, 165, 283, 285, 309, 321, 776, 785, 1675, 1818, 2149, 2592)
)


def on_coco_mini(name: str, backbone: Spec) -> Run:
    """The shared part."""
    return Run(
        name=name,
        model=Spec("mask_rcnn_base", backbone=backbone, anchor=4.0, short_side=320, long_side=320),
        data=Spec("objects", path="coco_mini", masks=True, overfit=True, only=TWENTY, crop=320),
        task=Spec("detection", select="mask_map50"),
        optim=Optim(lr=5e-4, weight_decay=0.05, warmup_steps=50, clip=1.0),
        train=Train(steps=800, batch_size=10, eval_every=200, precision="bfloat16", channels_last=True),
    )


@recipes.register("simba_coco_mini", kind="detection", source="arXiv:2403.15360")
def simba_coco_mini() -> Run:
    """SiMBA-S with Mask R-CNN on twenty images."""
    return on_coco_mini("simba_coco_mini", Spec("simba_small"))


@recipes.register("vim2_coco_mini", kind="detection", source="arXiv:2403.19888")
def vim2_coco_mini() -> Run:
    """ViM2-T with Mask R-CNN on twenty images."""
    return on_coco_mini("vim2_coco_mini", Spec("vim2_tiny"))
