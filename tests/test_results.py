"""The committed pages of results are those that their records give."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from selectra.choices import Sort
from selectra.compare.answer import QUESTIONS, _question, collect, together
from selectra.compare.results import concluded
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
    claims = by_pair(content)
    against_gpt = claims["Tiny Shakespeare, 11 M parameters: hybrid against gpt"]
    assert against_gpt["outcome"] == "level"
    # Another Mamba is no rival: four are left, for each of the two.
    assert "p 0.109 after Holm's correction for 8 comparisons, so not told from chance" in against_gpt["text"]
    assert "uncorrected: p 0.017)" in against_gpt["text"]
    assert "uncorrected" not in claims["Tiny Shakespeare, 11 M parameters: hybrid against rwkv"]["text"]


def test_an_answer_without_records_says_so(tmp_path: Path) -> None:
    content = collect(tmp_path)
    assert content["verdict"] == "No record yet."
    assert answer.page(content, "results").count("no record yet;") == len(content["missing"]) == len(QUESTIONS)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as a record"):
        collect(tmp_path)


def interrupted(path: str, gone: set[tuple[str, str]], reason: str | None = None) -> dict[str, Any]:
    """A committed record as its store would have given it before some models' (variant, seed) were trained.

    Args:
        reason: Why these failed, where they were tried.
    """
    record = json.loads((ROOT / "results" / path).read_text(encoding="utf-8"))
    cells = record["cells"]
    for row in record["rows"]:
        mine = [seed for variant, seed in sorted(gone) if variant == row["variant"]]
        row["values"] = {seed: value for seed, value in row["values"].items() if seed not in mine}
        row["missing"] = [int(seed) for seed in mine]
        row["reasons"] = [reason] if reason and mine else []
    kept = [cell for cell in cells if (cell["variant"], str(cell["seed"])) not in gone]
    failed = [{key: cell[key] for key in ("base", "variant", "seed")} | {"reason": reason}
              for cell in cells if (cell["variant"], str(cell["seed"])) in gone]  # fmt: skip
    return concluded({**record, "cells": [*kept, *(failed if reason else [])]})


def answered(folder: Path, *records: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What a folder of these records says, and its page."""
    for number, record in enumerate(records):
        (folder / f"{number}.json").write_text(json.dumps(record), encoding="utf-8")
    content = collect(folder)
    return content, answer.page(content, "results")


LANGUAGE = "language_shakespeare_nvidia_h200_2026-11-22.json"


def test_a_study_that_is_not_finished_answers_nothing_yet(tmp_path: Path) -> None:
    """It is said how far it is, and what is claimed rests on models that have all of their trainings."""
    content, page_ = answered(tmp_path, interrupted(LANGUAGE, {("gpt", "1"), ("gpt", "2"), ("mamba", "2")}))
    title, command = QUESTIONS["language"]
    ran = json.loads((ROOT / "results" / LANGUAGE).read_text())["command"]
    line = f"- {title}: 15 of 18 trainings ([record](results/0.json)); gone on with by `{ran}` with the same store"
    assert f"## What is not finished yet\n\n{line}\n" in page_
    assert f"- {title}: no record yet; made by `{command}`" not in page_
    claims = by_pair(content)
    what = "Tiny Shakespeare, 11 M parameters, unfinished, 15 of 18 trainings"
    assert {text.removeprefix(f"{what}: ") for text in claims} == {
        "hybrid against rwkv", "hybrid against retnet", "hybrid against hyena"}  # fmt: skip
    # No Mamba has all of its trainings: nothing is claimed.
    content, page_ = answered(tmp_path, interrupted(LANGUAGE, {("hybrid", "2"), ("mamba", "0")}))
    assert (content["claims"], content["verdict"]) == ([], "No record yet.")
    assert f"- {title}: 16 of 18 trainings" in page_


def test_a_model_that_lacks_one_of_many_trainings_is_left_out(tmp_path: Path) -> None:
    """Also where those that it has would be enough for an interval: what is lacking is not lacking by chance."""
    record = json.loads((ROOT / "results" / LANGUAGE).read_text(encoding="utf-8"))
    record["seeds"] = record["study"]["seeds"] = 4
    for row in record["rows"]:
        row["values"]["3"] = 1.001 * row["values"]["2"]
    (mine,) = [row for row in record["rows"] if row["variant"] == "mamba"]
    del mine["values"]["3"]
    mine["missing"] = [3]
    content, _ = answered(tmp_path, concluded(record))
    assert content["claims"] and {each["mamba"] for each in content["table"]} == {"hybrid"}


