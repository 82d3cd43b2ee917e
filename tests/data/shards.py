"""Small shards of images, and a server of files that can be told to fail."""

import io
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.data.pictures import encoded, pixels

N_CLASSES = 3


def image_of(number: int) -> bytes:
    """The picture of a sample, different for each."""
    return encoded(pixels(number, (8, 8)))


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """A tar file of samples: for each key its files by suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: list[int], first: int = 0) -> list[Path]:
    """Shards with so many samples; sample i is picture i, of class i modulo 3."""
    paths = []
    for shard, count in enumerate(counts):
        numbers = range(first, first + count)
        samples = {f"s{i:05}": {"png": image_of(i), "cls": str(i % N_CLASSES).encode()} for i in numbers}
        paths.append(write_shard(folder / f"part-{shard:04}.tar", samples))
        first += count
    return paths


class Files(ThreadingHTTPServer):
    """Files of a folder, with ranges; each request is noted.

    Args:
        folder: Where they are.
        ranges: Whether a later part can be asked for.
        cut: Bytes after which a connection ends.
        stall: A file of this name is sent up to its half and then no further.
        status: What every request for a tar file is answered with.
    """

    daemon_threads = True

    def __init__(
        self, folder: Path, *, ranges: bool = True, cut: int | None = None, stall: str = "", status: int = 0
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges, self.cut, self.stall, self.status = folder, ranges, cut, stall, status
        self.asked: list[tuple[str, int]] = []
        self.over = threading.Event()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Files)
        name, asked = self.path.removeprefix("/"), self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        server.asked.append((name, first))
        if server.status and name.endswith(".tar"):
            self.send_response(server.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = (server.folder / name).read_bytes()
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - first))
        self.end_headers()
        end = len(content) if server.cut is None else first + server.cut
        if name == server.stall:
            end = len(content) // 2
        self.wfile.write(content[first:end])
        self.wfile.flush()
        if name == server.stall:
            server.over.wait(60)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(folder: Path, **faults: object) -> Iterator[Files]:
    with Files(folder, **faults) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join(5)


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The block ends within so many seconds."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds
