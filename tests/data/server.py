"""An HTTP server on this machine that answers as badly as it is told to."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers each request with the next of the server's answers, the last one for ever."""

    @property
    def content(self) -> bytes:
        return self._own.content

    @property
    def _own(self) -> "Server":
        assert isinstance(self.server, Server)
        return self.server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self._own.asked.append(asked)
        self.first = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        answers = self._own.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on the terminal."""

    def start(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True
    content: bytes
    answers: list[Answer]
    asked: list[str | None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/file.csv"


@contextmanager
def serving(content: bytes, *answers: Answer) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as server:
        server.content, server.answers, server.asked = content, list(answers), []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def whole(handler: Handler) -> None:
    """The rest from where it was asked for."""
    content = handler.content
    if handler.first >= len(content):
        handler.start(416, Content_Range=f"bytes */{len(content)}", Content_Length=0)
        return
    rest = content[handler.first :]
    if handler.first:
        place = f"bytes {handler.first}-{len(content) - 1}/{len(content)}"
        handler.start(206, Content_Range=place, Content_Length=len(rest))
    else:
        handler.start(200, Content_Length=len(rest))
    handler.wfile.write(rest)


def without_range(handler: Handler) -> None:
    """All of it, whatever was asked for."""
    handler.start(200, Content_Length=len(handler.content))
    handler.wfile.write(handler.content)


def cut(count: int) -> Answer:
    """As `whole`, ended after some bytes."""

    def answer(handler: Handler) -> None:
        content = handler.content
        rest = content[handler.first :]
        headers: dict[str, object] = {"Content_Length": len(rest)}
        if handler.first:
            headers["Content_Range"] = f"bytes {handler.first}-{len(content) - 1}/{len(content)}"
        handler.start(206 if handler.first else 200, **headers)
        handler.wfile.write(rest[:count])

    return answer


def refusing(status: int, **headers: object) -> Answer:
    return lambda handler: handler.start(status, Content_Length=0, **headers)


def other(content: bytes) -> Answer:
    """Another content, whole."""

    def answer(handler: Handler) -> None:
        handler.start(200, Content_Length=len(content))
        handler.wfile.write(content)

    return answer


def silent(handler: Handler) -> None:
    """The head, and then nothing."""
    handler.start(200, Content_Length=len(handler.content))
    handler.wfile.write(handler.content[:10])
    handler.wfile.flush()
    time.sleep(1.0)


def dripping(handler: Handler) -> None:
    """A byte now and then, for longer than anybody waits."""
    handler.start(206 if handler.first else 200, Content_Length=len(handler.content) - handler.first)
    for i in range(handler.first, len(handler.content)):
        try:
            handler.wfile.write(handler.content[i : i + 1])
            handler.wfile.flush()
        except OSError:
            return
        time.sleep(0.02)


def without_length(handler: Handler) -> None:
    handler.start(200)
    handler.wfile.write(handler.content)


def wrong_part(handler: Handler) -> None:
    """A later part than was asked for."""
    content = handler.content
    first = handler.first + 5
    rest = content[first:]
    handler.start(206, Content_Range=f"bytes {first}-{len(content) - 1}/{len(content)}", Content_Length=len(rest))
    handler.wfile.write(rest)


def broken(handler: Handler) -> None:
    """No HTTP at all."""
    handler.wfile.write(b"what?\r\n\r\n")
