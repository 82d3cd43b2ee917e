"""What `selectra predict` and `selectra explain` do with their options, and what they print."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from selectra.classifier.clips import ClipModel
from selectra.classifier.predicting import Prediction
from selectra.classifier.trained import Trained, from_run, from_weights
from selectra.errors import ConfigError
from selectra.report.explanation import Explanation

BAR = 24


def trained_from(
    run: Path | None, model: str | None, weights: Path | None, classes: Path | None, img_size: int | None
) -> Trained:
    """The model of a run, or of a weights file.

    Raises:
        ConfigError: Neither is named, or both.
        DataError: What is named cannot be read.
    """
    if run is not None:
        extra = {"--model": model, "--weights": weights, "--classes": classes, "--img-size": img_size}
        given = [option for option, value in extra.items() if value is not None]
        if given:
            raise ConfigError(f"--run says model, weights, classes and size itself; leave {' and '.join(given)} out.")
        return from_run(run)
    if model is None or weights is None:
        raise ConfigError("name a trained model: --run FOLDER (of `selectra train`), or --model NAME --weights FILE.")
    return from_weights(model, weights, classes, img_size)


def predictions_table(trained: Trained | ClipModel, found: Sequence[Prediction], what: str = "image") -> Table:
    """The classes of every image or video, likeliest first."""
    table = Table(title=f"{trained.name}, {len(trained.classes)} classes", title_justify="left")
    table.add_column(what, overflow="fold")
    table.add_column("", justify="right")
    table.add_column("class", overflow="fold")
    table.add_column("probability", justify="right")
    table.add_column("", no_wrap=True)
    for each in found:
        for i, (name, value) in enumerate(zip(each.classes, each.probabilities, strict=True)):
            last = i == len(each.classes) - 1
            bar = "█" * round(BAR * value)
            table.add_row("" if i else str(each.path), str(i + 1), name, f"{value:.1%}", bar, end_section=last)
    return table


def said(found: Explanation) -> list[str]:
    """The picture's main points in words."""
    lines = [f"{found.file}: “{found.target}” with {found.probability:.1%}."]
    areas = " and ".join(f"{share:.0%} in {area:.0%} of the image" for share, area in found.field.areas.items())
    lines.append(f"Of what moves the feature in the middle, {areas} lies.")
    if found.routes is None:
        lines.append("The model's layers do not scan in several directions; there is nothing to compare.")
    else:
        left = ", ".join(
            f"{name} {value:.1%}" for name, value in zip(found.routes.names, found.routes.left, strict=True)
        )
        lines.append(f"The class's probability without one scan direction: {left}.")
    return lines
