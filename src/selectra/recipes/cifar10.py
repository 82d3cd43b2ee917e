"""CIFAR-10 as JPEG (SELECTRA_DATA): one recipe for all models, each with about 4.95 million parameters.

Only the model differs: the same images, views, steps, optimizer and running mean. Pyramids start with patches of 2
pixels (ResNet with its usual stem for small images, stride 1), plain stacks have patches of 4.
"""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train

PARAMETERS = 4_950_000
"""What every model here has, within 2 %."""


def on_cifar10(name: str, model: Spec) -> Run:
    """The shared part: 30 passes over the training images."""
    data = Spec("images", path="cifar10_jpeg", val=0.02, crop=4, flip=0.5, erase=0.25)
    return Run(
        name=name,
        model=model,
        data=data,
        task=Spec("classification", label_smoothing=0.1),
        optim=Optim(lr=2e-3, weight_decay=0.05, warmup_steps=300, clip=1.0),
        train=Train(steps=2_900, batch_size=512, ema=0.998, precision="bfloat16", channels_last=True),
    )


@recipes.register("vim2_cifar10", kind="image", source="arXiv:2403.19888")
def vim2_cifar10() -> Run:
    """ViM2 on CIFAR-10-JPEG: three stages of selective token and channel mixers."""
    shape = {"patch_size": 2, "dims": (104, 208, 416), "depths": (2, 2, 2), "channel_dims": (160, 320, 640)}
    return on_cifar10("vim2_cifar10", Spec("vim2_tiny", drop_path=0.1, **shape))


@recipes.register("vmamba_cifar10", kind="image", source="arXiv:2401.10166")
def vmamba_cifar10() -> Run:
    """VMamba on CIFAR-10-JPEG: three stages of its second version."""
    shape = {"patch_size": 2, "dims": (96, 192, 384), "depths": (2, 2, 2)}
    return on_cifar10("vmamba_cifar10", Spec("vmamba_tiny_s1l8", drop_path=0.1, **shape))


@recipes.register("vim_cifar10", kind="image", source="arXiv:2401.09417")
def vim_cifar10() -> Run:
    """Vim on CIFAR-10-JPEG: ten blocks, the class token in the middle."""
    return on_cifar10("vim_cifar10", Spec("vim_tiny", patch_size=4, d_model=256, depth=10, drop_path=0.1))


@recipes.register("simba_cifar10", kind="image", source="arXiv:2403.15360")
def simba_cifar10() -> Run:
    """SiMBA on CIFAR-10-JPEG: three stages of Mamba and EinFFT."""
    shape = {"patch_size": 2, "dims": (96, 192, 384), "depths": (2, 2, 2), "mlp_ratios": (4, 4, 4), "d_state": 16}
    return on_cifar10("simba_cifar10", Spec("simba_small", drop_path=0.1, **shape))


@recipes.register("vit_cifar10", kind="image", source="arXiv:2010.11929")
def vit_cifar10() -> Run:
    """ViT on CIFAR-10-JPEG: eleven blocks of attention."""
    return on_cifar10("vit_cifar10", Spec("vit_tiny", patch_size=4, depth=11, drop_path=0.1))


@recipes.register("swin_cifar10", kind="image", source="arXiv:2103.14030")
def swin_cifar10() -> Run:
    """Swin on CIFAR-10-JPEG: three stages of attention in windows of 4 x 4 tokens."""
    shape = {"patch_size": 2, "dims": (96, 192, 384), "depths": (2, 2, 2), "n_heads": (3, 6, 12), "window_size": 4}
    return on_cifar10("swin_cifar10", Spec("swin_tiny", drop_path=0.1, **shape))


@recipes.register("convnext_cifar10", kind="image", source="arXiv:2201.03545")
def convnext_cifar10() -> Run:
    """ConvNeXt on CIFAR-10-JPEG: four stages."""
    shape = {"patch_size": 2, "dims": (80, 160, 320, 336), "depths": (3, 3, 3, 1)}
    return on_cifar10("convnext_cifar10", Spec("convnext_tiny", drop_path=0.1, scale=1e-2, **shape))


@recipes.register("resnet18_cifar10", kind="image", source="arXiv:1512.03385")
def resnet18_cifar10() -> Run:
    """ResNet-18 on CIFAR-10-JPEG: narrower, with the stem for small images."""
    return on_cifar10("resnet18_cifar10", Spec("resnet_18", stem="small", dims=(48, 96, 168, 336)))


@recipes.register("mlp_mixer_cifar10", kind="image", source="arXiv:2105.01601")
def mlp_mixer_cifar10() -> Run:
    """MLP-Mixer on CIFAR-10-JPEG: twelve blocks."""
    return on_cifar10("mlp_mixer_cifar10", Spec("mlp_mixer_small", patch_size=4, d_model=224, depth=12, drop_path=0.1))
