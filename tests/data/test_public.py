"""Public sets: found on disk before anything else, checked by content, read with the rows that papers count."""

import dataclasses
import gzip
import hashlib
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from selectra.data.download import Limits
from selectra.data.public import folders, get, locate, look, read_m4, read_public
from selectra.data.series import SeriesFile
from selectra.data.sources import PUBLIC, PublicFile, PublicSet, find_public, public_set
from selectra.errors import DataError
from selectra.registry import datasets
from selectra.spec import Spec
from tests.data import server as answers
from tests.data.frames import hourly
from tests.data.server import serving

FAST = Limits(stall=0.5, total=20.0, attempts=2, pause=0.01)
WIDE = hourly().to_csv(index=False).encode()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The folder that SELECTRA_DATA names, and that for downloads."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("SELECTRA_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("SELECTRA_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    assert folders() == [tmp_path / "data", tmp_path / "cache" / "data"]
    return tmp_path / "data", tmp_path / "cache" / "data"


def file_of(content: bytes, name: str = "hours.csv", url: str = "http://127.0.0.1:9/hours.csv") -> PublicFile:
    return PublicFile(name, url, hashlib.sha256(content).hexdigest(), len(content))


def set_of(*files: PublicFile, **changes: object) -> PublicSet:
    usual = PublicSet("Hours", "hours", files, 400, 2, "h", "none", "nobody")
    return dataclasses.replace(usual, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("place", ["hours.csv", "hours.csv.gz", "some-folder/hours.csv", "some-folder/hours.csv.gz"])
def test_a_copy_is_found_packed_or_not(places: tuple[Path, Path], place: str) -> None:
    path = places[0] / place
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(WIDE) if place.endswith(".gz") else WIDE)
    assert look(file_of(WIDE)).right == path
    assert read_public(set_of(file_of(WIDE))).rows == 400
    # Nothing is asked for: the address answers to nobody.
    assert get(set_of(file_of(WIDE)), limits=FAST) == [(path, False)]


def test_damaged_copies_are_named_and_passed_over(places: tuple[Path, Path]) -> None:
    data, cache = places
    (data / "hours.csv").write_bytes(WIDE[:-1])
    (data / "hours.csv.gz").write_bytes(gzip.compress(WIDE)[:-5])
    source = set_of(file_of(WIDE))
    assert [path.name for path, _ in look(source.files[0]).wrong] == ["hours.csv", "hours.csv.gz"]
    with pytest.raises(DataError, match=r"hours\.csv': its content is not the published one .*selectra data get Hours"):
        locate(source)
    cache.mkdir(parents=True)
    (cache / "hours.csv").write_bytes(WIDE)
    assert locate(source) == [cache / "hours.csv"]


def test_a_missing_set_says_where_it_was_looked_for(places: tuple[Path, Path]) -> None:
    where = re.escape(f"looked in {str(places[0])!r} and {str(places[1])!r}")
    with pytest.raises(DataError, match=f"Hours .hours.csv. is not on this machine; {where}.*selectra data get Hours"):
        read_public(set_of(file_of(WIDE)))


def test_a_set_is_loaded_into_the_cache_or_the_named_folder(places: tuple[Path, Path], tmp_path: Path) -> None:
    with serving(WIDE, answers.cut(50), answers.whole) as server:
        source = set_of(file_of(WIDE, url=server.url))
        assert get(source, limits=FAST) == [(places[1] / "hours.csv", True)]
        assert get(source, limits=FAST) == [(places[1] / "hours.csv", False)]
        assert len(server.asked) == 2
        assert get(source, tmp_path / "own", limits=FAST) == [(tmp_path / "own" / "hours.csv", True)]
    assert read_public(source).names == ("a (°C)", "b")


def test_bare_numbers_get_the_stamps_that_are_known(places: tuple[Path, Path]) -> None:
    numbers = np.arange(60.0).reshape(20, 3)
    content = "\n".join(",".join(map(str, row)) for row in numbers).encode()
    packed = gzip.compress(content)
    with serving(packed, answers.whole) as server:
        one = file_of(content, "solar.txt", server.url + ".gz")
        source = set_of(
            one, layout="bare", start="2006-01-01", freq="10min", rows=20, n_series=3, stamps="order", name="Sun"
        )
        assert get(source, limits=FAST) == [(places[1] / "solar.txt.gz", True)]
    table = read_public(source)
    assert table.names == ("0", "1", "2") and table.freq == "10min"
    np.testing.assert_array_equal(table.values, numbers)
    assert str(table.stamps[-1]) == "2006-01-01 03:10:00"


def test_another_shape_than_published_is_refused(places: tuple[Path, Path]) -> None:
    (places[0] / "hours.csv").write_bytes(WIDE)
    with pytest.raises(DataError, match="Hours has 400 rows of 2 series, and 401 of 2 are published"):
        read_public(set_of(file_of(WIDE), rows=401))


def m4(places: tuple[Path, Path], **changes: object) -> PublicSet:
    train = pd.DataFrame([["H1", 1.0, 2, 3, 4], ["H2", 5, 6, np.nan, np.nan]], columns=["V1", "V2", "V3", "V4", "V5"])
    test = pd.DataFrame([["H1", 7.0, 8], ["H2", 9, 10]], columns=["V1", "V2", "V3"])
    parts = {"Hourly-train.csv": train.to_csv(index=False), "Hourly-test.csv": test.to_csv(index=False)}
    for name, text in parts.items():
        (places[0] / name).write_text(text)
    files = [file_of(text.encode(), name) for name, text in parts.items()]
    return set_of(
        *files, **{"layout": "m4", "rows": 6, "start": "2000-01-03", "split": "last", "stamps": "order", **changes}
    )


def test_m4_series_end_together(places: tuple[Path, Path]) -> None:
    source = m4(places)
    assert {name: values.tolist() for name, values in read_m4(source).items()} == {
        "H1": [1, 2, 3, 4, 7, 8],
        "H2": [5, 6, 9, 10],
    }
    table = read_public(source)
    assert table.names == ("H1", "H2")
    np.testing.assert_array_equal(table.values[:, 1], [np.nan, np.nan, 5, 6, 9, 10])
    assert table.observed.tolist() == (~np.isnan(table.values)).tolist()
    with pytest.raises(DataError, match="series of 841 years, more than time stamps"):
        read_public(m4(places, rows=841, freq="YS-JAN"))


@pytest.mark.parametrize("source", PUBLIC.values(), ids=list(PUBLIC))
def test_every_set_is_complete_and_registered(source: PublicSet) -> None:
    assert len(source.files) == (2 if source.layout == "m4" else 1)
    for file in source.files:
        assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.url.startswith("https://")
        assert file.url.removesuffix(".gz").endswith("/" + file.name)
    entry = datasets.entry(source.name.lower())
    assert entry.kind == "series" and source.title in entry.summary
    assert datasets.resolve(Spec(source.name.lower()))["seq_len"].value == source.lookback
    with pytest.raises(DataError, match="is not on this machine"):
        datasets.build(Spec(source.name.lower()))


def test_names_are_found_in_any_case_and_the_nearest_is_said() -> None:
    assert find_public("etth1") is find_public("ETTH1") is PUBLIC["etth1"]
    assert find_public("electricity") is PUBLIC["ecl"] and find_public("m4-hourly") is PUBLIC["m4_hourly"]
    assert find_public("ETTh1.csv") is None
    with pytest.raises(DataError, match="no public set 'wether'; did you mean 'Weather'"):
        public_set("wether")


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"ETTh1 .* is not on this machine"):
        SeriesFile("ETTh1", seq_len=24, horizon=4)
    hourly().to_parquet(tmp_path / "ETTh1")
    with pytest.raises(DataError, match=r"cannot be read|is not text"):
        SeriesFile("ETTh1", seq_len=24, horizon=4)
    hourly().to_csv(tmp_path / "ETTh1", index=False)
    data = SeriesFile("ETTh1", seq_len=24, horizon=4)
    assert data.names == ("a (°C)", "b") and data.split == "ratio"
