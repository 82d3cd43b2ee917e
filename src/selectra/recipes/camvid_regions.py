"""CamVid in regions of 120 pixels: xT with and without a context encoder above one region encoder.

Only the context differs. The decoder is SegFormer's, whose maps see one position at a time (UPerNet's pooled grids
would let regions see each other without any context encoder). Patches have 6 pixels, so that a region gives grids of
20, 10 and 5 positions a side, and training sees whole regions, too (2 x 3 of them; test images have 3 x 4).
"""

from selectra.recipes.camvid import on_camvid
from selectra.registry import recipes
from selectra.spec import Run, Spec

REGION = 120


def in_regions(context: str, **options: object) -> Run:
    """The shared part: Swin of three stages in windows of 5 x 5, and 384 channels of context."""
    shape = {"patch_size": 6, "dims": (96, 192, 384), "depths": (2, 2, 4), "n_heads": (3, 6, 12), "window_size": 5}
    encoder = Spec("swin_tiny", drop_path=0.1, **shape)
    xt = Spec("xt_base", backbone=encoder, region=REGION, context=context, d_model=384, **options)
    run = on_camvid(f"xt_{context}_camvid120", xt)
    model = Spec("segformer_base", backbone=xt)
    return run.model_copy(update={"model": model, "data": run.data.replace(crop=(240, 360))})


@recipes.register("xt_none_camvid120", kind="segmentation", source="arXiv:2403.01915")
def xt_none_camvid120() -> Run:
    """Regions of CamVid that see nothing of each other."""
    return in_regions("none")


@recipes.register("xt_mamba_camvid120", kind="segmentation", source="arXiv:2403.01915")
def xt_mamba_camvid120() -> Run:
    """Regions of CamVid that see each other through four Mambas."""
    return in_regions("mamba")


@recipes.register("xt_hyper_camvid120", kind="segmentation", source="arXiv:2403.01915")
def xt_hyper_camvid120() -> Run:
    """Regions of CamVid that see each other through two layers of HyperAttention."""
    return in_regions("hyper")


@recipes.register("xt_xl_camvid120", kind="segmentation", source="arXiv:2403.01915")
def xt_xl_camvid120() -> Run:
    """Regions of CamVid in chunks of 75 positions, half of what training sees, with a memory of the chunk before."""
    return in_regions("xl", chunk=75)
