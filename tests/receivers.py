"""Servers on loopback that take webhooks, and servers that do not behave."""

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import orjson
import trustme
from waiting import until

__all__ = ["Received", "Receiver", "Site", "raw", "receiving", "tls"]

NAME = "hooks.example"
"""The name of a host that tests resolve to loopback."""


@dataclass(frozen=True)
class Received:
    """A request as it came."""

    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def event(self) -> dict[str, Any]:
        found: dict[str, Any] = orjson.loads(self.body)
        return found


Behaviour = Callable[[Received], int | tuple[int, Mapping[str, str], bytes]]
"""The status of the response to a request, possibly with headers and a body."""


@dataclass
class Receiver:
    """A server that keeps what it is sent."""

    port: int
    scheme: str
    behaviour: Behaviour
    requests: list[Received] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    """Of the hosts that clients asked for by SNI."""

    @property
    def url(self) -> str:
        return f"{self.scheme}://{NAME if self.scheme == 'https' else '127.0.0.1'}:{self.port}/hook"

    def wait(self, count: int, seconds: float = 60.0) -> list[Received]:
        """The requests, when so many have come."""
        until(lambda: len(self.requests) >= count, seconds)
        return list(self.requests)


@contextmanager
def receiving(
    behaviour: Behaviour = lambda _: 204, context: ssl.SSLContext | None = None, port: int = 0
) -> Iterator[Receiver]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("content-length", 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            received = Received(self.path, headers, self.rfile.read(length))
            receiver.requests.append(received)
            with suppress(OSError):  # the client may have left
                self._answer(receiver.behaviour(received))

        def do_GET(self) -> None:
            self.do_POST()

        def do_CONNECT(self) -> None:
            self.do_POST()

        def _answer(self, answer: int | tuple[int, Mapping[str, str], bytes]) -> None:
            status, headers, body = answer if isinstance(answer, tuple) else (answer, {}, b"")
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass

    server = Server(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    receiver = Receiver(server.server_address[1], "http" if context is None else "https", behaviour)
    if context is not None:
        context.sni_callback = lambda _socket, name, _context: receiver.names.append(name)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=[0.05], daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass(frozen=True)
class Site:
    """A certificate authority, and the contexts of a server with a certificate of it and of a client that trusts it."""

    authority: trustme.CA
    server: ssl.SSLContext
    client: ssl.SSLContext


def tls(*names: str) -> Site:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*(names or (NAME,))).configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return Site(authority, server, client)


@contextmanager
def raw(serve: Callable[[socket.socket], None]) -> Iterator[int]:
    """The port of a server that does this with each connection, in a thread. Its errors end the connection."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()
    opened: list[socket.socket] = []

    def one(connection: socket.socket) -> None:
        with suppress(OSError), closing(connection):
            serve(connection)

    def accept() -> None:
        with suppress(OSError):
            while not ended.is_set():
                connection, _ = listener.accept()
                opened.append(connection)
                threading.Thread(target=one, args=[connection], daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        for connection in opened:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes `accept`
        listener.close()
        thread.join()
