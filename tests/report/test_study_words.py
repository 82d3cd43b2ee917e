"""What the page of a study says of draws, of shares and of the data."""

from pathlib import Path
from typing import Any

import pytest

from selectra.compare.results import write_results
from selectra.report.study import data_lines, markdown, page, read_study, reading, summary
from selectra.report.study_claims import claims
from tests.compare.studies import finished


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    store: Path = finished(tmp_path_factory.mktemp("study"))
    write_results(store, store.with_suffix(".json"))
    return read_study(store.with_suffix(".json"))


@pytest.mark.parametrize(("high", "p", "said"), [(-2.4, 0.03, True), (0.5, 0.2, False), (-0.1, 0.06, False)])
def test_a_draw_whose_interval_leaves_zero_out_says_why(
    content: dict[str, Any], high: float, p: float, said: bool
) -> None:
    row = {**content["by_base"][0], "outcome": "level", "low": -18.9, "high": high, "difference": -10.3, "p": p,
           "p_adjusted": 0.089, "resolution": 7.75, "unit": "%"}  # fmt: skip
    text = claims({**content, "by_base": [row]}, "level")[0].text
    assert "p 0.089 after correction); these seeds could have shown 7.75 %" in text
    why = " alone: the interval, which leaves zero out, and its p 0.030 are not corrected"
    assert text.endswith(f"7.75 %{why if said else ''}")


def test_the_interval_of_a_share_ends_where_shares_do(content: dict[str, Any]) -> None:
    def changed(values: dict[str, float], between: tuple[float, float], higher: bool) -> dict[str, Any]:
        row = {**content["rows"][0], "values": values, "interval": between}
        return {**content, "rows": [row], "higher_is_better": higher}

    wide = changed({"0": 0.04, "1": 0.96, "2": 0.9}, (-0.7, 1.9), True)
    assert summary(wide, wide["rows"][0]["base"])[1][0][4] == "0.0000 to 1.0000"
    inside = changed({"0": 0.6, "1": 0.7, "2": 0.8}, (0.45, 0.95), True)
    assert summary(inside, inside["rows"][0]["base"])[1][0][4] == "0.4500 to 0.9500"
    # What is no share keeps Student's own: an error, and a score beyond one.
    for values, higher in (({"0": 0.04, "1": 0.96}, False), ({"0": 0.04, "1": 1.5}, True)):
        other = changed(values, (-0.7, 1.9), higher)
        assert summary(other, other["rows"][0]["base"])[1][0][4] == "-0.7000 to 1.9000"
    assert "ends at 0 and 1" in " ".join(reading(content))


def test_what_the_data_are_is_said(content: dict[str, Any]) -> None:
    (lines,) = content["summaries"].values()
    assert any("300 rows" in line for line in lines)
    for text in (markdown(content), page(content)):
        assert "The data" in text and "waves: 300 rows, 2024-01-01 00:00" in text
    (line,) = data_lines(content)
    assert "; train 210 rows 2024-01-01" in line
    # Records of before they were kept.
    older = {name: value for name, value in content.items() if name != "summaries"}
    assert "The data" not in markdown(older) and "<h2>The data" not in page(older)
