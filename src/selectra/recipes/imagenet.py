"""Image classes at 224 x 224 pixels from your own folder, with all that the field trains such models with.

Published figures, by the papers and their repositories, are passes, warm-up, batch, learning rate, weight decay and
whatever a recipe's own docstring says. RandAugment's two operations at magnitude 9, random erasing of a quarter of the
images, crops from 8 % of an image on, the running mean's decay of 0.9999 and bfloat16 are usual in this field and
chosen here, not taken from these papers. The cosine ends at zero.

Give the folder by `data.path=FOLDER`; its layouts are those of `selectra.data.images.Images`. RandAugment changes image
by image, in `train.workers` processes. The published 300 passes are for ImageNet's 1.28 million images: for a folder of
some thousands begin with released weights, `vmamba_finetune`.
"""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train

VIEWS = {"scale": 0.08, "flip": 0.5, "randaugment": (2, 9), "erase": 0.25, "mixup": 0.8, "cutmix": 1.0}
PATH = "imagenet"
# Of 300 passes.
WARM = 20 / 300


def from_scratch(name: str, model: Spec, warmup_share: float, clip: float | None, precision: str = "bfloat16") -> Run:
    """The shared part: 300 passes of AdamW with batches of 1,024 images, 1e-3 and 0.05, in pieces of 128."""
    return Run(
        name=name,
        model=model,
        data=Spec("images", path=PATH, img_size=224, keep="disk", standard="imagenet", **VIEWS),
        task=Spec("classification", label_smoothing=0.1),
        optim=Optim(lr=1e-3, weight_decay=0.05, warmup_share=warmup_share, clip=clip),
        train=Train.model_validate(
            {
                "epochs": 300, "batch_size": 128, "accumulate": 8, "ema": 0.9999, "precision": precision,
                "channels_last": True, "workers": 8,
            }
        ),
    )  # fmt: skip


@recipes.register("vmamba_imagenet", kind="image", source="arXiv:2401.10166")
def vmamba_imagenet() -> Run:
    """VMamba-T as published: drop path 0.2, clipping at 5, mixup 0.8, CutMix 1, smoothing 0.1, 20 passes of warm-up."""
    return from_scratch("vmamba_imagenet", Spec("vmamba_tiny_s1l8", drop_path=0.2), WARM, 5.0)


@recipes.register("vim2_imagenet", kind="image", source="arXiv:2403.19888")
def vim2_imagenet() -> Run:
    """ViM2-T: 20 passes of warm-up as published; mixtures, smoothing and clipping are VMamba's, drop path is ours."""
    return from_scratch("vim2_imagenet", Spec("vim2_tiny", drop_path=0.2), WARM, 5.0)


@recipes.register("vim_imagenet", kind="image", source="arXiv:2401.09417")
def vim_imagenet() -> Run:
    """Vim-S: float32 and drop path 0.05 as its script has them; mixtures and smoothing are VMamba's.

    Warm-up, of 5 passes, and clipping at 1 are chosen here.
    """
    return from_scratch("vim_imagenet", Spec("vim_small", drop_path=0.05), 5 / 300, 1.0, "float32")


@recipes.register("vmamba_finetune", kind="image", source="arXiv:2401.10166")
def vmamba_finetune() -> Run:
    """VMamba-T from released weights, `train.pretrained=FILE`, for a folder of some thousand images; chosen here.

    Stages nearer to the image learn more slowly, each at 0.7 of the next; blocks are computed again in the backward
    pass, so that batches of 64 fit smaller GPUs.
    """
    return Run(
        name="vmamba_finetune",
        model=Spec("vmamba_tiny_s1l8", drop_path=0.2),
        data=Spec("images", path=PATH, img_size=224, keep="disk", standard="imagenet", **{**VIEWS, "scale": 0.25}),
        task=Spec("classification", label_smoothing=0.1),
        optim=Optim(lr=5e-4, weight_decay=0.05, warmup_share=0.1, layer_decay=0.7),
        train=Train(
            epochs=30, batch_size=64, ema=0.999, precision="bfloat16", channels_last=True, recompute=True, workers=8
        ),
    )
