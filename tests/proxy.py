"""A TCP proxy in front of an S3 server: it counts requests and bytes, and fails as a test tells it."""

import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

_REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) (\S+) HTTP/1\.1\r\n")
Mode = Literal["through", "away", "silent", "broken", "full", "unanswered", "flaky"]
"""`away`: connections are closed at once. `silent`: nothing is answered. `broken`: 503. `full`: 507. `unanswered`:
requests are carried out, and their connections closed instead of an answer. `flaky`: of five requests one is not
carried out, one not answered, and one answered late."""
_ERRORS = {
    mode: b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status
    for mode, status in (("broken", b"503 Slow Down"), ("full", b"507 Insufficient Storage"))
}


class Proxy:
    def __init__(self, port: int, listener: socket.socket | None = None) -> None:
        """To this port of this host. `listener`: where it listens, which may be on another host."""
        self._target = port
        self._listener = listener or socket.create_server(("127.0.0.1", 0))
        self.endpoint = "http://{}:{}".format(*self._listener.getsockname())
        self.mode: Mode = "through"
        self.requests: list[str] = []
        """Method and path of each."""
        self.sent = 0
        """Bytes of the answers, with their heads."""
        self._lock = threading.Lock()
        self._chance = random.Random(1)
        self._open: set[socket.socket] = set()
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def turn(self, mode: Mode) -> None:
        """What happens from now on, to open connections as well."""
        self.mode = mode
        if mode not in ("through", "flaky"):
            self._cut()

    @contextmanager
    def counted(self) -> Iterator["Counted"]:
        """Counts what the block causes."""
        counted, requests, sent = Counted(), len(self.requests), self.sent
        yield counted
        counted.requests, counted.sent = self.requests[requests:], self.sent - sent

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, self._held(client):
            if self.mode == "away":
                return
            if (error := _ERRORS.get(self.mode)) is not None:
                with suppress(OSError):
                    client.recv(2**16)
                    client.sendall(error)
                return
            if self.mode == "silent":
                with suppress(OSError):
                    while client.recv(2**16):
                        pass
                return
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._target)) as server, self._held(server):
                back = threading.Thread(target=self._answer, args=[server, client], daemon=True)
                back.start()
                self._ask(client, server)
                back.join()

    def _ask(self, client: socket.socket, server: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(2**18):
                found = [f"{method.decode()} {path.decode()}" for method, path in _REQUEST.findall(data)]
                with self._lock:
                    self.requests += found
                if self.mode == "flaky" and found and not self._pass(data, server):
                    client.shutdown(socket.SHUT_RDWR)
                    break
                server.sendall(data)
        with suppress(OSError):
            server.shutdown(socket.SHUT_WR)

    def _pass(self, data: bytes, server: socket.socket) -> bool:
        """Whether a request goes on."""
        match self._chance.randrange(5):
            case 0:
                return False
            case 1:
                server.sendall(data)
                time.sleep(0.02)  # it is carried out, if it is complete
                return False
            case 2:
                time.sleep(0.2)
        return True

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(2**18):
                if self.mode == "unanswered":
                    break
                with self._lock:
                    self.sent += len(data)
                client.sendall(data)
        for connection in (client, server):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _held(self, connection: socket.socket) -> Iterator[None]:
        with self._lock:
            self._open.add(connection)
        try:
            yield
        finally:
            with self._lock:
                self._open.discard(connection)


class Counted:
    """What a proxy has seen in a block."""

    requests: list[str]
    sent: int
