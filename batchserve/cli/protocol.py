"""uvicorn's HTTP/1.1 protocol with limits that it lacks: on the time and bytes of a head, on the framing of chunked
bodies, on pipelined requests, unread responses and the number of connections."""

import asyncio
import ctypes
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from batchserve.api.requests import REQUEST_ID
from batchserve.cli.joined import Joined
from batchserve.cli.refusal import Refusal
from batchserve.correlation import request_id_of
from batchserve.logs import get_logger

log = get_logger()

HEAD_BYTES = 64 * 1024
"""Most bytes of a head, of trailers, and of anything else outside of bodies. batchserve's client sends less than 1
KiB."""
TARGET_BYTES = 16 * 1024
HEADERS = 256
PIPELINED = 16
"""Most requests read while the previous one is answered; one at a time, unless their heads come in pieces."""
LINGER, LINGER_BYTES = 2.0, 1 << 20
"""A refusal is lost when its connection is closed with unread bytes: so they are read for this long, up to this
many."""
COUNTED = 128 * 1024
"""Least bytes counted for an unread response: its block stays in memory until all of it is sent."""
SPARED = 1.0
"""Seconds that a client may read nothing, under any load."""
WORTH_A_TRIM = 8 << 20
"""Unread bytes after which the heap is trimmed; the C library would keep the memory for later responses."""
_LIBC = ctypes.CDLL(None)
_END_OF_HEAD = b"\r\n\r\n"
_METHOD = re.compile(rb"[\w!#$%&'*+.^`|~-]{1,64} ")
_FRAMING = frozenset((b"content-length", b"transfer-encoding", b"expect"))


def _uncounted(_status: int) -> None:
    """Refusals are not counted."""


@dataclass(slots=True)
class Limits:
    """State shared by all connections of a server."""

    head_timeout: float
    send_idle: float
    """Seconds without reading its response after which a client is disconnected."""
    send_bytes: int
    """Most unread response bytes."""
    connections: int
    unread: dict["Protocol", int] = field(default_factory=dict)
    """The connections with an unread response, and its bytes when that began."""
    peak: int = 0
    """Bytes that were unread, since the heap was last trimmed."""
    refused: Callable[[int], None] = _uncounted
    """Called with the status of each refusal."""

    def wait_for(self, reader: "Protocol", unsent: int, now: float) -> None:
        self.unread[reader] = max(unsent, COUNTED)
        self.shed(now)

    def shed(self, now: float) -> None:
        """Disconnects the clients that have been idle longest, until the others fit."""
        waiting = sum(self.unread.values())
        self.peak = max(self.peak, waiting)
        if waiting <= self.send_bytes:
            return
        for reader in sorted(self.unread, key=lambda reader: reader.progress):
            if waiting <= self.send_bytes or now - reader.progress < SPARED:
                break
            waiting -= self.unread.pop(reader)
            reader.transport.abort()


class _Flow(FlowControl):
    """Pauses reading while there are deferred bytes, even if the running request resumes it."""

    holding = False

    def resume_reading(self) -> None:
        if not self.holding:
            super().resume_reading()


