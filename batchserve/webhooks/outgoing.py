"""Requests to addresses that clients choose. Each goes to an address that was checked, and is bounded in time and size.

The name of a host is resolved once, all its addresses are checked, and the connection is made to one of them: what the
name means a moment later is of no effect. Certificate and SNI are those of the name. Redirects are not followed, no
proxy and no credential of the environment is used, and of the response only the beginning is read.
"""

import errno
import http.client
import io
import ipaddress
import os
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from batchserve import __version__
from batchserve.errors import presentable
from batchserve.settings import Network
from batchserve.webhooks.addresses import Address, IPAddress, is_allowed, is_within, parsed

__all__ = ["Aborted", "Answer", "NotSent", "Outgoing", "Resolve"]

T = TypeVar("T")

Resolve = Callable[[str, int], Sequence[str]]
"""The addresses of a host, for connections to a port. Raises OSError."""

_CONNECT = 5.0
"""Seconds to resolve a name, and to connect to an address."""
_READ_BODY = 2.0
"""Seconds for the body of a response, of which only the status counts."""
_MOST_ADDRESSES = 4
"""Addresses of a host that are tried."""
_MOST_BYTES = 64 * 1024
"""Bytes of a response that are read at most, head and body."""
_SHOWN = 1024
"""Bytes of its body that are kept."""
_SLICE = 0.25
"""Seconds after which a wait looks whether it is to be broken off."""
_UNDER_WAY = frozenset({errno.EINPROGRESS, errno.EWOULDBLOCK})


class NotSent(Exception):
    """There is no response; the text says why, without what only the network of the server knows."""


class Aborted(Exception):
    """The process stops."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    beginning: str
    """Of its body, as text."""


def resolved(host: str, port: int) -> Sequence[str]:
    """By the resolver of the host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


