"""The picture of the answer: what it draws are the rows that it is given, and nothing is lost on the way."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from selectra.report.answer_plot import LOOKS, figure, write_picture

PANELS = {"forecasting": 5, "images": 2, "language": 1}


def rows(panels: dict[str, int]) -> list[dict[str, Any]]:
    """Points whose panels are mixed, every value its own."""
    found = [
        {"panel": panel, "mamba": f"{panel} mamba", "rival": f"rival {i}", "value": 1.5 * i - 2, "low": 1.5 * i - 3.25,
         "high": 1.5 * i - 0.5, "outcome": tuple(LOOKS)[i % len(LOOKS)]}
        for panel, count in panels.items() for i in range(count)
    ]  # fmt: skip
    return found[::2] + found[1::2]


def floats(axis: Any) -> list[float]:
    return [float(value) for value in axis]


def drawn_rows(drawn: Figure) -> list[dict[str, Any]]:
    """What stands in a picture, by the looks of every point."""
    by_look = {(to_hex(color), marker): outcome for outcome, (color, marker, _) in LOOKS.items()}
    found = []
    for sub in drawn.subfigs:
        for ax in sub.axes:
            names = {
                round(tick): label.get_text() for tick, label in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
            }
            lines = [line for line in ax.lines if line.get_color() in {color for color, *_ in LOOKS.values()}]
            for bar, point in zip(lines[::2], lines[1::2], strict=True):
                (value,), (place,) = (floats(axis) for axis in point.get_data())
                assert floats(bar.get_ydata()) == [place, place] and bar.get_color() == point.get_color()
                mamba, _, rival = names[round(place)].partition(" against ")
                low, high = floats(bar.get_xdata())
                outcome = by_look[to_hex(point.get_color()), str(point.get_marker())]
                found.append({"panel": ax.get_title(loc="left"), "mamba": mamba, "rival": rival, "value": value,
                              "low": low, "high": high, "outcome": outcome})  # fmt: skip
    return found


def ordered(points: list[dict[str, Any]]) -> list[list[tuple[str, Any]]]:
    return sorted(sorted(each.items()) for each in points)


@pytest.mark.parametrize("panels", [PANELS, {"images": 1}, {"images": 3, "language": 3}])
def test_every_point_is_drawn_once_with_its_interval_and_its_outcome(panels: dict[str, int]) -> None:
    given = rows(panels)
    drawn = figure(given)
    assert ordered(drawn_rows(drawn)) == ordered(given)
    for sub in drawn.subfigs:
        for ax in sub.axes:
            # The line of no difference, and the first point of the list at the top.
            assert any(floats(line.get_xdata()) == [0, 0] for line in ax.lines)
            bottom, top = ax.get_ylim()
            assert bottom > top
    said = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
    assert said == [words for *_, words in LOOKS.values()]


def test_columns_are_of_like_height() -> None:
    drawn = figure(rows({"a": 9, "b": 4, "c": 4, "d": 1}))
    columns = [[ax.get_title(loc="left") for ax in sub.axes] for sub in drawn.subfigs]
    assert columns == [["a", "d"], ["b", "c"]]
    heights = [drawn.get_size_inches()[1], figure(rows({"a": 18, "b": 4})).get_size_inches()[1]]
    assert heights[1] > heights[0]
    # A picture's settings are its own.
    assert mpl.rcParams["figure.facecolor"] == mpl.rcParamsDefault["figure.facecolor"]


def test_an_outcome_without_looks_is_an_error() -> None:
    given = [{**rows({"a": 1})[0], "outcome": "unknown"}]
    with pytest.raises(KeyError, match="unknown"):
        figure(given)


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    out = tmp_path / "answer.png"
    write_picture(rows(PANELS), out)
    assert out.read_bytes().startswith(b"\x89PNG") and [path.name for path in tmp_path.iterdir()] == ["answer.png"]
    before = out.read_bytes()
    with pytest.raises(KeyError):
        write_picture([{"panel": "a"}], out)
    assert out.read_bytes() == before


def test_long_titles_of_panels_stay_in_the_picture() -> None:
    given = rows({"copies of 16, 32 and 64 letters of an alphabet, 0.42 M parameters, accuracy": 8, "other": 8})
    drawn = figure([{**row, "mamba": "mamba"} for row in given])
    drawn.draw_without_rendering()
    for sub in drawn.subfigs:
        for ax in sub.axes:
            titles = [text for text in ax.get_children() if isinstance(text, Text) and text.get_text()]
            assert titles and all(text.get_window_extent().x1 <= sub.bbox.x1 for text in titles)
