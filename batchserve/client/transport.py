"""Requests with retries, over a blocking or an asyncio connection.

All logic of the client is written once, as coroutines over a `Wire`. `AsyncWire` suspends as usual. `BlockingWire`
blocks, so a coroutine over it never suspends and `now` runs it to completion without an event loop.
"""

import asyncio
import base64
import hashlib
import json
import random
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlsplit

import httpx2

from batchserve.client.errors import ConnectionFailed, error_of, no_answer, refusal_of_store
from batchserve.errors import BadRequest, BatchserveError, DigestMismatch, IdempotencyInProgress

T = TypeVar("T")
Calls = Sequence[Callable[[], Coroutine[Any, Any, None]]]
OnUpload = Callable[[int, int | None], None]
"""Called with the bytes sent so far and their total, if known."""

BLOCK = 2**20
_NEVER_RETRIED = frozenset({501, 505, 507})
_LONGEST_PAUSE = 120.0
_LONGEST_KEY = 255
"""Characters of an Idempotency-Key, as the server has it."""
_STORED = 60.0
"""Seconds that an object store may take after the last byte."""
_FAREWELL = 2.0
"""Seconds that interrupted threads may take to leave nothing behind."""


@dataclass(frozen=True, slots=True)
class Content:
    """The bytes of a request. `blocks` restarts for each attempt, unless the body is not `repeatable`."""

    blocks: Callable[[], Iterator[bytes]]
    media_type: str
    length: int | None = None
    encoding: str | None = None
    filename: str | None = None
    repeatable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, sent once or more."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    content: Content | None = None
    patience: float = 0.0
    """Seconds allowed for the response, on top of the client's timeout."""
    on_upload: OnUpload | None = None
    idempotency_key: str | None = None
    """Of a POST; by default a new one."""


class Wire(Protocol):
    """I/O operations of the client."""

    @property
    def http(self) -> httpx2.Client | httpx2.AsyncClient: ...
    def content(self, blocks: Iterator[bytes]) -> Iterator[bytes] | AsyncIterator[bytes]: ...
    async def send(self, request: httpx2.Request) -> httpx2.Response: ...
    async def read(self, response: httpx2.Response) -> bytes: ...
    def blocks(self, response: httpx2.Response) -> AsyncIterator[bytes]: ...
    async def end(self, response: httpx2.Response) -> None: ...
    async def sleep(self, seconds: float) -> None: ...
    async def call(self, function: Callable[[], T]) -> T:
        """Runs a function that may block on file I/O."""
        ...

    def gate(self, most: int) -> AbstractAsyncContextManager[None]:
        """What at most so many calls are in at a time; the others wait for it."""
        ...

    async def each(self, calls: Calls, most: int, halt: Callable[[], None]) -> None:
        """Runs all calls, in order and so many at a time. The first error ends them: `halt` asks those that still run
        to raise one, too."""
        ...

    async def close(self) -> None: ...


class AsyncWire:
    def __init__(self, http: httpx2.AsyncClient) -> None:
        self._http = http

    @property
    def http(self) -> httpx2.AsyncClient:
        return self._http

    async def content(self, blocks: Iterator[bytes]) -> AsyncGenerator[bytes]:
        while block := await asyncio.to_thread(next, blocks, b""):
            yield block

    async def send(self, request: httpx2.Request) -> httpx2.Response:
        return await self._http.send(request, stream=True)

    async def read(self, response: httpx2.Response) -> bytes:
        return await response.aread()

    def blocks(self, response: httpx2.Response) -> AsyncIterator[bytes]:
        return response.aiter_bytes()

    async def end(self, response: httpx2.Response) -> None:
        await response.aclose()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def call(self, function: Callable[[], T]) -> T:
        return await asyncio.to_thread(function)

    def gate(self, most: int) -> AbstractAsyncContextManager[None]:
        return asyncio.Semaphore(most)

    async def each(self, calls: Calls, most: int, halt: Callable[[], None]) -> None:
        following = iter(calls)

        async def work() -> None:
            for call in following:
                await call()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(most, len(calls))):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            halt()
            raise failures.exceptions[0] from None

    async def close(self) -> None:
        await self._http.aclose()


