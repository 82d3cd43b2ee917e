"""The report of a study: numbers as the records, words as the outcomes, and a page that a browser shows in peace."""

import copy
import csv
import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from selectra.cli import main
from selectra.compare.results import crossover, require_alike, results, write_results
from selectra.compare.store import Store
from selectra.errors import DataError
from selectra.report.study import markdown, page, read_study, reading, summary, write_reports
from selectra.report.study_claims import claims
from selectra.report.study_plots import against_cost
from tests.compare.studies import finished

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
PHONE = 390


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(tmp_path_factory.mktemp("study"), lengths=(12, 20))


@pytest.fixture(scope="module")
def content(store: Path) -> dict[str, Any]:
    write_results(store, store.with_suffix(".json"))
    return read_study(store.with_suffix(".json"))


class Reader(HTMLParser):
    """The text of a page by element, and every address on it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.exact: list[float] = []
        self.rows: list[list[str]] = []
        self.addresses: list[str] = []
        self.titles = self.ids = 0
        self.all_ids: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.all_ids += [found["id"] or ""] if "id" in found else []
        self.addresses += [found[name] or "" for name in ("src", "href", "xlink:href") if name in found]
        self.titles += tag == "title"
        if tag == "data":
            self.exact.append(float(found["value"] or "nan"))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1] and self.inside in ("td", "th", "data", "code"):
            self.rows[-1][-1] += data.strip()


def changed_costs(content: dict[str, Any], **values: tuple[float, float]) -> dict[str, Any]:
    """The same study with the costs of its models spread evenly from one value to another."""
    changed = copy.deepcopy(content)
    for name, (low, high) in values.items():
        for i, row in enumerate(changed["rows"]):
            row["cost"][name] = low + (high - low) * i / (len(changed["rows"]) - 1)
    return changed


@pytest.mark.parametrize("limits", [(92.1, 112.0), (4.4, 27.7), (0.2, 0.9), (3.0, 900.0)])
def test_a_picture_of_costs_has_numbers_on_its_axis(content: dict[str, Any], limits: tuple[float, float]) -> None:
    changed = changed_costs(content, forward_ms=limits)
    drawn = against_cost(changed, changed["rows"], 0)
    axis = drawn[drawn.index("matplotlib.axis_1") : drawn.index("matplotlib.axis_2")]
    assert 2 <= len(re.findall(r">[\d.]+</text>", axis)) <= 9


def test_large_amounts_of_memory_are_written_out(content: dict[str, Any]) -> None:
    changed = changed_costs(content, activations_mb=(2112.0, 12112.0))
    rows = summary(changed, changed["rows"][0]["base"])[1]
    assert "2,112" in [row[9] for row in rows] and not any("e+" in each for row in rows for each in row)


def test_numbers_on_the_page_are_those_of_the_records(content: dict[str, Any], store: Path) -> None:
    read = Reader(page(content))
    opened = Store(store)
    truth = [record["test"]["mse"] for _, _, record in opened.cells() if record and "test" in record]
    opened.close()
    assert read.exact == truth
    every = next(i for i, row in enumerate(read.rows) if row[:4] == ["number", "data", "model", "seed"])
    shown = read.rows[every + 1 : every + 1 + len(truth)]
    assert [row[4] for row in shown] == [f"{value:.4f}" for value in truth]
    for row in content["rows"]:
        mine = next(each for each in read.rows if each[0] == row["variant"])
        assert mine[2] == f"{row['mean']:.4f}"
        assert mine[5] == f"{row['cost']['parameters']:,}"
    for each in content["by_base"]:
        mine = next(row for row in read.rows if row[:2] == [each["base"], each["rival"]])
        assert mine[2] == f"{each['difference']:+.2f} %"
        assert mine[-1] == each["outcome"]


def test_the_page_needs_nothing_else(content: dict[str, Any]) -> None:
    text = page(content)
    read = Reader(text)
    assert all(address.startswith(("#", "data:")) for address in read.addresses)
    assert not re.search(r"<script|@import|url\((?!#)", text)
    assert len(read.all_ids) == len(set(read.all_ids))
    used = {address[1:] for address in read.addresses if address.startswith("#")}
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(read.all_ids)
    # A title for every point: seven trainings, three costs, two contrasts, two lengths of three models thrice less
    # what is solved and has neither step nor memory; and the page's own.
    n_curve = sum(row[name] > 0 for row in content["curves"]["rows"]
                  for name in ("forward_ms", "step_ms", "activations_mb"))  # fmt: skip
    assert read.titles == 7 + 3 + 2 + n_curve + 1


def test_verdict_comes_first_and_losses_are_said(content: dict[str, Any]) -> None:
    text = markdown(content)
    lines = text.splitlines()
    assert lines[2] == f"**{content['verdict']['text']}**"
    outcomes = {row["rival"]: row["outcome"] for row in content["by_base"]}
    lost = text[text.index("## Where mamba loses") : text.index("## Not told apart")]
    for rival, outcome in outcomes.items():
        assert (f"worse than {rival} on waves" in lost) == (outcome == "worse")
    assert "needs more parameters on waves" in lost
    assert len(re.findall(r"^selectra train ", text, re.M)) == 7


def test_every_claim_leads_to_its_records(content: dict[str, Any]) -> None:
    made = [{**content["by_base"][0], "rival": rival, "outcome": outcome}
            for rival, outcome in (("dlinear", "better"), ("linear", "worse"))]  # fmt: skip
    changed = {**content, "by_base": made}
    text = page(changed)
    items = re.findall(r"<li>(.*?)</li>", text[text.index('class="claims"') : text.index("<table")])
    n_claims = sum(len(claims(changed, outcome)) for outcome in ("better", "worse", "level"))
    assert len(items) == n_claims >= 3
    keys = {cell["key"]: cell for cell in content["cells"]}
    for item in items:
        places = re.findall(r'href="#([^"]+)"', item)
        assert places and all(f'<tr id="{place}"' in text for place in places), item
        cells = [keys[place.removeprefix("cell-")] for place in places if place.startswith("cell-")]
        rival = next((name for name in ("dlinear", "linear") if f"than {name} " in item), "")
        if cells:
            assert {cell["variant"] for cell in cells} == {"tsm2", rival}
            # Three seeds of each, and one of what no seed changes.
            assert len(cells) == (4 if rival == "linear" else 6)
    lines = markdown(changed).splitlines()
    won = next(line for line in lines if line.startswith("- tsm2 is better than dlinear"))
    numbers = [each for part in re.findall(r" (\d+(?:, \d+)*)", won[won.index("(trainings:") :])
               for each in part.split(", ")]  # fmt: skip
    rows = [[each.strip() for each in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    named = [row for row in rows if len(row) == 9 and row[0] in numbers]
    assert sorted((row[2], row[3]) for row in named) == [
        (name, str(i)) for name in ("dlinear", "tsm2") for i in range(3)
    ]
    assert {row[-1] for row in named} <= set(keys)


def test_a_win_a_loss_and_a_draw_in_words(content: dict[str, Any]) -> None:
    from selectra.compare.results import verdict

    made = [{**content["overall"][0], "rival": rival, "outcome": outcome, "difference": value}
            for rival, outcome, value in (("a", "better", -3.0), ("b", "worse", 4.0), ("c", "level", 0.1))]  # fmt: skip
    text = verdict({**content, "overall": made})["text"]
    assert text.startswith(
        "No: on waves, mamba (tsm2, the best of its kind on validation) loses to b (mse +4.0 %), beats "
    )
    assert text.endswith("and shows no difference that 3 seeds can show from c (mse +0.1 %).")
    assert verdict({**content, "overall": made[:1]})["text"].startswith("Yes: on waves")
    assert verdict({**content, "overall": made[2:]})["text"].startswith("Not shown: on waves")
    assert verdict({**content, "overall": []})["text"].startswith("No verdict yet")


def test_how_costs_were_measured_is_said_as_recorded(content: dict[str, Any]) -> None:
    plain = "float32, without TF32, eager, batches of 32, layout: images NCHW, all else channels last, on cpu"
    assert reading(content)[-1].endswith(f"where there are several: {plain}.")
    other = json.loads(json.dumps(content))
    for row in other["rows"]:
        row["cost"] |= {"dtype": "bfloat16", "tf32": True, "compiled": True}
    assert "several: bfloat16, with TF32, compiled, batches of 32" in reading(other)[-1]
    other["rows"][0] |= {"cost": content["rows"][0]["cost"], "base": "rain"}
    assert f"{plain} (rain); bfloat16" in reading(other)[-1]
    del other["rows"][0]["cost"]["layout"]
    assert "layout not recorded, on cpu (rain)" in reading(other)[-1]


def test_names_from_a_file_cannot_break_the_page(content: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    text = page(json.loads(json.dumps(content).replace("dlinear", evil.replace("/", "\\/"))))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_files_are_written_and_read_back(content: dict[str, Any], tmp_path: Path) -> None:
    paths = write_reports(content, tmp_path / "out")
    assert [path.suffix for path in paths] == [".html", ".md", ".csv"]
    with paths[2].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(content["cells"]) + len(content["trials"])
    scored = [float(row["test"]) for row in rows if row["part"] == "cells"]
    assert scored == [cell["test"]["mse"] for cell in content["cells"]]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "cannot be read"), ("{}", "holds no study"), ('{"what": "selectra study", "format": 9}', "version 9")],
)
def test_other_records_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=words):
        read_study(tmp_path / "a.json")


def test_cells_that_were_not_made_alike_are_refused(content: dict[str, Any]) -> None:
    cells = [dict(cell) for cell in content["cells"]]
    require_alike(cells, "x")
    cells[0]["data_order"] = "0"
    with pytest.raises(DataError, match="in different orders"):
        require_alike(cells, "x")
    cells = [dict(cell) for cell in content["cells"]]
    first = next(cell for cell in cells if cell["backends"])
    first["backends"] = {**first["backends"], "selective_scan": "cuda"}
    with pytest.raises(DataError, match="selective_scan ran on"):
        require_alike(cells, "x")


def test_where_costs_cross() -> None:
    def rows(*values: float) -> list[dict[str, Any]]:
        return [{"length": length, "ms": value} for length, value in zip((100, 1000, 10_000), values, strict=True)]

    # Straight in logarithms: ours is constant, theirs grows as the length.
    assert crossover(rows(10, 10, 10), rows(1, 10, 100), "ms") == pytest.approx(1000)
    assert crossover(rows(20, 20, 20), rows(1, 10, 100), "ms") == pytest.approx(2000)
    assert crossover(rows(9, 9, 9), rows(1, 1, 1), "ms") is None
    assert crossover(rows(1, 1, 1), rows(9, 9, 9), "ms") == pytest.approx(100)


def test_the_command_writes_the_page(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(store, tmp_path / "s.sqlite")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "s.sqlite")])
    assert ended.value.code == 0
    assert "The page is" in capsys.readouterr().out
    made = (tmp_path / "s.html").read_text()
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "s.json"), "--out", str(tmp_path / "again.html")])
    assert (tmp_path / "again.html").read_text() == made
    # The records of a GPU begin with what made them, and say what they are at the end.
    found = json.loads((tmp_path / "s.json").read_text())
    later = {"command": "x" * 3000, **{name: found[name] for name in found if name != "what"}, "what": found["what"]}
    (tmp_path / "gpu.json").write_text(json.dumps(later))
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "gpu.json")])
    assert ended.value.code == 0
    assert (tmp_path / "gpu.html").read_text() == made
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "broken.json")])
    assert "cannot be read as records" in capsys.readouterr().err


def test_a_store_without_a_study_is_refused(tmp_path: Path) -> None:
    empty = Store(tmp_path / "a.sqlite")
    with pytest.raises(DataError, match="holds no study"):
        results(empty)
    empty.close()


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed; looked for {', '.join(BROWSERS)}")
    return found


@pytest.fixture
def served(content: dict[str, Any], tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The page and, on the same server, one that shows it as narrow as a phone and measures it."""
    (tmp_path / "page.html").write_text(page(content), encoding="utf-8")
    (tmp_path / "phone.html").write_text(
        f"<iframe id=f src=page.html width={PHONE} height=800></iframe><p id=out></p><script>"
        "f.onload = () => { const d = f.contentDocument; out.textContent = 'wide ' + d.documentElement.scrollWidth + "
        "' text ' + Math.min(...[...d.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)); };"
        "</script>"
    )
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None  # pyright: ignore[reportAttributeAccessIssue]
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def shown(browser: str, folder: Path, address: str, *more: str) -> tuple[str, str, list[str]]:
    """The page after it was shown, what the browser's log says of its console, and every address asked for."""
    log = folder / "net.json"
    words = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
        "--disable-component-update", "--disable-default-apps", "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", "--v=0", f"--log-net-log={log}", "--virtual-time-budget=4000", *more, address,
    ]  # fmt: skip
    home = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=home, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = re.findall(r'"url":"((?:https?|wss?|ftp)://[^"]+)"', log.read_text(errors="replace"))
    return done.stdout, "\n".join(console), sorted(set(asked))


