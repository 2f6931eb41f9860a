"""Answers that are files: of this host, of a storage elsewhere, in memory, or made while they are sent."""

import io
import os
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager, contextmanager, nullcontext
from email.utils import formatdate
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

import anyio
from fastapi.responses import FileResponse, StreamingResponse
from starlette import responses
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from batchserve.domain import Job
from batchserve.errors import RangeNotSatisfiable
from batchserve.formats.protocol import Open
from batchserve.storage import Piece, Span, Storage

__all__ = [
    "BLOCK",
    "MANY",
    "SMALL_BLOCK",
    "File",
    "InMemory",
    "Remote",
    "Stream",
    "attachment",
    "blocks_of",
    "input_stem",
    "named_after",
]

BLOCK, SMALL_BLOCK = 1 << 20, 1 << 17
MANY = 64
"""Downloads at a time beyond which all send small blocks: each that is not read lies in memory as a whole."""


class _Downloads:
    """Those under way in this process."""

    def __init__(self) -> None:
        self.number = 0

    @contextmanager
    def one_more(self) -> Iterator[None]:
        self.number += 1
        try:
            yield
        finally:
            self.number -= 1

    def block(self) -> int:
        return BLOCK if self.number <= MANY else SMALL_BLOCK


_downloads = _Downloads()


_SPAN = re.compile(r"[0-9]+-[0-9]*|-[0-9]+")


def _begins_within(span: str, file_size: int) -> bool:
    first, _, last = span.partition("-")
    return int(first) < file_size if first else int(last) > 0


class File(FileResponse):
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with _downloads.one_more():
            # 64 KiB, the default, costs a thread hop each: a quarter of the speed
            self.chunk_size = _downloads.block()
            await super().__call__(scope, receive, send)

    def set_stat_headers(self, stat_result: os.stat_result) -> None:
        # Starlette's derives an ETag as well, which is given here.
        self.headers["content-length"] = str(stat_result.st_size)
        self.headers["last-modified"] = formatdate(stat_result.st_mtime, usegmt=True)

    @classmethod
    def _parse_range_header(cls, http_range: str, file_size: int) -> list[tuple[int, int]]:
        # Starlette answers both in plain text. A Range that makes no sense is to be ignored (RFC 9110, 14.2), as are
        # those of several that begin beyond the end (14.1.2).
        unit, _, given = http_range.partition("=")
        spans = [span for part in given.split(",") if (span := part.strip())]
        if not all(_SPAN.fullmatch(span) for span in spans):
            return []
        there = [span for span in spans if _begins_within(span, file_size)]
        try:
            return super()._parse_range_header(f"{unit}={','.join(there or spans)}", file_size)
        except responses.MalformedRangeHeader:
            return []
        except responses.RangeNotSatisfiable:
            raise RangeNotSatisfiable(
                f"the file has {file_size} bytes, {http_range[:100]!r} begins beyond them", bytes=file_size
            ) from None


class Remote(File):
    """An object of a storage that has no files here, read range by range while it is sent. Nothing is sent before its
    first bytes are there: until then a storage that does not respond, or an object that is missing, is a problem.

    `missing`: gives the error for a missing object.
    """

    def __init__(self, storage: Storage, key: str, missing: Callable[[], Awaitable[Exception]], **options: Any) -> None:
        super().__init__(key, **options)
        self._storage, self._key, self._missing = storage, key, missing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        start: Message | None = None

        async def send_with_start(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
                return
            if start is not None:
                await send(start)
                start = None
            await send(message)

        try:
            await super().__call__(scope, receive, send_with_start)
        except FileNotFoundError:
            if start is None:
                raise
            raise await self._missing() from None

    @asynccontextmanager
    async def _open_file(self) -> AsyncGenerator[Any]:
        yield _Ranges(self._storage, self._key)


class InMemory(File):
    """A small object in memory, sent at once."""

    def __init__(self, content: bytes, key: str, **options: Any) -> None:
        super().__init__(key, **options)
        self._content = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if any(name == b"range" for name, _ in scope["headers"]):
            await super().__call__(scope, receive, send)
        else:  # no task watches for a client that leaves: nothing is waited for
            await self._handle_simple(send, scope["method"] == "HEAD", False)

    @asynccontextmanager
    async def _open_file(self) -> AsyncGenerator[Any]:
        yield _Held(io.BytesIO(self._content))


class _Held:
    """What FileResponse asks of an open file, of one in memory."""

    def __init__(self, content: io.BytesIO) -> None:
        self._content = content

    async def seek(self, position: int) -> None:
        self._content.seek(position)

    async def read(self, size: int) -> bytes:
        return self._content.read(size)


class _Ranges:
    """The same of an object that is read range by range."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage, self._key, self._position = storage, key, 0

    async def seek(self, position: int) -> None:
        self._position = position

    async def read(self, size: int) -> bytes:
        start = self._position
        block = await run_in_threadpool(self._storage.read, self._key, start, start + size)
        self._position += len(block)
        return block


class Stream(StreamingResponse):
    """Blocks that are made while they are sent. What they hold is let go also when the client leaves.

    Each is made in its `turn`. To wait for that, or for a slow client, takes no thread. `held` is closed at the end.
    """

    def __init__(
        self,
        blocks: Generator[bytes],
        media_type: str,
        headers: Mapping[str, str] | None = None,
        first: bytes = b"",
        turn: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
        held: ExitStack | None = None,
    ) -> None:
        super().__init__(self._made(first, turn), media_type=media_type, headers=headers)
        self._blocks, self._held = blocks, held or ExitStack()

    async def _made(self, first: bytes, turn: Callable[[], AbstractAsyncContextManager[None]]) -> AsyncGenerator[bytes]:
        block: bytes | None = first
        while block is not None:
            yield block
            async with turn():
                block = await run_in_threadpool(next, self._blocks, None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with _downloads.one_more():
                await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                with self._held:
                    await run_in_threadpool(self._blocks.close)


def input_stem(filename: str) -> str:
    """The name of an input without its suffix, and without that of its compression. The client has the same rule."""
    path = PurePosixPath(re.split(r"[/\\]", filename)[-1])
    return (path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path).stem


def named_after(job: Job, what: str, suffix: str) -> str:
    """The name of a file about a job: `flights.predictions.csv` for the input `flights.csv`. After the job itself,
    where it has several inputs, or one without a name: `<id>.csv`, `<id>-errors.jsonl`."""
    filename = job.input.filename if job.inputs_total == 1 else None
    stem = input_stem(filename) if filename else ""
    if stem:
        return f"{stem}.{what}{suffix}"
    return f"{job.id}{suffix}" if what == "predictions" else f"{job.id}-{what}{suffix}"


def attachment(name: str) -> str:
    """The Content-Disposition of a file that a browser saves and never shows."""
    quoted = quote(name)
    return f'attachment; filename="{name}"' if quoted == name else f"attachment; filename*=utf-8''{quoted}"


def blocks_of(open: Open, pieces: Iterator[Piece]) -> Generator[bytes]:
    """The bytes of a file that is made of pieces."""
    for piece in pieces:
        if isinstance(piece, Span):
            yield from _read_span(open, piece)
        elif piece:
            yield piece


def _read_span(open: Open, span: Span) -> Iterator[bytes]:
    with open(span.key) as source:
        source.seek(span.start)
        left = span.stop - span.start
        while left > 0 and (block := source.read(min(_downloads.block(), left))):
            left -= len(block)
            yield block