class BlockingWire:
    def __init__(self, http: httpx2.Client) -> None:
        self._http = http

    @property
    def http(self) -> httpx2.Client:
        return self._http

    def content(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        return blocks

    async def send(self, request: httpx2.Request) -> httpx2.Response:
        return self._http.send(request, stream=True)

    async def read(self, response: httpx2.Response) -> bytes:
        return response.read()

    async def blocks(self, response: httpx2.Response) -> AsyncGenerator[bytes]:
        for block in response.iter_bytes():
            yield block

    async def end(self, response: httpx2.Response) -> None:
        response.close()

    async def sleep(self, seconds: float) -> None:
        time.sleep(seconds)  # noqa: ASYNC251 - blocking is this class's purpose

    async def call(self, function: Callable[[], T]) -> T:
        return function()

    def gate(self, most: int) -> AbstractAsyncContextManager[None]:
        return _Gate(most)

    async def each(self, calls: Calls, most: int, halt: Callable[[], None]) -> None:
        """In threads, which do not keep this process from ending."""
        following, lock = iter(calls), threading.Lock()
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while not failures:
                    with lock:
                        call = next(following, None)
                    if call is None:
                        return
                    now(call())
            except BaseException as failure:  # noqa: BLE001 - raised below
                failures.append(failure)
                halt()

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(most, len(calls)))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as failure:  # Ctrl-C
            failures.insert(0, failure)
            halt()
            _join(threads, _FAREWELL)
            raise
        if failures:
            raise failures[0]

    async def close(self) -> None:
        self._http.close()


def _join(threads: Sequence[threading.Thread], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, deadline - time.monotonic()))


class _Gate:
    """A semaphore for coroutines that never suspend, in several threads."""

    def __init__(self, most: int) -> None:
        self._free = threading.Semaphore(most)

    async def __aenter__(self) -> None:
        self._free.acquire()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._free.release()


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The value of a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]
    coroutine.close()
    raise RuntimeError("a coroutine over a BlockingWire has suspended")


def each_now(values: AsyncGenerator[T]) -> Generator[T]:
    """The values of an asynchronous generator that never suspends."""

    async def following() -> T:
        return await anext(values)

    try:
        while True:
            try:
                value = now(following())
            except StopAsyncIteration:
                return
            yield value
    finally:
        now(_close(values))


async def _close(values: AsyncGenerator[Any]) -> None:
    await values.aclose()


def _key_of(request: Request) -> str:
    """Raises BadRequest for one that no header can have."""
    key = request.idempotency_key
    if key is None:
        return str(uuid.uuid4())
    if not 0 < len(key) <= _LONGEST_KEY or not (key.isascii() and key.isprintable()) or key != key.strip():
        raise BadRequest(f"an idempotency_key has 1 to {_LONGEST_KEY} printable ASCII characters, got {key[:300]!r}")
    return key


