"""Requests to addresses that clients choose, against servers on loopback that behave, and that do not."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest
from receivers import NAME, raw, receiving, tls

from batchserve.settings import networks_of
from batchserve.webhooks import outgoing
from batchserve.webhooks.outgoing import Aborted, NotSent, Outgoing

LOOPBACK = networks_of("127.0.0.0/8")
PUBLIC = "93.184.216.34"
HEADERS = {"webhook-id": "1"}
SOON = 20.0
"""Seconds within which a limit of a second has ended a request, on a machine under load."""


class Names:
    """A resolver, and what it was asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[str] = []
        self._answers = list(answers)

    def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


def to_loopback(context: ssl.SSLContext | None = None, seconds: float = 30.0, **how: Any) -> Outgoing:
    """Requests to any name go to loopback."""
    return Outgoing(LOOPBACK, seconds, resolve=Names(["127.0.0.1"]), context=context, **how)


def refused(out: Outgoing, url: str) -> str:
    """Why nothing was sent."""
    began = time.monotonic()
    with pytest.raises(NotSent) as error:
        out.post(url, HEADERS, b"{}")
    assert time.monotonic() - began < SOON
    return str(error.value)


# --- where to --------------------------------------------------------------------------------------------------------


def test_a_request_goes_to_the_checked_address_with_the_name_in_sni_and_certificate() -> None:
    site = tls()
    with receiving(context=site.server) as receiver:
        names = Names(["127.0.0.1"])
        out = Outgoing(LOOPBACK, 30.0, resolve=names, context=site.client)
        answer = out.post(f"{receiver.url}?a=b", HEADERS, b'{"type":"x"}')
    assert answer.status == 204
    (request,) = receiver.requests
    assert (request.path, request.body) == ("/hook?a=b", b'{"type":"x"}')
    assert request.headers["host"] == f"{NAME}:{receiver.port}"
    assert request.headers["webhook-id"] == "1"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["user-agent"].startswith("batchserve/")
    assert receiver.names == [NAME]
    assert names.asked == [NAME]


@pytest.mark.parametrize("names", [("other.example",), ("127.0.0.1",)])
def test_a_certificate_of_another_name_is_refused(names: tuple[str, ...]) -> None:
    site = tls(*names)
    with receiving(context=site.server) as receiver:
        assert f"the certificate of {NAME} was not accepted" in refused(to_loopback(site.client), receiver.url)
    assert receiver.requests == []


def test_a_certificate_of_an_unknown_authority_is_refused() -> None:
    with receiving(context=tls().server) as receiver:
        assert "was not accepted" in refused(to_loopback(), receiver.url)
        assert "was not accepted" in refused(to_loopback(tls().client), receiver.url)
    assert receiver.requests == []


def test_an_address_is_checked_by_its_own_certificate() -> None:
    site = tls("127.0.0.1")
    with receiving(context=site.server) as receiver:
        answer = to_loopback(site.client).post(f"https://127.0.0.1:{receiver.port}/", HEADERS, b"{}")
    assert answer.status == 204


@pytest.mark.parametrize(
    "addresses", [["127.0.0.1"], [PUBLIC, "127.0.0.1"], ["::1"], ["::ffff:127.0.0.1"], ["64:ff9b::7f00:1"]]
)
def test_a_host_with_any_address_that_is_not_public_is_not_connected_to(addresses: list[str]) -> None:
    site = tls()
    with receiving(context=site.server) as receiver:
        out = Outgoing((), 30.0, resolve=Names(addresses), context=site.client)
        said = refused(out, receiver.url)
    assert "not at a public address" in said
    assert "127.0.0.1" not in said  # what only the server's resolver knows
    assert receiver.names == []


def test_a_name_that_means_another_address_a_moment_later_is_of_no_effect() -> None:
    site = tls()
    with receiving(context=site.server) as receiver:
        rebinding = Names(["127.0.0.1"], ["10.0.0.1"])
        answer = Outgoing(LOOPBACK, 30.0, resolve=rebinding, context=site.client).post(receiver.url, HEADERS, b"{}")
        assert (answer.status, len(rebinding.asked)) == (204, 1)
        reverse = Names([PUBLIC, "10.0.0.1"], ["127.0.0.1"])
        assert "not at a public address" in refused(
            Outgoing(LOOPBACK, 30.0, resolve=reverse, context=site.client), receiver.url
        )
    assert len(receiver.requests) == 1


