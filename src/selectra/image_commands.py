"""`selectra predict` and `selectra explain`. Heavy imports happen inside, so that help comes at once."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from selectra.errors import DataError

Images = Annotated[
    list[Path], typer.Argument(help="Image files; arrays (h, w, c) of uint8 as .npy.", metavar="IMAGE...")
]
RunFolder = Annotated[Path | None, typer.Option("--run", help="Folder of a training of images.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Instead of --run: a model, such as vim_tiny ...")]
WeightsFile = Annotated[Path | None, typer.Option("--weights", help="... and its weights, official ones too.")]
ClassNames = Annotated[Path | None, typer.Option("--classes", help="For --weights: a file with a class in every line.")]
ImageSize = Annotated[
    int | None, typer.Option("--img-size", min=1, help="For --weights: pixels of the sides; default: 224.")
]


def predict(
    images: Images,
    run: RunFolder = None,
    model: ModelName = None,
    weights: WeightsFile = None,
    classes: ClassNames = None,
    img_size: ImageSize = None,
    top: Annotated[int, typer.Option(min=1, help="How many classes are shown.")] = 5,
    device: Annotated[str, typer.Option(help='"cpu", "cuda", "cuda:1", or "auto".')] = "auto",
    skip_corrupt: Annotated[bool, typer.Option("--skip-corrupt", help="Name damaged files and go on.")] = False,
) -> None:
    """Say what is on images: the likeliest classes of a trained model, with their probabilities."""
    from selectra.classifier.command import predictions_table, trained_from  # noqa: PLC0415
    from selectra.classifier.predicting import predict as predict_images  # noqa: PLC0415
    from selectra.train.parallel import pick_device  # noqa: PLC0415

    trained = trained_from(run, model, weights, classes, img_size)
    skipped: list[str] | None = [] if skip_corrupt else None
    found = predict_images(trained, images, top, pick_device(device), skipped)
    console = Console()
    console.print(predictions_table(trained, found))
    for problem in skipped or []:
        console.print(f"left out: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not found:
        raise DataError("none of the files could be read.")


def explain(
    image: Annotated[Path, typer.Argument(help="An image file; an array (h, w, c) of uint8 as .npy.")],
    run: RunFolder = None,
    model: ModelName = None,
    weights: WeightsFile = None,
    classes: ClassNames = None,
    img_size: ImageSize = None,
    target: Annotated[str | None, typer.Option("--class", help="Explain this class; default: the likeliest.")] = None,
    out: Annotated[Path, typer.Option(help="The picture, a PNG file.")] = Path("explanation.png"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the noise that gradients are averaged over.")] = 0,
) -> None:
    """Draw what a model looks at: what matters for a class, a feature's field, and the scan directions."""
    from selectra.classifier.command import said, trained_from  # noqa: PLC0415
    from selectra.classifier.explaining import explain as explain_image  # noqa: PLC0415
    from selectra.report.explanation import save_explanation  # noqa: PLC0415

    found = explain_image(trained_from(run, model, weights, classes, img_size), image, target, seed)
    save_explanation(found, out)
    console = Console()
    for line in said(found):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"The picture is {out}", highlight=False, markup=False, soft_wrap=True)
