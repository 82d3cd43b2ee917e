"""One page that can be sent on: everything is in the file."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from selectra.report.plots import PICTURE, chosen_series, png, series_figure, step_figure
from selectra.report.read import Result, read_result, whole
from selectra.report.tables import columns_of, cutoff_row, losses, number, ranges, shown_row, verdict

MAX_LOSSES = 20


def page(result: Result, picture: bytes) -> str:
    """The page as HTML, around the PNG file of the forecast."""
    pictures = {"forecast": picture, "by_step": png(step_figure(result)), "by_series": png(series_figure(result))}
    environment = Environment(
        loader=PackageLoader("selectra", "report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    main = result.models[0]
    ordered = sorted(result.metrics, key=lambda row: row["mse"])
    lost = losses(result.errors, main)
    return environment.get_template("page.html.jinja").render(
        run=result.run,
        job=result.run["job"],
        data=result.run["data"],
        main=main,
        best=result.best,
        columns=columns_of(ordered),
        rows=[(row["model"], shown_row(row, columns_of(ordered))) for row in ordered],
        levels=[f"{level:g}" for level in result.levels],
        crossed=[cutoff_row(row, result.levels) for row in ordered if "cv" in row],
        verdict=verdict(result.metrics),
        lost=lost,
        lost_series=[
            (name, rival, number(own), number(value)) for name, rival, own, value in lost["series"][:MAX_LOSSES]
        ],
        lost_steps=ranges(lost["steps"]),
        n_panels=len(chosen_series(result.series)),
        n_series=len(result.series),
        pictures={name: b64encode(content).decode() for name, content in pictures.items()},
    )


def write_page(out: Path) -> None:
    """Write `report.html` from the other files of the folder, `forecast.png` included."""
    text = page(read_result(out), (out / PICTURE).read_bytes())
    with whole(out / "report.html") as partial:
        partial.write_text(text, encoding="utf-8")
