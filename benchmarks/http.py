"""Minimal HTTP clients, so that the server is measured and not the client, for files and for many small calls."""

import asyncio
import http.client
import re
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import uvloop

from benchmarks.environments import Unavailable

BLOCK = 2**20
TIMEOUT = 900.0
T = TypeVar("T")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def send(url: str, method: str, body: Path | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    """Sends one request with a file as its body on a new connection. Raises Unavailable for a status of 400 or more."""
    with _Connection(url) as connection:
        if body is None:
            return connection.exchange(method, None, headers or {}).read()
        with body.open("rb") as file:
            size = {"content-length": str(body.stat().st_size)}
            return connection.exchange(method, file, size | dict(headers or {})).read()


def fetch(url: str, target: Path | None = None) -> int:
    """Downloads into a file, or discards the body; returns the number of bytes. Raises as `send` does."""
    block = memoryview(bytearray(BLOCK))
    received = 0
    with _Connection(url) as connection, (target or Path("/dev/null")).open("wb") as file:
        response = connection.exchange("GET", None, {})
        while count := response.readinto(block):
            file.write(block[:count])
            received += count
    return received


class _Connection:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = f"{parts.path}?{parts.query}" if parts.query else parts.path
        self._connection = http.client.HTTPConnection(parts.netloc, timeout=TIMEOUT, blocksize=BLOCK)

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def exchange(self, method: str, body: Any, headers: Mapping[str, str]) -> http.client.HTTPResponse:
        self._connection.request(method, self._target, body, dict(headers))
        response = self._connection.getresponse()
        if response.status >= 400:
            raise Unavailable(f"{method} {self._target}: {response.status} {response.read(2000)!r}")
        return response


class Calls(asyncio.Protocol):
    """Sends requests over one persistent connection, one at a time, to servers that send a Content-Length."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._answer: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    @classmethod
    async def connect(cls, url: str) -> "Calls":
        host, _, port = urlsplit(url).netloc.partition(":")
        _, calls = await asyncio.get_running_loop().create_connection(cls, host, int(port))
        return calls

    async def call(self, request: bytes) -> bytes:
        """The body of the response. Raises Unavailable for a status of 400 or more."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's do not inherit from it

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        found = _LENGTH.search(self._received, 0, end + 2) if end >= 0 else None
        if found is None or len(self._received) < end + 4 + int(found[1]) or self._answer is None:
            return
        body, status = bytes(self._received[end + 4 :]), self._received[9:12]
        self._received.clear()
        if status < b"400":
            self._answer.set_result(body)
        else:
            self._answer.set_exception(Unavailable(f"{status.decode()}: {body[:2000]!r}"))

    def connection_lost(self, _error: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Unavailable("the server closed the connection"))


def request(method: str, target: str, body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a request."""
    lines = [f"{method} {target} HTTP/1.1", "host: 127.0.0.1", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def latencies(url: str, wanted: bytes, *, seconds: float, clients: int) -> list[float]:
    """The seconds of every call while `clients` repeat it as fast as responses arrive, each at least once."""
    deadline = time.perf_counter() + seconds
    taken: list[float] = []

    async def client() -> None:
        calls = await Calls.connect(url)
        before = time.perf_counter()
        while True:
            await calls.call(wanted)
            now = time.perf_counter()
            taken.append(now - before)
            if now >= deadline:
                break
            before = now
        calls.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return taken


def run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
