"""Image models of one size on CIFAR-10-JPEG, by the recipes' settings."""

from selectra.compare.study import Study, Variant
from selectra.recipes import cifar10 as recipes
from selectra.registry import studies

KINDS = {
    "ViM2": ("mamba", recipes.vim2_cifar10), "VMamba": ("mamba", recipes.vmamba_cifar10),
    "Vim": ("mamba", recipes.vim_cifar10), "SiMBA": ("mamba", recipes.simba_cifar10),
    "ViT": ("attention", recipes.vit_cifar10), "ConvNeXt": ("convolution", recipes.convnext_cifar10),
    "ResNet-18": ("convolution", recipes.resnet18_cifar10), "MLP-Mixer": ("mlp", recipes.mlp_mixer_cifar10),
}  # fmt: skip


@studies.register("cifar10", kind="image", source="arXiv:2403.19888")
def cifar10() -> Study:
    """Does a Mamba model beat convolutions and attention on CIFAR-10-JPEG, at 4.95 million parameters?

    24 trainings of 2,900 steps, for a GPU; the time of all of them has not been measured. Other than in
    results/vision_cifar10.py a fiftieth of the training images validates, and chooses the weights.
    """
    runs = {name: recipe() for name, (_, recipe) in KINDS.items()}
    return Study(
        name="cifar10",
        question="Does a Mamba model beat convolutions and attention on CIFAR-10-JPEG?",
        bases=(runs["ResNet-18"].model_copy(update={"name": "CIFAR-10-JPEG"}),),
        variants=tuple(Variant(name=name, model=run.model, kind=KINDS[name][0]) for name, run in runs.items()),
        subject="mamba",
        subject_title="Mamba",
        metric="top1",
        higher_is_better=True,
    )
