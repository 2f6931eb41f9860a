"""Request bodies: streamed into storage, decompressed, bounded and verified, never held in memory."""

import asyncio
import base64
import binascii
import hashlib
import re
import sys
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from functools import partial
from types import coroutine
from typing import Any, Protocol

import anyio
import orjson
from fastapi import Request
from starlette.concurrency import run_in_threadpool
from starlette.types import Message

from batchserve.api.head import header, headers_of
from batchserve.errors import (
    BadRequest,
    DigestMismatch,
    InsufficientStorage,
    InvalidOptions,
    PayloadTooLarge,
    RequestTimeout,
    TruncatedBody,
    UnsupportedMedia,
)
from batchserve.formats.encodings import Transcoder
from batchserve.runtime import Runtime
from batchserve.settings import Settings
from batchserve.storage import Stored, Writer, free_bytes

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

BLOCK = 1 << 20
_OPTIONS_BYTES = 1 << 20
_RATIO_FREE = 64 << 20
RATE_AFTER = 60.0
"""Seconds of waiting for a body after which its rate counts: connections begin slowly."""
_GZIP, _ZSTD = COMPRESSED = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
"""How compressed bytes begin."""
_SHA256 = re.compile(r"sha-256=:([A-Za-z0-9+/=]+):")


class Body:
    """The body of a request as decoded bytes. Raises a BatchserveError for every kind of faulty body."""

    def __init__(self, request: Request, settings: Settings, limit: int) -> None:
        self._request = request
        self._settings = settings
        self._limit = limit
        self._received = 0
        self._waited = 0.0
        """Seconds for the client alone: the disk may be slow as well."""
        if (part := header(request.scope, b"content-range")) is not None:  # as RFC 9110, 14.5 asks for
            raise BadRequest(
                f"a part of a file cannot be stored: expected all bytes of it, got Content-Range {part[:100]}"
            )
        length = header(request.scope, b"content-length")
        self._declared = None if length is None else int(length)
        if self._declared is not None and self._declared > limit:
            raise PayloadTooLarge(f"the body has {self._declared} bytes, at most {limit} are accepted")
        self._digests = _digests(request)
        self._hash = hashlib.sha256() if self._digests else None  # of the bytes as sent; storage hashes what it keeps

    def blocks(self) -> AsyncGenerator[bytes]:
        """The decoded bytes in blocks of about 1 MiB; after the last one length and digest are verified. gzip and zstd
        are decompressed whether Content-Encoding or only the bytes indicate them: the plain file is stored.
        """
        return self.decoded(self._raw(), self._encoding)

    @property
    def _encoding(self) -> str:
        return (header(self._request.scope, b"content-encoding") or "").strip().lower()

    @property
    def is_absent(self) -> bool:
        """Whether there is certainly nothing to read or to verify."""
        return not (self._declared or self._digests or b"transfer-encoding" in headers_of(self._request.scope))

    async def decoded(self, source: AsyncIterator[bytes], encoding: str = "") -> AsyncGenerator[bytes]:
        """The same for bytes that were taken out of the body, such as a file in a form."""
        decoder: _Decoder | None = _decoder(encoding) if encoding else None
        decoded = 0
        first = True
        async for block in _gathered(source):
            if first and not encoding:
                decoder = _Gzip() if block.startswith(_GZIP) else _Zstd() if block.startswith(_ZSTD) else None
            first = False
            async for piece in self._decode(decoder, block):
                decoded += len(piece)
                self._check_size(decoded)
                yield piece
        if decoder is not None and not decoder.ended:
            raise TruncatedBody(f"the compressed body is truncated after {self._received} bytes")

    async def transcoded(self, beginning: bytes, rest: AsyncIterator[bytes], encoding: str) -> AsyncGenerator[bytes]:
        """A text in UTF-8. `beginning`: of which the encoding was recognised. Raises InvalidInput."""
        transcoder, size, block = Transcoder(encoding), 0, beginning
        while True:
            text = await run_in_threadpool(transcoder.transcode, block, not block)
            size += len(text)
            self._check_size(size)
            if text:
                yield text
            if not block:
                return
            block = await anext(rest, b"")

    async def read(self) -> bytes:
        """The whole body, for small ones."""
        encoding = self._encoding
        first, has_more = await self._next()
        rest = self._raw(has_more=has_more)
        if encoding or len(first) < len(_ZSTD) or first.startswith(COMPRESSED):
            return b"".join([block async for block in self.decoded(_chained(first, rest), encoding)])
        self._check_size(self._received)
        if not has_more:
            self._verify()
            return first
        pieces = [first]
        async for data in rest:
            pieces.append(data)
            self._check_size(self._received)
        return b"".join(pieces)

    async def store(self, writer: Writer, beginning: bytes, rest: AsyncIterator[bytes]) -> Stored:
        """Writes the whole body, of which the caller has peeked at the beginning. Durable when it returns. A thread
        hashes and writes one block while the next arrives; no thread waits for a client.
        """
        block = beginning
        writing: asyncio.Task[None] | None = None
        try:
            async for following in rest:
                if writing is not None:
                    await _ended(writing)
                writing = asyncio.create_task(run_in_threadpool(writer.write, block))
                block = following
        finally:  # in any case: the caller closes the file, so no thread may be writing to it
            if writing is not None:
                await _ended(writing)
        return await run_in_threadpool(_finish, writer, block)

    async def _raw(self, *, has_more: bool = True) -> AsyncIterator[bytes]:
        """What follows. `has_more`: whether anything does."""
        while has_more:
            data, has_more = await self._next()
            if data:
                yield data
        self._verify()

    async def _next(self) -> tuple[bytes, bool]:
        """The next bytes as sent, and whether more follow."""
        began = time.monotonic()
        steps = self._request.receive().__await__()
        try:
            awaited = next(steps)
        except StopIteration as come:  # mostly: then no timer is set
            message = come.value
        else:
            try:
                async with asyncio.timeout(self._settings.body_idle):
                    message = await _resumed(steps, awaited)
            except TimeoutError:
                raise RequestTimeout(
                    f"no byte of the body arrived for {self._settings.body_idle:g} s (after {self._received} bytes)"
                ) from None
        if message["type"] == "http.disconnect":
            raise self._truncated()
        data, has_more = message.get("body", b""), message.get("more_body", False)
        self._waited += time.monotonic() - began
        self._received += len(data)
        self._check_rate(self._waited)
        if self._hash is not None:
            self._hash.update(data)
        return data, has_more

    async def _decode(self, decoder: "_Decoder | None", block: bytes) -> AsyncIterator[bytes]:
        if decoder is None:
            yield block
            return
        pieces = decoder.decode(block)
        while piece := await run_in_threadpool(_next_or_empty, pieces):
            yield piece

    def _check_rate(self, waited: float) -> None:
        if waited > RATE_AFTER and self._received < self._settings.body_rate * waited:
            raise RequestTimeout(
                f"the body was received too slowly: {self._received} bytes in {waited:.0f} s, "
                f"expected {self._settings.body_rate} bytes/s or more"
            )

    def _check_size(self, decoded: int) -> None:
        if decoded > self._limit:
            raise PayloadTooLarge(f"the body is longer than {self._limit} bytes")
        if decoded > _RATIO_FREE and decoded > self._received * self._settings.decompression_ratio:
            raise PayloadTooLarge(
                f"the body grows more than {self._settings.decompression_ratio} times when it is decompressed"
            )

    def _verify(self) -> None:
        declared = self._declared
        if declared is not None and declared != self._received:
            raise self._truncated()
        for name, expected in self._digests.items():
            if self._hash is not None and expected != self._hash.digest():
                raise DigestMismatch(
                    f"the body does not match its {name}: expected sha-256 {expected.hex()}, "
                    f"got {self._hash.hexdigest()} of {self._received} bytes"
                )

    def _truncated(self) -> TruncatedBody:
        declared = "an unknown number of" if self._declared is None else self._declared
        return TruncatedBody(f"the body ended after {self._received} bytes, {declared} were announced")