class Protocol(HttpToolsProtocol):
    """Closes a connection on which no whole head comes within `head_timeout` seconds: counted from the opening, and
    from the first byte after a response. Bodies have separate deadlines (`api.bodies`).

    A pipelined request is parsed when the previous one is answered. Until then its bytes are kept unparsed, one socket
    read at most.
    """

    limits: ClassVar[Limits]
    flow: _Flow

    __slots__ = (  # besides uvicorn's 30 slots; more of those would slow down each access
        "_chunked", "_codings", "_deadline", "_drained", "_framing", "_held", "_hosts", "_ignored", "_joined", "_left",
        "_length", "_refusal", "_replays", "_running", "_spent", "_unsent", "_waits", "progress",
    )  # fmt: skip

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._deadline: asyncio.TimerHandle | None = None
        self._running: RequestResponseCycle | None = None

        # Bytes parsed since the latest complete head or body byte.
        self._spent = 0
        # The framing headers of the current head.
        self._length = self._hosts = self._codings = 0
        # Missing bytes of the body; or that it is chunked and incomplete.
        self._left, self._chunked = 0, False

        # The framing of a body that the parser skips because of an Upgrade; and whether that head is complete.
        self._framing, self._replays = b"", False

        # Whether received bytes are not parsed now: responses come first, or the request was refused.
        self._waits = False
        self._held = b""
        self._refusal: bytes | None = None
        # Bytes received after a refusal.
        self._ignored: int | None = None
        self.is_dropped = False  # for a new connection

        # When the client last read some of a response, or had nothing to read.
        self.progress = 0.0
        self._unsent, self._drained = 0, False

    # --- connections -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._joined = Joined(transport, self.loop)
        self._await_head()
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_has_come()
        self.limits.unread.pop(self, None)
        self.pipeline.clear()
        self._held = b""
        if self._running is not None:  # uvicorn only notifies the latest request read
            self._running.disconnected = not self._running.response_complete
            self._running.message_event.set()
        super().connection_lost(exc)

    def _make_room(self) -> None:
        """Closes the most dispensable connections; refuses this one when they are too few."""
        others = [other for other in self.connections if isinstance(other, Protocol) and not other.is_dropped]
        # Refused ones that their clients have not closed yet are beyond the limit, too: more than one may have to go.
        excess = len(others) - self.limits.connections
        idle = [(rank, other) for other in others if other is not self and (rank := other.idle_rank()) is not None]
        for _, other in sorted(idle, key=lambda found: found[0])[: max(excess, 0)]:
            other.is_dropped = True
            other.transport.abort()
        if len(idle) < excess:
            detail = f"all {self.limits.connections} connections that this server may have are busy; try again soon"
            self.limits.refused(503)
            self._leave(Refusal(503, "too-many-connections", detail).answer(request_id_of(None)))

    def idle_rank(self) -> tuple[int, float] | None:
        """Priority for closing, least first; None for a connection that is busy or closing."""
        if self.transport.is_closing():
            return None
        if self._ignored is not None:
            return 0, 0.0
        if not self._is_idle() or self.pipeline:
            return None
        if self._deadline is not None:
            return 1, self._deadline.when()
        if self.transport.get_write_buffer_size() or self.timeout_keep_alive_task is None:
            return None
        return 2, self.timeout_keep_alive_task.when()

    def _is_idle(self) -> bool:
        """Whether all requests read were answered."""
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]  # None at first

    def _await_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.limits.head_timeout, self.timeout_keep_alive_handler)

    def _await_rest_of_head(self) -> None:
        """Where only a part of one has come: most come whole, and need no timer."""
        if self._deadline is None and not self._waits and self._is_idle():
            self._await_head()

    def _head_has_come(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    # --- what comes --------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._waits or self.pipeline:
            self._defer(data)
            return
        if self.timeout_keep_alive_task is not None:
            self._unset_keepalive_if_required()
        self._take(data)
        self._await_rest_of_head()

    def _defer(self, data: bytes) -> None:
        if self._ignored is None:
            self._hold(self._held + data)
            return
        self._ignored += len(data)
        if self._ignored > LINGER_BYTES:
            self.transport.abort()

    def _take(self, data: bytes) -> None:
        size = self._parsable(data, 0)
        if size == len(data):  # as good as always
            self._parse(data)
            return
        view, at = memoryview(data), 0
        while self._parse(view[at : at + size]):
            at += size
            if at == len(data):
                return
            if self.pipeline:
                self._hold(data[at:])
                return
            size = self._parsable(data, at)

    def _parsable(self, data: bytes, at: int) -> int:
        """The bytes that can be parsed without reaching a second request, or exceeding the limit outside of bodies."""
        if self._left:
            return min(self._left, len(data) - at)
        end = -1 if self._chunked else data.find(_END_OF_HEAD, at)
        return min((len(data) if end < 0 else end + len(_END_OF_HEAD)) - at, HEAD_BYTES + 1 - self._spent)

    def _parse(self, piece: bytes | memoryview) -> bool:
        """False when the connection must end."""
        self._spent += len(piece)
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:  # no other protocol is supported: continue with HTTP/1.1
            rest = piece[upgrade.args[0] :]
            self._spent = 0
            if self._framing:
                self._read_body_anew()
            return self._parse(rest) if rest else True
        except httptools.HttpParserError as error:
            known = error.__context__
            self._refuse(known if isinstance(known, Refusal) else _malformed(error, bytes(piece[:80])))
            return False
        if self._spent > HEAD_BYTES:
            self._refuse(self._too_large())
            return False
        return True

    def _read_body_anew(self) -> None:
        """Replaces the parser that skipped a body by one that has read a head of the same framing without an Upgrade.
        Java's client requests HTTP/2 in this way with each request."""
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        self._replays, framing, self._framing = True, self._framing, b""
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\nhost: localhost\r\n%b\r\n\r\n" % framing)
        finally:
            self._replays = False

    def _hold(self, data: bytes) -> None:
        self._held, self._waits = data, True
        self.flow.holding = True
        self.flow.pause_reading()

    def on_message_begin(self) -> None:
        if not self._replays:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if self._replays:
            return
        self.url += url
        if len(self.url) > TARGET_BYTES:
            raise Refusal(414, "uri-too-long", f"the target of a request has at most {TARGET_BYTES} bytes")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._chunked or self._replays:  # a trailer: it must not pass for a header (RFC 9110, 6.5.1)
            return
        name = name.lower()
        if name == b"host":
            self._hosts += 1
        elif name in _FRAMING:
            self._frame(name, value)
        self.headers.append((name, value))

    def _frame(self, name: bytes, value: bytes) -> None:
        """The headers that determine the end of a request."""
        if name == b"content-length":
            self._length = int(value)  # digits, as verified by the parser
        elif name == b"expect":
            self.expect_100_continue = value.lower() == b"100-continue"
        else:
            self._codings += 1
            if value.strip().lower() != b"chunked":
                detail = f"Transfer-Encoding: only chunked is supported, got {value[:80].decode('latin-1')!r}"
                raise Refusal(501, "not-implemented", detail)

    def on_headers_complete(self) -> None:
        if self._replays:
            return
        version = self.parser.get_http_version()
        if self._hosts != 1 or self._codings or version != "1.1":
            self._require_unambiguous(version)
        if len(self.headers) > HEADERS:
            raise Refusal(431, "head-too-large", f"a request has at most {HEADERS} headers, got {len(self.headers)}")
        if len(self.pipeline) >= PIPELINED:
            raise Refusal(429, "too-many-requests", f"more than {PIPELINED} requests wait on one connection")
        if not self.url.startswith(b"/"):
            self._take_host_of_target()
        length, chunked = self._length, bool(self._codings)
        if (length or chunked) and self.parser.should_upgrade():  # the parser skips the body
            self._framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % length
        self._head_has_come()
        super().on_headers_complete()
        self._spent = self._hosts = self._codings = self._length = 0
        self._left, self._chunked = length, chunked

    def _take_host_of_target(self) -> None:
        """The host of a target in absolute form overrides the header (RFC 9112, 3.2.2)."""
        try:
            target = httptools.parse_url(self.url)
        except httptools.HttpParserInvalidURLError:
            raise Refusal(400, "bad-request", "the target of the request is neither a path nor an address") from None
        if target.host:
            name = b"[%b]" % target.host if b":" in target.host else target.host
            host = b"%b:%d" % (name, target.port) if target.port else name
            self.headers[:] = [(b"host", host), *(header for header in self.headers if header[0] != b"host")]

    def _require_unambiguous(self, version: str) -> None:
        """Raises Refusal for ambiguous framing (request smuggling)."""
        if version not in ("1.0", "1.1"):
            raise Refusal(505, "http-version-not-supported", f"expected HTTP/1.1 or HTTP/1.0, got HTTP/{version}")
        if self._hosts > 1 or (self._hosts == 0 and version == "1.1"):
            raise Refusal(400, "bad-request", f"Host: expected once, came {self._hosts} times")
        if self._codings > 1:
            raise Refusal(400, "bad-request", f"Transfer-Encoding: expected once, came {self._codings} times")
        if self._codings and version == "1.0":
            raise Refusal(400, "bad-request", "Transfer-Encoding: HTTP/1.0 has none; send a Content-Length")

    def on_body(self, body: bytes) -> None:
        self._spent = 0
        if self._left:
            self._left -= len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._framing:  # not yet: its body comes
            return
        self._spent, self._chunked = 0, False
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()

    # --- refusals ----------------------------------------------------------------------------------------------------

    def _too_large(self) -> Refusal:
        if self._chunked:
            detail = f"more than {HEAD_BYTES} bytes without one of the body: in a chunk's extensions, or in trailers"
            return Refusal(431, "head-too-large", detail)
        return Refusal(431, "head-too-large", f"a request has at most {HEAD_BYTES} bytes before its body")

    def _refuse(self, refusal: Refusal) -> None:
        """Answers after the previous requests, and stops reading."""
        self.limits.refused(refusal.status)
        request_id = self._request_id()
        log.warning("Request was refused", action="request_refuse", status=refusal.status, code=refusal.code,
                    detail=refusal.detail, request_id=request_id)  # fmt: skip
        cycle = self.cycle
        if self._is_idle():
            self._leave(b"" if self._chunked else refusal.answer(request_id))
        elif self._chunked and not self.pipeline:  # the fault is in the body of the running request
            answer = b"" if cycle.response_started else refusal.answer(request_id)
            cycle.disconnected = True
            cycle.message_event.set()
            self._leave(answer)
        else:
            if self._chunked:
                self.pipeline.popleft()  # the latest, which is not complete
            self._refusal = refusal.answer(request_id)
            self._hold(b"")

    def _request_id(self) -> str:
        """Of a request whose head may be incomplete."""
        return request_id_of(next((value for name, value in self.headers or () if name == REQUEST_ID), None))

    def _leave(self, answer: bytes) -> None:
        """Sends a final response. Further bytes are read and discarded for a moment, so that it is not lost."""
        self._ignored = 0
        self._waits, self._held, self._refusal = True, b"", None
        self.flow.holding = False
        self._head_has_come()
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        self._joined.flush()
        self.transport.write(answer)
        self.transport.write_eof()
        self.flow.resume_reading()
        self.loop.call_later(LINGER, self.transport.close)

    # --- answers -----------------------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        cycle.transport = self._joined  # type: ignore[assignment]  # of which it uses no more
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        self._joined.flush()
        super().on_response_complete()
        if self._waits and self._ignored is None and not self.pipeline and not self.transport.is_closing():
            self._go_on()

    def _go_on(self) -> None:
        if self._refusal is not None:
            if self._running is None or self._running.response_complete:  # else after that answer
                self._leave(self._refusal)
            return
        held, self._held, self._waits = self._held, b"", False
        self.flow.holding = False
        self.flow.resume_reading()
        self.data_received(held)

    def pause_writing(self) -> None:
        super().pause_writing()
        now = self.loop.time()
        if not self._unsent:
            self.progress = now
        self._unsent = self.transport.get_write_buffer_size()
        self.limits.wait_for(self, self._unsent, now)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drained = True
        self._unsent = 0
        self.limits.unread.pop(self, None)

    def look(self, now: float) -> None:
        """Disconnects a client that has read nothing of its response for too long, even of a complete one."""
        unsent = self.transport.get_write_buffer_size()
        if self._drained or not unsent or unsent < self._unsent:
            self.progress = now
        elif now - self.progress >= self.limits.send_idle:
            self.transport.abort()
        self._unsent, self._drained = unsent, False


def look_after(connections: Iterable[Any], limits: Limits) -> None:
    """To be called periodically in the loop: disconnects clients that do not read, and trims the heap."""
    loop = asyncio.get_running_loop()
    now = loop.time()
    for connection in list(connections):
        if isinstance(connection, Protocol):
            connection.look(now)
    limits.shed(now)
    if limits.peak > WORTH_A_TRIM and not limits.unread:
        limits.peak = 0
        if hasattr(_LIBC, "malloc_trim"):
            loop.run_in_executor(None, _LIBC.malloc_trim, 0)


def _malformed(error: httptools.HttpParserError, piece: bytes) -> Refusal:
    if isinstance(error, httptools.HttpParserInvalidMethodError) and (method := _METHOD.match(piece)):
        return Refusal(501, "not-implemented", f"there is no method {method[0].strip().decode('latin-1')!r}")
    return Refusal(400, "bad-request", f"this is not an HTTP request: {str(error)[:200] or 'it has no valid target'}")
