"""Mamba against attention and convolutions, at equal parameters, on images."""

from selectra.compare.study import Budget, Study, Tuning, Variant
from selectra.recipes.studies.shared import TUNED, shapes
from selectra.registry import studies
from selectra.spec import Spec

STAGES = {"stem": "patches", "patch_size": 2, "dims": (64, 128, 256), "depths": (2, 2, 2)}
MODELS = {
    "vim": ("mamba", Spec("vim_tiny", patch_size=4, depth=8, d_model=128)),
    "vmamba": ("mamba", Spec("vmamba_tiny_s1l8", **STAGES)),
    "vit": ("attention", Spec("vit_tiny", patch_size=4, depth=8, n_heads=2, d_model=128)),
    "convnext": ("convolution", Spec("convnext_tiny", patch_size=2, dims=(48, 96, 192, 256), depths=(2, 2, 2, 1))),
    "resnet": ("convolution", Spec("resnet_18", stem="small", dims=(24, 48, 96, 192))),
}


@studies.register("image_kinds", kind="image")
def image_kinds() -> Study:
    """Is Mamba better than attention and convolutions of the same size, 2.2 million parameters?

    25 trainings of 1,000 steps; its cost is not measured yet. Takes the extra "vision".
    """
    return Study(
        name="image_kinds",
        question="Is Mamba better than other kinds of image models of the same size?",
        bases=(shapes(),),
        variants=tuple(Variant(name=name, model=spec, kind=kind) for name, (kind, spec) in MODELS.items()),
        subject="mamba",
        subject_title="Mamba",
        declared=TUNED,
        tuning=Tuning(values={"optim.lr": (1e-3, 3e-3)}),
        budget=Budget(quantity="params", amount=2_200_000),
        metric="top1",
        higher_is_better=True,
    )