def test_the_resolver_of_the_host_is_asked_by_default() -> None:
    with receiving() as receiver:
        out = Outgoing(networks_of("127.0.0.0/8,::1/128"), 30.0)
        assert out.post(f"http://localhost:{receiver.port}/", HEADERS, b"{}").status == 204
        assert "has no address" in refused(out, "http://no-such-host.invalid/")
    assert "not at a public address" in refused(Outgoing((), 30.0), f"https://localhost:{receiver.port}/")


def test_http_is_for_allowed_networks_alone() -> None:
    with receiving() as receiver:
        url = f"http://{NAME}:{receiver.port}/"
        assert to_loopback().post(url, HEADERS, b"{}").status == 204
        for addresses in ([PUBLIC], ["127.0.0.1", PUBLIC]):
            out = Outgoing(LOOPBACK, 30.0, resolve=Names(addresses))
            assert "expected https" in refused(out, url)
    assert len(receiver.requests) == 1


@pytest.mark.parametrize(
    "url", ["https://user:secret@hooks.example/", "https://hooks.example:22/", "ftp://hooks.example/", "https://a b/"]
)
def test_an_address_of_another_form_is_not_even_resolved(url: str) -> None:
    names = Names(["127.0.0.1"])
    refused(Outgoing(LOOPBACK, 30.0, resolve=names), url)
    assert names.asked == []


def test_redirects_are_not_followed() -> None:
    with receiving() as other, receiving(lambda _: (302, {"location": other.url}, b"gone there")) as receiver:
        answer = to_loopback().post(receiver.url, HEADERS, b"{}")
    assert (answer.status, answer.beginning) == (302, "gone there")
    assert other.requests == []


