"""The committed pages of results are those that their records give."""

import json
import re
from pathlib import Path

import pytest

from selectra.choices import Sort
from selectra.compare.answer import QUESTIONS, _question, collect
from selectra.errors import DataError
from selectra.report import answer
from selectra.report.forecasting import page, read_records
from selectra.runs import registries

ROOT = Path(__file__).parents[1]


def test_the_forecasting_page_is_made_from_its_records() -> None:
    (records,) = (ROOT / "results").glob("forecasting_*.json")
    shown = (ROOT / "docs" / "results" / "forecasting.md").read_text(encoding="utf-8")
    assert shown == page(read_records(records), records.name)


def test_the_answer_is_made_from_the_records() -> None:
    content = collect(ROOT / "results")
    shown = (ROOT / "docs" / "answer.md").read_text(encoding="utf-8")
    assert shown == answer.page(content, "../results"), "run: selectra report results --out docs/answer.md"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert content["verdict"] in readme and answer.table(content) in readme


def test_every_claim_of_the_answer_leads_to_a_record() -> None:
    shown = (ROOT / "docs" / "answer.md").read_text(encoding="utf-8")
    claims = [line for line in shown.splitlines() if line.startswith("- ") and "no record yet" not in line]
    assert claims and all("](../results/" in line for line in claims)
    for target in re.findall(r"\]\(\.\./(results/[^)]+)\)", shown):
        assert (ROOT / target).is_file()


def test_every_built_in_study_is_a_question_or_answers_one() -> None:
    for name in registries()[Sort.studies].names():
        assert _question(name) in QUESTIONS, name
    assert [_question(name) for name in ("selection_other", "vision_photos")] == ["selection_other", "images"]


@pytest.mark.parametrize(
    ("name", "answered"),
    [("language_shakespeare", "language"), ("language_my_text", "language"), ("language_recall", "language_recall")],
)
def test_a_record_answers_its_own_question_alone(name: str, answered: str, tmp_path: Path) -> None:
    record = json.loads((ROOT / "results" / "language_shakespeare_nvidia_h200_2026-11-22.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**record, "name": name}))
    content = collect(tmp_path)
    missing = {each["question"] for each in content["missing"]}
    assert missing == {question for key, (question, _) in QUESTIONS.items() if key != answered}
    claims = {claim["text"].partition(",")[0]: claim for claim in content["claims"]}
    against_gpt = claims["Tiny Shakespeare: hybrid against gpt"]
    assert against_gpt["outcome"] == "level"
    # Another Mamba is no rival: four are left, for each of the two.
    assert "p 0.109 after Holm's correction for 8 comparisons, so not told from chance" in against_gpt["text"]
    assert "uncorrected: p 0.017)" in against_gpt["text"]
    assert "uncorrected" not in claims["Tiny Shakespeare: hybrid against rwkv"]["text"]


def test_an_answer_without_records_says_so(tmp_path: Path) -> None:
    content = collect(tmp_path)
    assert content["verdict"] == "No record yet."
    assert answer.page(content, "results").count("no record yet;") == len(content["missing"]) == len(QUESTIONS)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a record"):
        collect(tmp_path)


def test_a_mamba_that_is_not_the_best_of_its_study_is_said_to_lose() -> None:
    texts = {each["text"].partition(",")[0]: each["outcome"] for each in collect(ROOT / "results")["claims"]}
    assert texts["recall of 8 pairs: mamba against gpt"] == "loses"
    assert texts["recall of 8 pairs: hybrid against rwkv"] == "wins"
    assert "recall of 8 pairs: hybrid against mamba" not in texts
    lines = {(each["what"], each["mamba"]): each for each in collect(ROOT / "results")["table"]}
    assert lines["Recall of 8 pairs", "mamba"]["loses"] == ["gpt"]
    assert lines["Recall of 8 pairs", "hybrid"]["wins"] == ["rwkv", "retnet", "hyena"]
    # Two Mamba models against four rivals are corrected together.
    recall = [each["text"] for each in collect(ROOT / "results")["claims"] if each["text"].startswith("recall")]
    assert len(recall) == 8
    assert all("Holm's correction for 8 comparisons" in text for text in recall)


@pytest.mark.parametrize(
    ("outcomes", "verdict"),
    [
        (("wins",), "Yes, so far."),
        (("wins", "level"), "Better than some models and worse than none, so far."),
        (("wins", "loses", "level"), "It depends."),
        (("level",), "No gain that can be shown."),
    ],
)
def test_a_win_over_some_is_no_yes(
    outcomes: tuple[str, ...], verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(found: dict[str, list[dict[str, str]]], records: object) -> None:
        found["claims"] = [{"outcome": each} for each in outcomes]

    monkeypatch.setattr("selectra.compare.answer._studies", said)
    assert collect(tmp_path)["verdict"] == verdict
