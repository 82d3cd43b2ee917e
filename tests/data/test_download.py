"""Downloads from a server on this machine that sends truncated, corrupt, slow and refusing answers."""

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selectra.data.download import Limits, download
from selectra.errors import DataError
from tests.data import server as answers
from tests.data.server import Answer, serving

CONTENT = bytes(range(256)) * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()
FAST = Limits(stall=0.3, total=20.0, attempts=3, pause=0.01)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def get(folder: Path, *sent: Answer, content: bytes = CONTENT, name: str = "file.csv", **options: Any) -> list[Any]:
    """Load from a server that answers so; what it was asked for."""
    with serving(content, *sent) as server:
        try:
            download(server.url, folder / name, **{"sha256": SHA, "limits": FAST, **options})
        finally:
            asked = server.asked
    return asked


def only(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_a_file_comes_whole_and_alone(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    asked = get(tmp_path / "new", answers.whole, progress=lambda there, size: seen.append((there, size)))
    assert (tmp_path / "new" / "file.csv").read_bytes() == CONTENT
    assert asked == [None] and only(tmp_path / "new", "file.csv")
    assert seen[-1] == (len(CONTENT), len(CONTENT)) and seen == sorted(seen)


def test_a_truncated_answer_is_gone_on_with(tmp_path: Path) -> None:
    asked = get(tmp_path, answers.cut(1000), answers.cut(500), answers.whole)
    assert asked == [None, "bytes=1000-", "bytes=1500-"]
    assert (tmp_path / "file.csv").read_bytes() == CONTENT and only(tmp_path, "file.csv")


def test_progress_counts_and_not_connections(tmp_path: Path) -> None:
    """More connections than `attempts`, each of which brings something."""
    asked = get(tmp_path, *[answers.cut(1000)] * 8, answers.whole)
    assert len(asked) == 9 and (tmp_path / "file.csv").read_bytes() == CONTENT


def test_an_interrupted_download_goes_on_in_the_next_call(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the connection ended after 700 of 256,000 bytes\. 700 bytes are kept in"):
        get(tmp_path, answers.cut(700), answers.cut(0))
    assert only(tmp_path, "file.csv.part")
    assert get(tmp_path, answers.whole) == ["bytes=700-"]
    assert (tmp_path / "file.csv").read_bytes() == CONTENT and only(tmp_path, "file.csv")


def test_a_server_that_cannot_skip_sends_all_again(tmp_path: Path) -> None:
    asked = get(tmp_path, answers.cut(1000), answers.without_range)
    assert asked == [None, "bytes=1000-"]
    assert (tmp_path / "file.csv").read_bytes() == CONTENT


def test_a_part_that_is_whole_already_is_taken(tmp_path: Path) -> None:
    (tmp_path / "file.csv.part").write_bytes(CONTENT)
    assert get(tmp_path, answers.whole) == [f"bytes={len(CONTENT)}-"]
    assert (tmp_path / "file.csv").read_bytes() == CONTENT and only(tmp_path, "file.csv")


@pytest.mark.parametrize("stale", [b"x" * 500, b"x" * 256_000, b"x" * 300_000], ids=["shorter", "as long", "longer"])
def test_a_stale_part_is_loaded_again_from_its_beginning(tmp_path: Path, stale: bytes) -> None:
    (tmp_path / "file.csv.part").write_bytes(stale)
    assert get(tmp_path, answers.whole) == [f"bytes={len(stale)}-", None]
    assert (tmp_path / "file.csv").read_bytes() == CONTENT and only(tmp_path, "file.csv")


@pytest.mark.parametrize(
    "sent", [answers.other(CONTENT[:-1] + b"x"), answers.other(b"<html>not found</html>"), answers.other(b"")]
)
def test_corrupt_content_is_refused_and_not_kept(tmp_path: Path, sent: Answer) -> None:
    (tmp_path / "file.csv").write_bytes(b"older")
    with pytest.raises(DataError, match=r"is not the published file: .* another checksum .* nothing was kept"):
        get(tmp_path, sent)
    assert (tmp_path / "file.csv").read_bytes() == b"older" and only(tmp_path, "file.csv")


def test_another_size_than_published_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 256,000 bytes and should have 256,001"):
        get(tmp_path, answers.whole, size=len(CONTENT) + 1)
    assert only(tmp_path)


def test_no_length_and_more_bytes_than_there_should_be(tmp_path: Path) -> None:
    get(tmp_path, answers.without_length)
    assert (tmp_path / "file.csv").read_bytes() == CONTENT
    with pytest.raises(DataError, match="more than the 1,000 bytes that the file has"):
        get(tmp_path, answers.without_length, size=1000, name="other.csv")


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (403, "Forbidden"), (410, "Gone")])
def test_a_refusal_is_final(tmp_path: Path, status: int, reason: str) -> None:
    with pytest.raises(DataError, match=f"the server answers {status} {reason}. Bring the file from elsewhere"):
        get(tmp_path, answers.refusing(status), answers.whole)
    assert only(tmp_path)


@pytest.mark.parametrize(
    "fault",
    [answers.refusing(503), answers.refusing(429, Retry_After=0), answers.broken, answers.silent, answers.wrong_part],
    ids=["503", "429", "no HTTP", "silent", "wrong part"],
)
def test_passing_faults_pass(tmp_path: Path, fault: Answer) -> None:
    get(tmp_path, fault, answers.whole)
    assert (tmp_path / "file.csv").read_bytes() == CONTENT and only(tmp_path, "file.csv")


def test_faults_that_stay_end_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="could not be loaded: the server answers 500"):
        get(tmp_path, answers.refusing(500))
    with pytest.raises(DataError, match=r"could not be loaded: nothing came for 0\.3 seconds\. 10 bytes are kept"):
        get(tmp_path, answers.silent, name="silent.csv")
    with serving(CONTENT, answers.whole) as server:
        url = server.url
    with pytest.raises(DataError, match=r"could not be loaded: .*refused"):
        download(url, tmp_path / "nobody.csv", sha256=SHA, limits=FAST)


def test_a_dripping_server_meets_the_clock(tmp_path: Path) -> None:
    limits = Limits(stall=0.3, total=0.3, attempts=3, pause=0.01)
    with pytest.raises(DataError, match=r"the time limit is reached.* bytes are kept"):
        get(tmp_path, answers.dripping, limits=limits)
    kept = (tmp_path / "file.csv.part").read_bytes()
    assert 0 < len(kept) < 100 and CONTENT.startswith(kept)


def test_packed_files_are_checked_unpacked(tmp_path: Path) -> None:
    packed = gzip.compress(CONTENT)
    get(tmp_path, answers.cut(100), answers.whole, content=packed, name="file.csv.gz")
    assert (tmp_path / "file.csv.gz").read_bytes() == packed
    with pytest.raises(DataError, match="is not the published file"):
        get(tmp_path, answers.whole, content=packed[:-9], name="cut.csv.gz")


def test_room_and_rights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage: Callable[[object], Any] = lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6)  # type: ignore[attr-defined]  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(DataError, match="has 1 MB free, 17 MB are needed; make room"):
        get(tmp_path, answers.whole)
    assert only(tmp_path)
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        get(tmp_path / "file", answers.whole)


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://a/b", "ETTh1.csv"])
def test_only_http(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="is no http or https address"):
        download(url, tmp_path / "file.csv", sha256=SHA)
