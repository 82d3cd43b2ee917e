"""`selectra predict` and `selectra explain`. Heavy imports happen inside, so that help comes at once."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from selectra.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

Images = Annotated[
    list[Path],
    typer.Argument(help="Image files; arrays (h, w, c) of uint8 as .npy. Of clips: videos.", metavar="IMAGE..."),
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
    skip_corrupt: Annotated[
        bool,
        typer.Option("--skip-corrupt", help="Name files that are damaged or that the model cannot take, and go on."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option(help="Segmentation, detection: folder for pictures; default: predictions.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Segmentation: look through windows of so many pixels a side.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Detection: least score of what is shown; default: 0.5.")
    ] = None,
) -> None:
    """Say what is on images or videos: the likeliest classes, every pixel's class, or objects, as was trained for."""
    from selectra.classifier.clips import is_video  # noqa: PLC0415
    from selectra.classifier.command import predictions_table, trained_from  # noqa: PLC0415
    from selectra.classifier.left_behind import kind_of  # noqa: PLC0415
    from selectra.classifier.predicting import predict as predict_images  # noqa: PLC0415
    from selectra.train.parallel import pick_device  # noqa: PLC0415

    alone = (model, weights, classes, img_size) == (None,) * 4
    kind = kind_of(run) if run is not None and alone else "image"
    taken = {"segmentation": ("--out", "--window"), "detection": ("--out", "--threshold")}.get(kind, ())
    given = {"--out": out, "--window": window, "--threshold": threshold}
    extra = [option for option, value in given.items() if value is not None and option not in taken]
    if extra:
        what = {"--out": "segmentation and detection", "--window": "segmentation", "--threshold": "detection"}
        raise ConfigError(f"{extra[0]} is for trainings of {what[extra[0]]} alone; leave it out.")
    if run is not None and kind == "segmentation":
        _segment(images, run, pick_device(device), skip_corrupt, out or Path("predictions"), window)
        return
    if run is not None and kind == "detection":
        _detect(images, run, pick_device(device), skip_corrupt, out or Path("predictions"), threshold)
        return
    if run is not None and alone and is_video(run):
        _tell_clips(images, run, top, pick_device(device), skip_corrupt)
        return
    trained = trained_from(run, model, weights, classes, img_size)
    skipped: list[str] | None = [] if skip_corrupt else None
    found = predict_images(trained, images, top, pick_device(device), skipped)
    console = Console()
    console.print(predictions_table(trained, found))
    _name_skipped(console, skipped, bool(found))


def _tell_clips(clips: list[Path], run: Path, top: int, device: "torch.device", skip_corrupt: bool) -> None:
    from selectra.classifier.clips import clip_model_from_run, predict_clips  # noqa: PLC0415
    from selectra.classifier.command import predictions_table  # noqa: PLC0415

    skipped: list[str] | None = [] if skip_corrupt else None
    trained = clip_model_from_run(run)
    found = predict_clips(trained, clips, top, device, skipped)
    console = Console()
    console.print(predictions_table(trained, found, "video"))
    _name_skipped(console, skipped, bool(found))


def _segment(
    images: list[Path], run: Path, device: "torch.device", skip_corrupt: bool, out: Path, window: int | None
) -> None:
    from selectra.classifier.segmenting import segment_all, segmented_table, segmenter_from_run  # noqa: PLC0415
    from selectra.report.overlay import save_overlay  # noqa: PLC0415

    skipped: list[str] | None = [] if skip_corrupt else None
    found = segment_all(segmenter_from_run(run), images, device, window, skipped)
    console = Console()
    for each in found:
        save_overlay(each, out)
    console.print(segmented_table(found))
    if found:
        line = f"Pictures (NAME_overlay.png) and masks (NAME_mask.png) are in {out}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _name_skipped(console, skipped, bool(found))


def _detect(
    images: list[Path], run: Path, device: "torch.device", skip_corrupt: bool, out: Path, threshold: float | None
) -> None:
    from selectra.classifier.detecting import THRESHOLD, detect_all, detected_table, detector_from_run  # noqa: PLC0415
    from selectra.report.detected import save_detected  # noqa: PLC0415

    skipped: list[str] | None = [] if skip_corrupt else None
    least = THRESHOLD if threshold is None else threshold
    found = detect_all(detector_from_run(run), images, device, least, skipped)
    console = Console()
    for each in found:
        save_detected(each, out)
    console.print(detected_table(found))
    if found:
        line = f"Pictures (NAME_overlay.png) and objects (NAME_objects.json) are in {out}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _name_skipped(console, skipped, bool(found))


def _name_skipped(console: Console, skipped: list[str] | None, any_found: bool) -> None:
    for problem in skipped or []:
        console.print(f"left out: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if not any_found:
        raise DataError("none of the files could be read.")


def refuse_page(run: Path) -> None:
    """Say before a long evaluation that there will be no page of its cases."""
    from selectra.classifier.left_behind import kind_of  # noqa: PLC0415

    kind = kind_of(run)
    if kind not in ("segmentation", "detection", "video"):
        raise ConfigError(
            f"--page shows cases of segmentation, detection and clips, and '{run}' holds a training of kind '{kind}'."
        )


def write_cases(run: Path, part: str, metrics: dict[str, float], console: Console) -> None:
    """Write PART_cases.html into the folder of a training; by the first process alone."""
    from selectra.classifier.cases import cases_of  # noqa: PLC0415
    from selectra.classifier.clip_cases import clip_cases_of  # noqa: PLC0415
    from selectra.classifier.left_behind import kind_of  # noqa: PLC0415
    from selectra.classifier.object_cases import object_cases_of  # noqa: PLC0415
    from selectra.report import cases, clip_cases, object_cases  # noqa: PLC0415

    if os.environ.get("RANK", "0") != "0":
        return
    path, kind = run / f"{part}_cases.html", kind_of(run)
    if kind == "video":
        clip_cases.write_page(clip_cases_of(run, part), path)
    elif kind == "detection":
        object_cases.write_page(object_cases_of(run, part, metrics), path)
    else:
        cases.write_page(cases_of(run, part, metrics), path)
    console.print(f"The best and worst cases of each class: {path}", highlight=False, markup=False, soft_wrap=True)


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
