"""Moving shapes (drawn, no file): VideoMamba tells motions apart of which one frame shows nothing."""

from selectra.registry import recipes
from selectra.spec import Optim, Run, Spec, Train


@recipes.register("videomamba_shapes", kind="video", source="arXiv:2403.06977")
def videomamba_shapes() -> Run:
    """VideoMamba-Ti on drawn clips of moving shapes, in patches of 8 pixels over two frames."""
    return Run(
        name="videomamba_shapes",
        model=Spec("videomamba_clip_tiny", patch_size=8, tubelet=2),
        data=Spec("moving_shapes"),
        task=Spec("clip_classification"),
        optim=Optim(lr=1e-3, weight_decay=0.05, warmup_steps=100, clip=1.0),
        train=Train(steps=1_500, batch_size=128, ema=0.99, precision="bfloat16"),
    )


@recipes.register("videomamba_shapes_still", kind="video", source="arXiv:2403.06977")
def videomamba_shapes_still() -> Run:
    """The control of videomamba_shapes: clips that show one of their frames in the place of all."""
    run = videomamba_shapes()
    return run.model_copy(update={"name": "videomamba_shapes_still", "data": run.data.replace(still=True)})