def test_a_finished_record_answers_beside_an_unfinished_one(tmp_path: Path) -> None:
    whole = json.loads((ROOT / "results" / LANGUAGE).read_text(encoding="utf-8"))
    content, page_ = answered(tmp_path, whole, interrupted(LANGUAGE, {("gpt", "1")}))
    title = QUESTIONS["language"][0]
    assert f"- {title}: 17 of 18 trainings" in page_ and f"- {title}: no record yet" not in page_
    assert "Tiny Shakespeare, 11 M parameters: hybrid against gpt" in by_pair(content)


def test_trainings_that_failed_have_ended(tmp_path: Path) -> None:
    gone = {("gpt", "1"), ("mamba", "2")}
    content, page_ = answered(tmp_path, interrupted(LANGUAGE, gone, reason="diverged"))
    assert "not finished yet" not in page_ and QUESTIONS["language"][0] not in page_
    assert {text.split(": ")[1] for text in by_pair(content)} == {
        "hybrid against rwkv", "hybrid against retnet", "hybrid against hyena"}  # fmt: skip


def test_an_unfinished_study_of_parts_says_how_far_it_is(tmp_path: Path) -> None:
    path = "study_selection_nvidia_h200_2026-11-23.json"
    _, page_ = answered(tmp_path, interrupted(path, {("both", "1"), ("without channels", "2")}))
    title, command = QUESTIONS["selection"]
    assert f"- {title}: 10 of 12 trainings ([record](results/0.json)); gone on with by `{command}`" in page_
    assert "**No verdict yet: 2 of 4 results are missing.** 10 of 12 scored trainings ([record]" in page_


def by_pair(content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Claims by the data and the two models."""
    return {re.sub(r"(against \w+),.*", r"\1", claim["text"]): claim for claim in content["claims"]}


def test_a_mamba_that_is_not_the_best_of_its_study_is_said_to_lose() -> None:
    content = collect(ROOT / "results")
    claims, small = by_pair(content), "recall of 8 pairs, 0.044 M parameters"
    assert claims[f"{small}: mamba against gpt"]["outcome"] == "loses"
    assert claims[f"{small}: hybrid against rwkv"]["outcome"] == "wins"
    assert f"{small}: hybrid against mamba" not in claims
    lines = {(each["what"].lower(), each["mamba"]): each for each in content["table"]}
    assert lines[small.lower(), "mamba"]["loses"] == ["gpt"]
    assert lines[small.lower(), "hybrid"]["wins"] == ["rwkv", "retnet", "hyena"]
    counts = [sum(len(line[key]) for line in content["table"]) for key in ("wins", "loses", "level")]
    said = f"Mamba wins {counts[0]}, loses {counts[1]}, and is not told apart in {counts[2]}"
    assert f"of {sum(counts)} comparisons of a Mamba model with a rival {said}" in content["verdict"]
    # Two Mamba models against four rivals are corrected together; a study of other sizes is another.
    recall = [text for text in claims if text.startswith("recall")]
    assert len(recall) == 16
    assert all("Holm's correction for 8 comparisons" in claims[text]["text"] for text in recall)


STUDIES = [path.name for path in sorted((ROOT / "results").glob("*.json"))
           if path.read_text("utf-8").find('"what": "selectra study"') >= 0]  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_what_a_study_concludes_follows_from_its_rows(name: str) -> None:
    record = json.loads((ROOT / "results" / name).read_text("utf-8"))
    found = json.loads(json.dumps(concluded(record)))
    for part in ("subject", "overall", "by_base", "costs", "verdict"):
        assert alike(found[part], record[part]), part
    # Another score of a single seed would be seen.
    values = next(row for row in record["rows"] if row["variant"] == record["subject"])["values"]
    values[next(iter(values))] *= 1.01
    assert not alike(concluded(record)["overall"], found["overall"])


def alike(found: Any, wanted: Any) -> bool:
    """Whether all words are equal and all numbers are to rounding."""
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(alike(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(alike, found, wanted))
    if isinstance(wanted, float):
        return found == pytest.approx(wanted, rel=1e-6, abs=1e-12)
    return found == wanted


def test_data_that_differ_in_one_word_are_named_together() -> None:
    assert together(["recall of 8 pairs", "recall of 16 pairs", "recall of 32 pairs"]) == "recall of 8, 16 and 32 pairs"
    assert together(["weather 24", "weather 96"]) == "weather 24 and 96"
    assert (
        together(["ETTh1"]) == "ETTh1" and together(["a b", "c d"]) == "a b, c d" and together(["a", "b c"]) == "a, b c"
    )


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