def test_proxies_and_credentials_of_the_environment_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / ".netrc").write_text(f"machine {NAME} login me password secret\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    with receiving() as proxy, receiving() as receiver:
        for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert to_loopback().post(f"http://{NAME}:{receiver.port}/", HEADERS, b"{}").status == 204
    assert proxy.requests == []
    assert "authorization" not in receiver.requests[0].headers


# --- how long, and how much ------------------------------------------------------------------------------------------


def silent(connection: socket.socket) -> None:
    """Reads, and says nothing."""
    while connection.recv(1000):
        pass


def trickling(text: bytes, then: bytes) -> Callable[[socket.socket], None]:
    """Sends a beginning, and then the same a bit at a time, without an end."""

    def serve(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(text)
        while True:
            time.sleep(0.05)
            connection.sendall(then)

    return serve


def flooding(text: bytes, then: bytes) -> Callable[[socket.socket], None]:
    def serve(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(text)
        while True:
            connection.sendall(then * 100)

    return serve


@pytest.mark.parametrize(
    "serve",
    [
        silent,
        trickling(b"", b"H"),
        trickling(b"HTTP/1.1 200 OK\r\nx: ", b"y"),
        trickling(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        trickling(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["silence", "status line", "header", "headers", "informational"],
)
def test_a_receiver_that_does_not_answer_in_time_is_left(serve: Callable[[socket.socket], None]) -> None:
    with raw(serve) as port:
        assert "no response within 1 s" in refused(to_loopback(seconds=1.0), f"http://{NAME}:{port}/")


@pytest.mark.parametrize("serve", [silent, trickling(b"", b"\x16")], ids=["silence", "trickle"])
def test_a_handshake_that_does_not_end_is_left(serve: Callable[[socket.socket], None]) -> None:
    with raw(serve) as port:
        said = refused(to_loopback(tls().client, seconds=1.0), f"https://{NAME}:{port}/")
    assert "no response within 1 s" in said or "no TLS connection" in said


@contextmanager
def full_listener() -> Iterator[int]:
    """A port at which connections are not answered."""
    with closing(socket.socket()) as listener, ExitStack() as waiting:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # until its queue is full
            filling = waiting.enter_context(closing(socket.socket()))
            filling.setblocking(False)
            filling.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


def test_a_connection_that_is_not_made_in_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "_CONNECT", 0.3)
    with full_listener() as port:
        said = refused(to_loopback(), f"http://{NAME}:{port}/")
    assert "no connection to" in said


def test_a_resolver_that_does_not_answer_in_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "_CONNECT", 0.3)
    released = threading.Event()

    def resolve(_host: str, _port: int) -> Sequence[str]:
        released.wait(60)
        return ["127.0.0.1"]

    out = Outgoing(LOOPBACK, 30.0, resolve=resolve)
    assert "was not resolved within" in refused(out, f"https://{NAME}/")
    released.set()


@pytest.mark.parametrize(
    "serve",
    [
        flooding(b"", b"x"),
        flooding(b"HTTP/1.1 200 OK\r\nx: ", b"y"),
        flooding(b"HTTP/1.1 200 OK\r\n", b"x: y\r\n"),
        flooding(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["status line", "header", "headers", "informational"],
)
def test_a_head_without_an_end_is_left(serve: Callable[[socket.socket], None]) -> None:
    with raw(serve) as port:
        assert "not HTTP" in refused(to_loopback(), f"http://{NAME}:{port}/")


@pytest.mark.parametrize("head", [b"", b"content-length: 1000000\r\n"], ids=["until the end", "by length"])
def test_of_a_body_only_the_beginning_is_read(head: bytes) -> None:
    with raw(flooding(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n", b"body")) as port:
        answer = to_loopback().post(f"http://{NAME}:{port}/", HEADERS, b"{}")
    assert (answer.status, answer.beginning) == (200, "body" * 256)


def test_a_body_that_does_not_come_does_not_change_the_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "_READ_BODY", 0.3)
    with raw(trickling(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun", b"")) as port:
        answer = to_loopback().post(f"http://{NAME}:{port}/", HEADERS, b"{}")
    assert (answer.status, answer.beginning) == (200, "begun")


@pytest.mark.parametrize(
    "said",
    [b"", b"\0" * 100, b"SSH-2.0-OpenSSH_9.9\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\n" * 200 + b"\r\n"],
    ids=["nothing", "zeros", "ssh", "no status", "headers"],
)
def test_what_is_not_http_is_no_response(said: bytes) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(10_000)
        connection.sendall(said)

    with raw(serve) as port:
        assert refused(to_loopback(seconds=5.0), f"http://{NAME}:{port}/")


@pytest.mark.parametrize("body", [b"\0\xff\xfe text", "Zoë".encode()])
def test_the_beginning_of_a_response_is_text_that_can_be_stored(body: bytes) -> None:
    with receiving(lambda _: (500, {}, body)) as receiver:
        answer = to_loopback().post(receiver.url, HEADERS, b"{}")
    assert answer.status == 500
    assert "\0" not in answer.beginning
    assert answer.beginning.encode()


def test_a_closed_port_is_named() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    assert f"no connection to {NAME}:{port}: Connection refused" in refused(to_loopback(), f"http://{NAME}:{port}/")


def deaf(_connection: socket.socket) -> None:
    """Reads nothing, and says nothing."""
    threading.Event().wait(60)


@pytest.mark.parametrize(
    ("scheme", "serve", "size"),
    [("http", silent, 2), ("https", silent, 2), ("http", deaf, 50_000_000)],
    ids=["response", "handshake", "sending"],
)
def test_a_request_is_broken_off_when_the_process_stops(
    scheme: str, serve: Callable[[socket.socket], None], size: int
) -> None:
    stopping = threading.Event()
    with raw(serve) as port:
        threading.Timer(0.2, stopping.set).start()
        with pytest.raises(Aborted):
            to_loopback(tls().client, is_stopping=stopping.is_set).post(
                f"{scheme}://{NAME}:{port}/", HEADERS, b"x" * size
            )


def test_a_connection_that_is_not_made_is_broken_off_when_the_process_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outgoing, "_CONNECT", 30.0)
    stopping = threading.Event()
    with full_listener() as port:
        threading.Timer(0.2, stopping.set).start()
        with pytest.raises(Aborted):
            to_loopback(is_stopping=stopping.is_set).post(f"http://{NAME}:{port}/", HEADERS, b"{}")