class Outgoing:
    """Sends POST requests. Safe from any thread."""

    def __init__(
        self,
        networks: Sequence[Network],
        seconds: float,
        *,
        resolve: Resolve = resolved,
        context: ssl.SSLContext | None = None,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`networks`: those allowed besides public addresses. `seconds`: for a whole request."""
        self._networks, self._seconds, self._resolve = networks, seconds, resolve
        self._given_context, self._is_stopping = context, is_stopping

    def post(self, url: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """The response. Raises NotSent, and Aborted when the process stops."""
        try:
            address = parsed(url)
        except ValueError as error:
            raise NotSent(str(error)) from None
        time_left = _TimeLeft(self._seconds, self._is_stopping)
        addresses = self._checked(address, time_left)
        try:
            with closing(_connected(addresses, address.port, time_left)) as plain:
                return self._exchange(plain, address, headers, body, time_left)
        except ssl.SSLCertVerificationError as error:
            raise NotSent(f"the certificate of {address.host} was not accepted: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise NotSent(f"no TLS connection to {address.host}: {error.reason or 'it was broken off'}") from None
        except TimeoutError:
            raise NotSent(f"no response within {self._seconds:g} s") from None
        except OSError as error:
            raise NotSent(f"no connection to {address.authority}: {error.strerror or error}") from None
        except http.client.HTTPException as error:
            raise NotSent(f"the response is not HTTP: {type(error).__name__}") from None

    def _checked(self, address: Address, time_left: "_TimeLeft") -> list[IPAddress]:
        """The addresses of a host, all of which are allowed."""
        answer: SimpleQueue[Sequence[str] | OSError | UnicodeError] = SimpleQueue()

        def resolve() -> None:
            try:
                answer.put(self._resolve(address.host, address.port))
            except (OSError, UnicodeError) as error:
                answer.put(error)

        # A thread, which ends when the resolver gives up: that has no limit of time.
        threading.Thread(target=resolve, name="resolver", daemon=True).start()
        found = time_left.next_of(answer, _CONNECT)
        if found is None:
            raise NotSent(f"the name {address.host} was not resolved within {_CONNECT:g} s")
        if isinstance(found, Exception) or not found:
            raise NotSent(f"the name {address.host} has no address")
        addresses = [ipaddress.ip_address(one) for one in found]
        if not all(is_allowed(one, self._networks) for one in addresses):
            raise NotSent(f"{address.host} is not at a public address, nor in an allowed network")
        if address.scheme == "http" and not all(is_within(one, self._networks) for one in addresses):
            raise NotSent(f"{address.host} is not in an allowed network: expected https")
        return addresses[:_MOST_ADDRESSES]

    def _exchange(
        self, plain: socket.socket, address: Address, headers: Mapping[str, str], body: bytes, time_left: "_TimeLeft"
    ) -> Answer:
        plain.settimeout(_SLICE)
        connection = plain
        if address.scheme == "https":
            connection = self._context.wrap_socket(
                plain, server_hostname=address.host.rstrip("."), do_handshake_on_connect=False
            )
        with closing(connection):
            if isinstance(connection, ssl.SSLSocket):
                time_left.in_slices(connection.do_handshake)
            unsent = memoryview(_request(address, headers, body))
            while unsent:
                unsent = unsent[time_left.in_slices(partial(connection.send, unsent)) :]
            return _read(connection, time_left)

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return self._given_context or ssl.create_default_context()


def _request(address: Address, headers: Mapping[str, str], body: bytes) -> bytes:
    lines = {
        "Host": address.authority,
        "User-Agent": f"batchserve/{__version__}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        "Connection": "close",
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST {address.target} HTTP/1.1\r\n{head}\r\n".encode("ascii") + body


def _connected(addresses: Sequence[IPAddress], port: int, time_left: "_TimeLeft") -> socket.socket:
    """A connection to one of these addresses. Raises OSError of the last."""
    failure: OSError = OSError("it has no address")
    for address in addresses:
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        seconds = min(_CONNECT, time_left.seconds())
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            _connect(connection, (str(address), port), seconds, time_left)
        except OSError as error:
            connection.close()
            failure = OSError(f"none within {seconds:.1f} s") if isinstance(error, TimeoutError) else error
        except Aborted:
            connection.close()
            raise
        else:
            return connection
    raise failure


def _connect(connection: socket.socket, to: tuple[str, int], seconds: float, time_left: "_TimeLeft") -> None:
    """Raises OSError, also when it takes longer, and Aborted."""
    until = time.monotonic() + seconds
    connection.setblocking(False)
    code = connection.connect_ex(to)
    if code in _UNDER_WAY:
        with selectors.DefaultSelector() as selector:
            selector.register(connection, selectors.EVENT_WRITE)
            while not selector.select(min(_SLICE, max(0.0, until - time.monotonic()))):
                time_left.seconds()
                if time.monotonic() >= until:
                    raise TimeoutError
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        raise OSError(code, os.strerror(code))


def _read(connection: socket.socket, time_left: "_TimeLeft") -> Answer:
    """The status of the response, and the beginning of its body, which may not come."""
    reading = _Reading(connection, time_left)
    response = http.client.HTTPResponse(reading, method="POST")  # type: ignore[arg-type]  # it only makes a file
    with closing(response):
        response.begin()
        time_left.shorten(_READ_BODY)
        beginning = b""
        with suppress(OSError, http.client.HTTPException):
            while len(beginning) < _SHOWN and (block := response.read1(_SHOWN - len(beginning))):
                beginning += block
        return Answer(response.status, str(presentable(beginning[:_SHOWN].decode(errors="replace"))))


class _TimeLeft:
    """The time that a request has."""

    def __init__(self, seconds: float, is_stopping: Callable[[], bool]) -> None:
        self._until, self._is_stopping = time.monotonic() + seconds, is_stopping

    def seconds(self) -> float:
        """Raises TimeoutError when none is left, and Aborted."""
        if self._is_stopping():
            raise Aborted
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def shorten(self, seconds: float) -> None:
        self._until = min(self._until, time.monotonic() + seconds)

    def in_slices(self, act: Callable[[], T]) -> T:
        """The result of a step of a socket whose timeout is a slice: one that is broken off by that goes on when it is
        called again. Raises TimeoutError and Aborted."""
        while True:
            self.seconds()
            with suppress(TimeoutError):
                return act()

    def next_of(self, queue: SimpleQueue[Any], seconds: float) -> Any:
        """What comes within so many seconds, or None."""
        until = time.monotonic() + min(seconds, self.seconds())
        while (left := until - time.monotonic()) > 0:
            self.seconds()
            with suppress(Empty):
                return queue.get(timeout=min(left, _SLICE))
        return None


class _Reading(io.RawIOBase):
    """The bytes of a response, bounded in number and time, as the file that `http.client` reads."""

    def __init__(self, connection: socket.socket, time_left: _TimeLeft) -> None:
        self._connection, self._time_left, self._bytes_left = connection, time_left, _MOST_BYTES

    def makefile(self, mode: str) -> io.BufferedReader:  # noqa: ARG002 - the form of a socket's
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._bytes_left:
            raise http.client.LineTooLong("head")
        part = memoryview(buffer)[: self._bytes_left]
        count = self._time_left.in_slices(partial(self._connection.recv_into, part))
        self._bytes_left -= count
        return count
