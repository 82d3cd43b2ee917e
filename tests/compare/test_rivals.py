"""Whom Mamba is set against: models of other sorts, all of them, and never another Mamba."""

import json
from pathlib import Path
from typing import Any

import pytest

from selectra.compare.answer import collect
from selectra.compare.results import write_results
from selectra.compare.study import Variant
from selectra.report.study import page, read_study
from selectra.spec import Spec
from tests.compare.studies import VARIANTS, finished

# One that learns by gradient, and one that is solved: no seed changes it.
RIVALS = {"dlinear", "linear"}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    other = Variant(name="other", model=Spec("tsm2_smoke", patch_len=6, stride=3), kind="mamba")
    store = finished(tmp_path_factory.mktemp("rivals"), variants=(*VARIANTS, other), lengths=(12, 20), tuning=None)
    write_results(store, store.with_suffix(".json"))
    return store.with_suffix(".json")


@pytest.fixture(scope="module")
def content(records: Path) -> dict[str, Any]:
    return read_study(records)


@pytest.mark.parametrize("part", ["overall", "by_base", "costs"])
def test_another_mamba_is_no_rival(content: dict[str, Any], part: str) -> None:
    assert content["subject"] in ("tsm2", "other")
    assert {row["rival"] for row in content[part]} == RIVALS


def test_another_mamba_neither_wins_nor_loses_in_words(content: dict[str, Any]) -> None:
    (brother,) = {"tsm2", "other"} - {content["subject"]}
    assert brother not in content["verdict"]["text"]
    assert {row["rival"] for row in content["curves"]["crossings"]} == RIVALS
    # It has its row in the table, and is said to be of the same sort.
    shown = page(content)
    assert f"<td>{brother}</td>" in shown
    assert f"{content['subject']}, the best on validation of tsm2, other, stands for mamba" in shown


def test_every_mamba_is_set_against_what_no_seed_changes(records: Path) -> None:
    folder = records.parent / "alone"
    folder.mkdir(exist_ok=True)
    (folder / "study.json").write_text(json.dumps(read_study(records)), encoding="utf-8")
    claims = [claim["text"] for claim in collect(folder)["claims"]]
    for mamba in ("tsm2", "other"):
        for rival in RIVALS:
            assert any(f"{mamba} against {rival}" in text for text in claims), (mamba, rival)
