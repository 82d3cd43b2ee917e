"""Cost curves: counters of energy, sampling, records that are gone on with, crossovers, and the page."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from selectra.cli import main
from selectra.compare import curve_kinds
from selectra.compare.curve_command import compare_costs
from selectra.compare.curves import Wish, crossings
from selectra.compare.energy import Counter, Power, counter_of, rapl
from selectra.compare.match import match_even
from selectra.compare.sampling import sample
from selectra.errors import ConfigError, DataError
from selectra.report import costs
from selectra.spec import Spec

CPU = torch.device("cpu")
NONE = Counter("nothing counts here", None)
FACTS = {"seq_len": 48, "horizon": 8, "n_series": 3}


def zone(folder: Path, number: int, name: str, joules: float) -> Path:
    made = folder / f"intel-rapl:{number}"
    made.mkdir()
    (made / "name").write_text(name + "\n")
    (made / "max_energy_range_uj").write_text("1000000000\n")
    (made / "energy_uj").write_text(f"{int(1e6 * joules)}\n")
    return made / "energy_uj"


def test_rapl_adds_packages_and_memory_and_goes_on_over_its_range(tmp_path: Path) -> None:
    first = zone(tmp_path, 0, "package-0", 990.0)
    zone(tmp_path, 1, "dram", 5.0)
    zone(tmp_path, 2, "psys", 7000.0)
    counter = rapl(tmp_path)
    assert counter.read is not None and counter.source == "RAPL: package-0, dram, the whole machine"
    before = counter.read()
    first.write_text("15000000\n")
    assert counter.read() - before == pytest.approx(25.0)


def test_what_cannot_count_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rapl(tmp_path).source == f"energy is left out: no RAPL counters in {tmp_path}"
    path = zone(tmp_path, 0, "package-0", 1.0)

    def refused(self: Path, *_: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError
        return "package-0" if self.name == "name" else "1000"

    monkeypatch.setattr(Path, "read_text", refused)
    assert rapl(tmp_path).source == f"energy is left out: {path} is readable by the administrator alone"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pip install 'selectra[compare]'" in counter_of(torch.device("cuda")).source


def test_power_is_found_although_the_counter_moves_in_steps() -> None:
    """100 W, told every 20 ms."""
    start = time.perf_counter()
    counter = Counter("steps", lambda: 2.0 * int((time.perf_counter() - start) / 0.02))
    with Power(counter) as power:
        time.sleep(0.4)
    # Both ends may be a step of 2 J behind the clock; how long was seen is up to what else the machine does.
    assert power.covered > 0.1
    assert power.watts == pytest.approx(100, rel=0.25)
    with Power(Counter("still", lambda: 1.0)) as power:
        time.sleep(0.02)
    assert power.watts is None


def test_a_sample_is_the_time_of_one_call() -> None:
    spent: list[float] = []

    def call() -> None:
        began = time.perf_counter()
        time.sleep(0.01)
        spent.append(1e3 * (time.perf_counter() - began))

    found = sample(call, CPU, 0.1, NONE)
    # Sleeps are as long as the machine makes them: the median is one of a single call.
    assert found.lower <= found.ms <= found.upper and 9 < found.ms <= max(spent) + 5
    assert found.calls == len(spent) - 2 and found.joules is None and found.watts is None


def test_the_most_even_width_within_the_tolerance() -> None:
    spec, got = match_even(Spec("itransformer", n_heads=1), FACTS, 300_000)
    assert abs(got / 300_000 - 1) <= 0.02
    others = [match_even(spec.replace(d_model=d), FACTS, got)[0] for d in (spec.args["d_model"],)]
    assert others == [spec] and spec.args["d_model"] % 4 == 0
    with pytest.raises(ConfigError, match=r"no mamba_lm\.d_model brings mamba_lm within 2 %"):
        match_even(Spec("mamba_lm", mixer="mamba2", d_model=64, depth=2), {"vocab_size": 16}, 1000)


def run(path: Path, **changes: Any) -> dict[str, Any]:
    wish = Wish(**{"kinds": ("series",), "models": ("tsm2", "gru"), "params": 20e3, "points": (24, 36),
                   "seconds": 0.0} | changes)  # fmt: skip
    return compare_costs(wish, path, "cpu", None, Console(quiet=True))


def test_a_record_is_gone_on_with_and_becomes_a_page(tmp_path: Path) -> None:
    path = tmp_path / "costs.json"
    first = run(path, points=(24,))
    rows = first["kinds"]["series"]["rows"]
    assert {(row["model"], row["mode"], row["point"]) for row in rows} == {
        (model, mode, 24) for model in ("tsm2", "gru") for mode in ("forward", "step")
    }
    second = run(path)
    assert second["kinds"]["series"]["rows"][: len(rows)] == rows
    assert len(second["kinds"]["series"]["rows"]) == 2 * len(rows)
    for row in second["kinds"]["series"]["rows"]:
        assert row["ms"] > 0 and row["unit_us"] == pytest.approx(1e3 * row["ms"] / row["units"])
        assert abs(row["parameters"] / 20e3 - 1) <= 0.02
    settings = second["settings"]
    assert {"tf32", "compiled", "layout", "optimizer", "threads"} <= settings.keys()
    content = costs.read_costs(path)
    page, text = costs.page(content), costs.markdown(content)
    assert "http://" not in page.replace("http://www.w3.org", "") and "energy is left out" in page
    for row in content["kinds"]["series"]["rows"]:
        assert f"{row['parameters']:,}" in text
    made = costs.write_reports(content, tmp_path / "costs")
    assert [each.suffix for each in made] == [".html", ".md", ".csv", ".png"]
    assert len((tmp_path / "costs.csv").read_text().splitlines()) == 1 + len(content["kinds"]["series"]["rows"])
    with pytest.raises(ConfigError, match="the record's series models have 20,000 parameters"):
        run(path, params=30e3)
    with pytest.raises(ConfigError, match="there is no cost curve of 'tsm3'"):
        run(path, models=("tsm3",))


def test_language_is_generated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"gpt": Spec("gpt", d_model=96, depth=1, n_heads=1), "mamba": Spec("mamba_lm", d_model=96, depth=2)}
    language = dataclasses.replace(
        curve_kinds.LANGUAGE, models=small, subjects=("mamba",), batch=lambda length: 32, params=(16e4, 16e4)
    )  # fmt: skip
    monkeypatch.setattr("selectra.compare.curves.KINDS", {"language": language})
    record = run(tmp_path / "costs.json", kinds=("language",), models=(), points=(20,), params=16e4)
    rows = record["kinds"]["language"]["rows"]
    assert [row.get("reason") for row in rows] == [None] * 6
    decoded = {row["model"]: row for row in rows if row["mode"] == "decode"}
    assert decoded["gpt"]["units"] == 16 * 16 and decoded["gpt"]["memory_mb"] > 0
    assert {each["quantity"] for each in record["kinds"]["language"]["crossings"]} == {"unit_us", "memory_mb"}


def kind(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any]:
    rows = [
        {"model": name, "mode": "step", "point": point, "unit_us": value, "unit_mj": None, "memory_mb": 1.0}
        for name, curve in (("mamba", ours), ("gpt", theirs)) for point, value in curve.items()
    ]  # fmt: skip
    return {"rows": rows, "subjects": ["mamba"], "axis": "tokens", "question": "Q", "unit": "token"}


@pytest.mark.parametrize(
    ("ours", "theirs", "point", "words"),
    [
        ({100: 2.0, 400: 2.0}, {100: 1.0, 400: 4.0}, 200.0, "below gpt from about 200 on"),
        ({100: 2.0, 400: 2.0}, {100: 3.0, 400: 4.0}, 100.0, "below gpt from the smallest, 100, on"),
        ({100: 2.0, 400: 5.0}, {100: 3.0, 400: 4.0}, None, "never below gpt, up to 400"),
    ],
)
def test_crossovers(ours: dict[int, float], theirs: dict[int, float], point: float | None, words: str) -> None:
    made = kind(ours, theirs)
    (found,) = [each for each in crossings(made) if each["quantity"] == "unit_us"]
    assert found["point"] == (None if point is None else pytest.approx(point))
    assert costs.said(made, found) == words
    verdict = costs.verdict({"kinds": {"language": {**made, "crossings": [found]}}})
    # Whoever reads the beginning alone is not told the contrary.
    where = "nowhere is mamba faster than gpt: training step never, up to 400" if point is None else (
        f"where is mamba faster than gpt: training step {words.removeprefix('below gpt ')}")  # fmt: skip
    assert verdict == f"Q: {where}."


def test_a_table_that_lies_where_the_page_s_would_is_seen_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.csv").write_text("date,value\n")
    with pytest.raises(SystemExit) as ended:
        main(["compare", "costs", "series", "--store", str(tmp_path / "mine.json"), "--device", "cpu"])
    assert ended.value.code == 2 and "is there, is no report of this kind" in capsys.readouterr().err
    assert (tmp_path / "mine.csv").read_text() == "date,value\n" and not (tmp_path / "mine.json").exists()


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"what": "selectra study"}))
    for read in (costs.read_costs, run):
        with pytest.raises(DataError, match="holds no cost curves"):
            read(path)
    path.write_text(json.dumps({"what": costs.WHAT, "format": 99}))
    with pytest.raises(DataError, match="has version 99"):
        costs.read_costs(path)
    path.write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        costs.read_costs(path)


def test_some_points_are_no_powers_of_two() -> None:
    for curves in curve_kinds.KINDS.values():
        for points in curves.points:
            assert any(point & (point - 1) for point in points)
