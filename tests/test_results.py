"""The committed page of results is the one that its records give."""

from pathlib import Path

from selectra.report.forecasting import page, read_records

ROOT = Path(__file__).parents[1]


def test_the_forecasting_page_is_made_from_its_records() -> None:
    (records,) = (ROOT / "results").glob("forecasting_*.json")
    shown = (ROOT / "docs" / "results" / "forecasting.md").read_text(encoding="utf-8")
    assert shown == page(read_records(records), records.name)