def _digests(request: Request) -> dict[str, bytes]:
    """The SHA-256 that the client announced, by header. Raises BadRequest for another digest, or none at all."""
    digests = {}
    for name in ("content-digest", "repr-digest"):
        if (value := header(request.scope, name.encode())) is None:
            continue
        if (found := _SHA256.search(value)) is None:
            raise BadRequest(f"{name} holds no sha-256: expected sha-256=:<base64>:, got {value[:100]!r}")
        try:
            digests[name] = base64.b64decode(found[1], validate=True)
        except binascii.Error:
            raise BadRequest(f"{name} is not base64: {found[1][:100]!r}") from None
    return digests


@coroutine
def _resumed(steps: Generator[Any, Any, Message], awaited: object) -> Generator[Any, Any, Message]:
    """The rest of an await that has begun and waits for `awaited`."""
    while True:
        try:
            given = yield awaited
        except BaseException as error:  # noqa: BLE001 - which is for what waits
            step = partial(steps.throw, error)
        else:
            step = partial(steps.send, given)
        try:
            awaited = step()
        except StopIteration as come:
            message: Message = come.value
            return message


async def _chained(first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if first:
        yield first
    async for data in rest:
        yield data


async def _gathered(source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Blocks of BLOCK bytes or a little more, the last one shorter, none empty."""
    pieces: list[bytes] = []
    size = 0
    async for data in source:
        pieces.append(data)
        size += len(data)
        if size >= BLOCK:
            yield b"".join(pieces)
            pieces, size = [], 0
    if pieces:
        yield b"".join(pieces)


async def _ended(writing: asyncio.Task[None]) -> None:
    """Waits, and raises the errors. A request that is cancelled meanwhile still waits: its thread continues anyway."""
    with anyio.CancelScope(shield=True):
        await asyncio.wait([writing])
    writing.result()


def _finish(writer: Writer, last: bytes) -> Stored:
    writer.write(last)
    return writer.commit()


class _Decoder(Protocol):
    """Decompresses in pieces of bounded size: a decompression bomb is detected before it is in memory."""

    ended: bool
    """Whether the compressed data is complete."""

    def decode(self, block: bytes) -> Iterator[bytes]: ...


class _Gzip:
    # What a call does not take is copied: after the end of a member, only this much is handed over at first, or a
    # body of many small members would be copied once for each of them.
    _SLICE = 512

    def __init__(self) -> None:
        self.ended = False
        self._member = zlib.decompressobj(wbits=31)
        self._slice = BLOCK

    def decode(self, block: bytes) -> Iterator[bytes]:
        """Pieces of about 1 to 2 MiB: each costs its reader a thread hop."""
        view, gathered = memoryview(block), bytearray()
        while view:
            if self._member.eof:  # a gzip file may hold several members
                self._member = zlib.decompressobj(wbits=31)
                self._slice = self._SLICE
            given = view[: self._slice]
            try:
                piece = self._member.decompress(given, BLOCK)
            except zlib.error as error:
                raise BadRequest(f"the body is not valid gzip: {error}") from None
            left = len(self._member.unconsumed_tail) + len(self._member.unused_data)
            view = view[len(given) - left :]
            self._slice = min(2 * self._slice, BLOCK)
            self.ended = self._member.eof
            if not gathered and len(piece) >= BLOCK // 2:  # of one long member: not worth a copy
                yield piece
                continue
            gathered += piece
            if len(gathered) >= BLOCK:
                yield bytes(gathered)
                gathered.clear()
        if gathered:
            yield bytes(gathered)


class _Zstd:
    # As for gzip: what follows a frame is copied, so it is handed over in slices.
    _SLICE = 1024

    def __init__(self) -> None:
        self.ended = False
        self._frame = zstd.ZstdDecompressor()

    def decode(self, block: bytes) -> Iterator[bytes]:
        gathered = bytearray()
        for start in range(0, len(block), self._SLICE):
            data = block[start : start + self._SLICE]
            while data or not (self._frame.eof or self._frame.needs_input):
                if self._frame.eof:
                    self._frame = zstd.ZstdDecompressor()
                try:
                    gathered += self._frame.decompress(data, BLOCK)
                except zstd.ZstdError as error:
                    raise BadRequest(f"the body is not valid zstd: {error}") from None
                data = self._frame.unused_data if self._frame.eof else b""
                if len(gathered) >= BLOCK:
                    yield bytes(gathered)
                    gathered.clear()
            self.ended = self._frame.eof
        if gathered:
            yield bytes(gathered)


def _decoder(encoding: str) -> _Decoder | None:
    match encoding:
        case "gzip" | "x-gzip":
            return _Gzip()
        case "zstd":
            return _Zstd()
        case "identity":
            return None
        case _:
            raise UnsupportedMedia(f"Content-Encoding is {encoding[:100]!r}; expected gzip, zstd or none")


def _next_or_empty(pieces: Iterator[bytes]) -> bytes:
    return next(pieces, b"")


async def json_object(request: Request, settings: Settings) -> Mapping[str, Any]:
    """A small JSON object, such as options; an empty body is an empty object. Raises for anything else."""
    body = Body(request, settings, _OPTIONS_BYTES)
    text = b"" if body.is_absent else await body.read()
    if not text.strip():
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type not in ("", "application/json", "application/x-www-form-urlencoded"):
        raise UnsupportedMedia(
            f"the options are JSON, got {media_type[:100]!r}; to send data, POST it to /v1/predict?model="
        )
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidOptions(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidOptions(f"expected a JSON object of options, got {type(value).__name__}")
    return value


def require_space(runtime: Runtime) -> None:
    """Raises InsufficientStorage while less space is free than BATCHSERVE_FREE_BYTES, or while the reserve of the
    database is incomplete: its space is for deletions and cancellations."""
    if not runtime.database.refill_reserve():
        raise InsufficientStorage("the database's disk is full: delete jobs, or free some space")
    free = free_bytes(runtime.storage)
    if free is not None and free < runtime.settings.free_bytes:
        raise InsufficientStorage(
            f"less than {runtime.settings.free_bytes} bytes are free in the storage: delete jobs, or free some space"
        )