class Transport:
    """Sends calls until they succeed, fail permanently, or have been tried `1 + max_retries` times."""

    def __init__(self, wire: Wire, url: str, *, max_retries: int, timeout: float) -> None:
        self.wire = wire
        self.url = url.rstrip("/")
        self.max_retries = max_retries
        self.timeout = timeout

    async def json(self, request: Request) -> Any:
        """The JSON of the response; None if it has no body."""
        response = await self.send(request)
        try:
            content = await self.wire.read(response)
        finally:
            await self.wire.end(response)
        return response.json() if content else None

    async def send(self, request: Request) -> httpx2.Response:
        """The response with its body unread. Raises the BatchserveError that the server named, or ConnectionFailed."""
        # One key for all attempts: the server processes at most one.
        key = {"Idempotency-Key": _key_of(request)} if request.method == "POST" else {}
        return await self._tried(partial(self._request, request, key), request.content, self.url, error_of)

    async def put(self, url: str, content: Content, on_upload: OnUpload | None = None) -> None:
        """Sends bytes to the object store, by a URL that permits it: without the API key, which is not for the store.
        Raises APIError, or ConnectionFailed."""
        store = "://".join(urlsplit(url)[:2])
        upload = Request(method="PUT", path=url, content=content, on_upload=on_upload)
        timeout = httpx2.Timeout(self.timeout, read=self.timeout + _STORED).as_dict()

        def request() -> httpx2.Request:
            body, headers = self.wire.content(_upload(upload, content)), {"Content-Length": str(content.length)}
            return httpx2.Request("PUT", url, headers=headers, content=body, extensions={"timeout": timeout})

        await self.wire.end(await self._tried(request, content, store, refusal_of_store))

    async def _tried(
        self,
        request: Callable[[], httpx2.Request],
        content: Content | None,
        server: str,
        refusal: Callable[[httpx2.Response], BatchserveError],
    ) -> httpx2.Response:
        """The response to the request that is made anew for each try."""
        retries = 0
        while True:
            retry_after = None
            try:
                response = await self.wire.send(request())
            except (httpx2.TransportError, httpx2.InvalidURL) as failure:
                error: BatchserveError = no_answer(server, failure)
                again = isinstance(failure, httpx2.TransportError) and not isinstance(
                    failure, httpx2.UnsupportedProtocol | httpx2.LocalProtocolError
                )
            else:
                if response.is_success:
                    return response
                await self.wire.read(response)
                error = refusal(response)
                again = may_be_retried(response.status_code, error)
                retry_after = seconds_to_wait(response.headers.get("Retry-After"))
            pause = pause_before(retries, retry_after)
            repeatable = content is None or content.repeatable
            if not (again and repeatable and retries < self.max_retries and pause <= _LONGEST_PAUSE):
                raise error
            retries += 1
            await self.wire.sleep(pause)

    async def download(self, request: Request) -> AsyncGenerator[bytes]:
        """The blocks of a body. A broken download is resumed where it broke; the digest is checked at the end."""
        digest = hashlib.sha256()
        expected = etag = None
        position = breaks = 0
        while True:
            headers = {"Accept-Encoding": "identity", **request.headers}
            if position:
                headers |= {"Range": f"bytes={position}-", "If-Range": str(etag)}
            response = await self.send(Request(method="GET", path=request.path, params=request.params, headers=headers))
            if not position:
                etag, expected = response.headers.get("ETag"), response.headers.get("Repr-Digest")
            elif response.status_code != httpx2.codes.PARTIAL_CONTENT:
                await self.wire.end(response)
                raise ConnectionFailed(f"the download from {self.url} broke after {position:,} bytes and has changed")
            try:
                async for block in self.wire.blocks(response):
                    position += len(block)
                    digest.update(block)
                    yield block
                break
            except httpx2.TransportError as failure:
                breaks += 1
                if etag is None or breaks > self.max_retries:
                    raise no_answer(self.url, failure) from failure
            finally:
                await self.wire.end(response)
            await self.wire.sleep(pause_before(breaks - 1, None))
        if expected and expected != f"sha-256=:{base64.b64encode(digest.digest()).decode()}:":
            raise DigestMismatch(f"the download from {self.url} is damaged: its digest is not {expected}")

    def _request(self, request: Request, key: Mapping[str, str]) -> httpx2.Request:
        headers = {"Accept": "application/json", **key, **request.headers}
        if request.content is not None:
            headers |= _content_headers(request.content)
        return self.wire.http.build_request(
            request.method,
            self.url + request.path,
            params=request.params,
            headers=headers,
            content=None if request.content is None else self.wire.content(_upload(request, request.content)),
            timeout=httpx2.Timeout(self.timeout, read=self.timeout + request.patience),
        )


def _content_headers(content: Content) -> dict[str, str]:
    headers = {"Content-Type": content.media_type}
    if content.length is not None:
        headers["Content-Length"] = str(content.length)
    if content.encoding is not None:
        headers["Content-Encoding"] = content.encoding
    return headers


def _upload(request: Request, content: Content) -> Iterator[bytes]:
    done = 0
    for block in content.blocks():
        yield block
        done += len(block)
        if request.on_upload is not None:
            request.on_upload(done, content.length)


def segment(text: str, safe: str = "") -> str:
    """A text as one segment of a path, whatever it holds: no slash, query or `..` of it leads elsewhere."""
    return quote(text, safe=safe) if text.strip(".") else text.replace(".", "%2E")


def query(params: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a query: None is left out, lists and mappings are JSON."""

    def text(value: Any) -> str:
        match value:
            case bool():
                return "true" if value else "false"
            case list() | tuple() | dict():
                return json.dumps(value)
        return str(value)

    return {name: text(value) for name, value in params.items() if value is not None}


def may_be_retried(status: int, error: BatchserveError) -> bool:
    """Whether the same request may succeed later."""
    if status == httpx2.codes.CONFLICT:
        return isinstance(error, IdempotencyInProgress)
    return status in (408, 429) or (status >= 500 and status not in _NEVER_RETRIED)


def pause_before(retries: int, retry_after: float | None) -> float:
    """Seconds to wait: half a second, doubled by each retry, at most 8, with jitter; never less than `retry_after`."""
    pause: float = min(8.0, 0.5 * 2**retries) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter is not a secret
    return max(pause, retry_after or 0.0)


def seconds_to_wait(retry_after: str | None) -> float | None:
    """The value of a Retry-After header, which is a number of seconds or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None