@pytest.mark.slow
def test_a_browser_shows_the_page_without_an_error_or_a_request(
    browser: str, content: dict[str, Any], served: tuple[Path, str]
) -> None:  # fmt: skip
    folder, _ = served
    text, console, asked = shown(browser, folder, (folder / "page.html").as_uri(), "--dump-dom")
    assert console == ""
    # The browser's own services are no request of the page; a page of a file has no business on the network at all.
    assert [address for address in asked if "google" not in address] == []
    assert Reader(text).exact == [cell["test"]["mse"] for cell in content["cells"]]
    assert content["verdict"]["text"] in text


@pytest.mark.slow
def test_the_page_fits_a_phone(browser: str, served: tuple[Path, str]) -> None:
    folder, address = served
    text, _, _ = shown(browser, folder, f"{address}/phone.html", "--dump-dom")
    found = re.search(r'<p id="out">wide (\d+) text ([\d.]+)</p>', text)
    assert found, text[-500:]
    assert int(found.group(1)) <= PHONE
    # Pixels of the smallest words in a picture.
    assert float(found.group(2)) >= 7


def test_the_page_says_on_how_much_the_verdict_rests(content: dict[str, Any]) -> None:
    (size,) = {cell["test_windows"] for cell in content["cells"]}
    assert f"{size} windows, which overlap, of waves decide" in page(content)
    assert f"on one test part ({size} windows, which overlap, of waves)" in markdown(content)


def test_every_command_writes_into_a_folder_of_its_own(content: dict[str, Any]) -> None:
    for cell in content["cells"]:
        assert cell["command"].endswith(f" --out runs/{cell['key']}")


@pytest.mark.slow
def test_paper_shows_what_a_screen_folds_away(browser: str, content: dict[str, Any], tmp_path: Path) -> None:
    # Enough commands to fill pages.
    text = page({**content, "cells": 12 * content["cells"]})
    pages = {}
    for name, each in (("all", text), ("without", re.sub("<details>.*?</details>", "", text, flags=re.DOTALL))):
        (tmp_path / f"{name}.html").write_text(each, encoding="utf-8")
        address, paper = (tmp_path / f"{name}.html").as_uri(), tmp_path / f"{name}.pdf"
        shown(browser, tmp_path, address, f"--print-to-pdf={paper}")
        pages[name] = len(re.findall(rb"/Type\s*/Page\b", paper.read_bytes()))
    assert pages["all"] > pages["without"]
