"""Limits of a real server on connections: bytes before the application sees them, and unread responses."""

import asyncio
import json
import re
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
import uvloop
from commands import FAST, Service, lowest_free_descriptor
from postgres import address_of
from sqlalchemy import text
from waiting import until

from batchserve.cli.joined import Joined
from batchserve.db.connect import Database

MIB = 1 << 20
SEND_IDLE = 2.0
HOST = b"Host: localhost\r\n"
GET = b"GET /livez HTTP/1.1\r\n" + HOST
CHUNKED = b"POST /v1/validate HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
PATIENT = FAST | {"BATCHSERVE_HEAD_TIMEOUT": "60", "BATCHSERVE_PROCESSES": "1"}


@contextmanager
def served(folder: Path, *arguments: str, open_files: int | None = None, **settings: str) -> Iterator[Service]:
    service = Service(folder, "serve", "--port", "0", *arguments, settings=PATIENT | settings, open_files=open_files)
    try:
        service.url = service.wait_for(r" at (http://\S+) ")[1]
        yield service
    finally:
        service.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server with a long time limit for a head, so that only limits on bytes can end it."""
    with served(tmp_path_factory.mktemp("wire"), "--no-worker") as service:
        yield service


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server that disconnects clients that do not read, with one job of 16 MiB that is never queued."""
    folder = tmp_path_factory.mktemp("unread")
    with served(folder, "--no-worker", BATCHSERVE_SEND_IDLE=str(SEND_IDLE)) as service:
        yield service


def connect(service: Service, *, takes: int | None = None) -> socket.socket:
    """A connection, optionally with a small receive buffer in the kernel."""
    address = urlsplit(service.url)
    connection = socket.socket()
    connection.settimeout(30)
    if takes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, takes)
    connection.connect((address.hostname, address.port))
    return connection


def everything(connection: socket.socket) -> bytes:
    """The bytes received until the server closes the connection."""
    came = []
    with suppress(ConnectionError):
        while block := connection.recv(65536):
            came.append(block)
    return b"".join(came)


def answer_to(service: Service, request: bytes) -> bytes:
    with connect(service) as connection:
        connection.sendall(request)
        return everything(connection)


def is_alive(connection: socket.socket) -> bool:
    connection.sendall(GET + b"\r\n")
    answer = b""
    while not answer.endswith(b'"}') and (block := connection.recv(65536)):
        answer += block
    return status_of(answer) == 200


def test_a_connection_goes_on_after_an_unexpected_error(tmp_path: Path) -> None:
    with served(tmp_path, "--no-worker") as service, connect(service) as connection:
        with closing(Database(address_of(tmp_path / "storage"))) as database, database.write() as writing:
            writing.execute(text("ALTER TABLE jobs RENAME TO lost"))
        connection.sendall(b"GET /v1/jobs HTTP/1.1\r\n" + HOST + b"\r\n")
        answer = b""
        while not answer.endswith(b"}"):
            answer += connection.recv(65536)
        assert status_of(answer) == 500
        assert b"internal-error" in answer
        assert is_alive(connection)


def test_a_short_response_comes_in_one_piece(service: Service) -> None:
    with connect(service) as connection:
        for _ in range(30):
            connection.sendall(GET + b"\r\n")
            assert connection.recv(65536).endswith(b'"}')


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def upload(service: Service, size: int) -> str:
    """The id of a job with an input of `size` bytes."""
    body = b"a\n" + b"1234567\n" * (size // 8)
    made = httpx2.post(f"{service.url}/v1/upload", content=body[:size], timeout=60)
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


# --- heads, trailers, chunks -----------------------------------------------------------------------------------------

ENDLESS: dict[str, tuple[bytes, bytes, int]] = {
    "header lines": (GET, b"x-%d: y\r\n" % 7 * 4096, 431),
    "a header's value": (GET + b"x: ", b"y" * 65536, 431),
    "a header's name": (GET, b"y" * 65536, 431),
    "a target": (b"GET /", b"y" * 65536, 414),
    "a query": (b"GET /livez?a=", b"y" * 65536, 414),
    "blank lines": (b"", b"\r\n" * 32768, 431),
    "trailers": (CHUNKED + b"0\r\n", b"x-t: y\r\n" * 8192, 431),
    "a trailer": (CHUNKED + b"0\r\nx: ", b"y" * 65536, 431),
    "an extension of a chunk": (CHUNKED + b"1;", b"y" * 65536, 431),
    "a second head": (GET + b"\r\n" + GET + b"x: ", b"y" * 65536, 431),
}


@pytest.mark.parametrize("shape", ENDLESS)
def test_endless_bytes_outside_of_a_body_are_refused(service: Service, shape: str) -> None:
    start, more, status = ENDLESS[shape]
    before = service.memory()
    with connect(service) as connection:
        sent = 0
        with suppress(ConnectionError):  # refused, and closed
            connection.sendall(start)
            while sent < 64 * MIB:
                connection.sendall(more)
                sent += len(more)
        assert sent < 16 * MIB  # at most the content of kernel buffers, far less than all of it
    with connect(service) as connection:
        connection.sendall(start + more * (66_000 // len(more) + 1))
        *_, last = everything(connection).split(b"HTTP/1.1 ")
    head, _, body = last.partition(b"\r\n\r\n")
    assert int(head[:3]) == status
    assert b"connection: close" in head
    assert json.loads(body)["status"] == status
    assert service.memory() - before < 24 * MIB


def test_a_head_of_ordinary_length_is_accepted_in_pieces_of_any_size(service: Service) -> None:
    request = GET + b"".join(b"x-%d: %s\r\n" % (number, b"y" * 400) for number in range(100)) + b"\r\n"
    assert len(request) < 65536
    with connect(service) as connection:
        for start in range(0, len(request), 977):
            connection.sendall(request[start : start + 977])
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


def test_a_request_has_at_most_256_headers(service: Service) -> None:
    assert status_of(answer_to(service, GET + b"a: b\r\n" * 300 + b"\r\n")) == 431
    assert status_of(answer_to(service, GET + b"connection: close\r\n" + b"a: b\r\n" * 200 + b"\r\n")) == 200


POST = b"POST /v1/validate HTTP/1.1\r\n"
AMBIGUOUS: dict[str, tuple[bytes, int]] = {
    "two framings": (POST + HOST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "two framings, turned": (POST + HOST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", 400),
    "two lengths": (POST + HOST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
    "a list of lengths": (POST + HOST + b"Content-Length: 3, 3\r\n\r\nabc", 400),
    "a signed length": (POST + HOST + b"Content-Length: +3\r\n\r\nabc", 400),
    "a huge length": (POST + HOST + b"Content-Length: 99999999999999999999999\r\n\r\nabc", 400),
    "an unknown coding": (POST + HOST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
    "a coding without an end": (POST + HOST + b"Transfer-Encoding: identity\r\n\r\nabc", 501),
    "chunked twice": (POST + HOST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400),
    "chunks in HTTP/1.0": (b"POST / HTTP/1.0\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
    "no host": (b"GET /livez HTTP/1.1\r\n\r\n", 400),
    "two hosts": (GET + b"Host: b\r\n\r\n", 400),
    "two hosts in HTTP/1.0": (b"GET /livez HTTP/1.0\r\nHost: localhost\r\nHost: b\r\n\r\n", 400),
    "HTTP/2": (b"GET /livez HTTP/2.0\r\nHost: localhost\r\n\r\n", 505),
    "an unknown method": (b"BREW /livez HTTP/1.1\r\nHost: localhost\r\n\r\n", 501),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
}  # fmt: skip


@pytest.mark.parametrize("shape", AMBIGUOUS)
def test_a_request_that_servers_could_frame_differently_is_refused_and_closed(service: Service, shape: str) -> None:
    request, status = AMBIGUOUS[shape]
    answer = answer_to(service, request + GET + b"\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert status_of(answer) == json.loads(body)["status"] == status  # and no second answer
    assert b"connection: close" in head


def test_a_refused_request_has_its_id_in_response_and_log(service: Service) -> None:
    named = b"GET /livez HTTP/1.1\r\n" + HOST + b"X-Request-ID: odd-7\r\nTransfer-Encoding: gzip\r\n\r\n"
    head, _, body = answer_to(service, named).partition(b"\r\n\r\n")
    assert b"x-request-id: odd-7\r\n" in head
    assert json.loads(body)["request_id"] == "odd-7"
    until(lambda: "odd-7" in service.log.read_text())
    for malformed in (b"nonsense\r\n\r\n", b"GET /livez HTTP/1.1\r\nX-Request-ID: \xff\r\n" + HOST * 2 + b"\r\n"):
        head, _, body = answer_to(service, malformed).partition(b"\r\n\r\n")
        found = re.search(rb"x-request-id: ([0-9a-f-]{36})(?:\r\n|$)", head)
        assert found is not None, head
        assert json.loads(body)["request_id"] == found[1].decode()


def test_http_1_0_needs_no_host_and_an_upgrade_without_a_body_is_ignored(service: Service) -> None:
    assert status_of(answer_to(service, b"GET /livez HTTP/1.0\r\n\r\n")) == 200
    upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: a\r\n\r\n"
    answer = answer_to(service, GET + upgrade + GET + b"Connection: close\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize("pause", [0.0, 0.05])
@pytest.mark.parametrize("framing", ["length", "chunks"])
def test_an_upgrade_with_a_body_is_ignored_and_the_body_read(service: Service, framing: str, pause: float) -> None:
    """Java's HttpClient requests HTTP/2 in this way."""
    content = b"a,b\n1,2\n"
    ask = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
    bodies = {
        "length": b"Content-Length: %d\r\n\r\n%b" % (len(content), content),
        "chunks": b"Transfer-Encoding: chunked\r\n\r\n3\r\na,b\r\n5\r\n\n1,2\n\r\n0\r\n\r\n",
    }
    request = b"POST /v1/upload HTTP/1.1\r\n" + HOST + ask + bodies[framing]
    with connect(service) as connection:
        for start in range(0, len(request), 90 if pause else len(request)):
            connection.sendall(request[start : start + (90 if pause else len(request))])
            time.sleep(pause)
        connection.sendall(GET + b"Connection: close\r\n\r\n")
        answer = everything(connection)
    assert answer.count(b"HTTP/1.1 201") == answer.count(b"HTTP/1.1 200") == 1
    newest = httpx2.get(f"{service.url}/v1/jobs", params={"limit": 1}).json()["jobs"][0]
    assert httpx2.get(f"{service.url}{newest['links']['input']}").content == content


def test_a_trailer_never_becomes_a_header(service: Service) -> None:
    job = upload(service, 100)
    tag = httpx2.get(f"{service.url}/v1/jobs/{job}").headers["etag"].encode()
    request = b"GET /v1/jobs/%s HTTP/1.1\r\n" % job.encode() + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n"
    request += b"If-None-Match: %s\r\n\r\n" % tag
    assert answer_to(service, request + GET + b"Connection: close\r\n\r\n").count(b"HTTP/1.1 200") == 2


def test_chunks_with_small_extensions_and_trailers_are_read(service: Service) -> None:
    chunks = b"".join(b"8;n=%d\r\n1234567\n\r\n" % number for number in range(20_000))
    head = b"POST /v1/upload HTTP/1.1\r\nConnection: close\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n"
    answer = answer_to(service, head + b"2\r\na\n\r\n" + chunks + b"0\r\nx: y\r\n\r\n")
    assert status_of(answer) == 201
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["input"]["bytes"] == 2 + 8 * 20_000


# --- pipelines -------------------------------------------------------------------------------------------------------


def test_pipelined_requests_are_answered_in_their_order(service: Service) -> None:
    """Bodies between them: by length, in chunks, and cut at any place."""
    get = b"GET /v1/jobs/%d HTTP/1.1\r\n" + HOST + b"\r\n"
    by_length = b"POST /v1/jobs/%d/retry HTTP/1.1\r\n" + HOST + b"Content-Length: 20000\r\n\r\n" + b"x" * 20_000
    chunked = b"POST /v1/jobs/%d/retry HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    kinds = (get, by_length, get, chunked)
    requests = b"".join(kinds[number % 4] % number for number in range(200)) + GET + b"Connection: close\r\n\r\n"
    with connect(service) as connection:
        connection.sendall(requests)
        answers = everything(connection)
    places = [answers.index(b"/v1/jobs/%d%s" % (n, b'/retry"' if n % 2 else b'"')) for n in range(200)]
    assert places == sorted(places)
    assert answers.count(b"HTTP/1.1 404") == 200
    assert answers.endswith(b'"}')


def test_an_invalid_request_is_refused_after_the_responses_to_those_before_it(service: Service) -> None:
    """Also when all of them came in one piece, after the end of a chunked body."""
    chunked = b"POST /v1/jobs/1/retry HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    asked = [b"GET /v1/jobs/%d HTTP/1.1\r\n" % number + HOST + b"\r\n" for number in range(2, 5)]
    for cut in (len(chunked), len(chunked) - 5):
        whole = chunked + b"".join(asked) + b"\0 / HTTP/1.1\r\n\r\n"
        with connect(service) as connection:
            connection.sendall(whole[:cut])
            time.sleep(0.1)
            connection.sendall(whole[cut:])
            answers = everything(connection)
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"404"] * 4 + [b"400"]
        assert [answers.index(b"/v1/jobs/%d" % number) for number in range(1, 5)] == sorted(
            answers.index(b"/v1/jobs/%d" % number) for number in range(1, 5)
        )
    assert "write_eof" not in service.log.read_text()


@pytest.mark.slow
def test_requests_whose_answers_are_not_read_take_no_memory(impatient: Service) -> None:
    job = upload(impatient, 2 * MIB)
    kinds = [
        b"GET /openapi.json HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /livez HTTP/1.1\r\n" + HOST + b"\r\n",
        b"GET /v1/download/%s/input HTTP/1.1\r\n" % job.encode() + HOST + b"\r\n",
        b"GET /v1/jobs/%s/events HTTP/1.1\r\n" % job.encode() + HOST + b"\r\n",
    ]
    httpx2.get(f"{impatient.url}/openapi.json", timeout=30)
    before, files = impatient.memory(), impatient.files()
    with ExitStack() as open_ones:
        most = 0
        for number in range(32):
            connection = open_ones.enter_context(connect(impatient, takes=4096))
            connection.settimeout(0.2)
            with suppress(TimeoutError, ConnectionError):
                connection.sendall(kinds[number % 4] * 8192)
            most = max(most, impatient.memory())
        assert httpx2.get(f"{impatient.url}/livez", timeout=10).is_success
        assert most - before < 96 * MIB
        # Also while their clients are still connected; but 8 event streams are quiet, and have no unread bytes.
        until(lambda: impatient.files() <= files + 8)


def test_a_refused_request_is_answered_after_those_before_it(service: Service) -> None:
    answer = answer_to(service, GET.replace(b"livez", b"readyz") + b"\r\n" + b"NONSENSE\r\n\r\n")
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] in ([b"200", b"400"], [b"200", b"501"])


# --- readers ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.alone
def test_a_client_that_reads_nothing_is_disconnected_and_a_slow_one_is_not(impatient: Service) -> None:
    job = upload(impatient, 16 * MIB)
    request = b"GET /v1/download/%s/input HTTP/1.1\r\nConnection: close\r\n" % job.encode() + HOST + b"\r\n"
    files = impatient.files()
    with connect(impatient, takes=65536) as slow, ExitStack() as silent:
        for _ in range(4):
            silent.enter_context(connect(impatient, takes=65536)).sendall(request)
        slow.sendall(request)
        began, came = time.monotonic(), 0
        while block := slow.recv(65536):
            came += len(block)
            time.sleep(0.03)
        assert came > 16 * MIB
        assert time.monotonic() - began > 2 * SEND_IDLE
        until(lambda: impatient.files() <= files)


@pytest.mark.sqlite
@pytest.mark.slow
def test_unread_responses_are_bounded_in_total_and_their_memory_is_freed(tmp_path: Path) -> None:
    with served(tmp_path, "--no-worker", BATCHSERVE_SEND_BYTES=str(16 * MIB)) as service, ExitStack() as silent:
        job = upload(service, 16 * MIB)
        assert httpx2.get(f"{service.url}/v1/download/{job}/input", timeout=30).is_success
        request = b"GET /v1/download/%s/input HTTP/1.1\r\n" % job.encode() + HOST + b"\r\n"
        before, files = service.memory(), service.files()
        for _ in range(400):
            silent.enter_context(connect(service, takes=4096)).sendall(request)
        assert httpx2.get(f"{service.url}/v1/download/{job}/input", timeout=30).is_success
        assert service.memory() - before < 256 * MIB  # 400 blocks of 1 MiB do not fit
        until(lambda: service.files() < files + 600)  # some keep waiting, each with a file; others were closed
        assert service.files() > files
        silent.close()
        until(lambda: service.files() <= files)
        until(lambda: service.memory() - before < 160 * MIB)  # glibc keeps 3 for each of 40 threads


@pytest.mark.slow
def test_a_response_is_no_longer_produced_when_its_client_has_disconnected(impatient: Service) -> None:
    """Also when the client has sent another request before it disconnected."""
    job = upload(impatient, 100)
    files = impatient.files()
    with connect(impatient) as connection:
        connection.sendall(b"GET /v1/jobs/%s/events HTTP/1.1\r\n" % job.encode() + HOST + b"\r\n" + GET + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
        # A reset, which is seen at the next write: the pipelined request has stopped the reading.
    until(lambda: impatient.files() <= files)
    time.sleep(0.5)
    assert "Traceback" not in impatient.log.read_text()


def test_what_is_joined_for_a_client_that_has_left_is_dropped_silently() -> None:
    faults: list[object] = []

    async def leave() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: faults.append(context))
        ours, theirs = socket.socketpair()
        with theirs:
            transport, _ = await loop.create_connection(asyncio.Protocol, sock=ours)
            joined = Joined(transport, loop)
            joined.write(b"a head")
            transport.abort()
            await asyncio.sleep(0)
            joined.write(b"a block")
            await asyncio.sleep(0.05)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(leave())
    assert faults == []


# --- descriptors -----------------------------------------------------------------------------------------------------

OPEN_FILES = 256
ROOM = (OPEN_FILES - 64 - 8 * 3) // 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("small"), "--no-worker", open_files=OPEN_FILES) as service:
        yield service


@pytest.mark.slow
def test_idle_connections_are_closed_for_new_ones_and_busy_ones_are_not(small: Service) -> None:
    job = upload(small, 16 * MIB)
    with connect(small, takes=65536) as download, connect(small) as kept, ExitStack() as idle:
        assert is_alive(kept)
        download.sendall(b"GET /v1/download/%s/input HTTP/1.1\r\nConnection: close\r\n" % job.encode() + HOST + b"\r\n")
        assert download.recv(100)
        for number in range(3 * OPEN_FILES):
            connection = idle.enter_context(connect(small))
            if number % 2:
                connection.sendall(GET)
            if number % 16 == 0:
                assert is_alive(kept)  # it has had a request: those without one are closed first
                assert httpx2.get(f"{small.url}/readyz", timeout=10).is_success
        assert small.files() < OPEN_FILES
        assert len(everything(download)) > 16 * MIB - 100


def test_a_connection_beyond_the_limit_gets_503_with_retry_after(small: Service) -> None:
    job = upload(small, 100)
    with ExitStack() as streams:
        followers = []
        for _ in range(ROOM):
            follower = streams.enter_context(connect(small))
            follower.sendall(b"GET /v1/jobs/%s/events HTTP/1.1\r\n" % job.encode() + HOST + b"\r\n")
            assert follower.recv(100).startswith(b"HTTP/1.1 200")
            followers.append(follower)
        for _ in range(3):
            beyond = streams.enter_context(connect(small))  # not closed by the client before the next one comes
            beyond.sendall(GET + b"\r\n")
            refused = everything(beyond)
            head, _, body = refused.partition(b"\r\n\r\n")
            assert status_of(refused) == 503
            assert b"retry-after: 1" in head
            assert b"connection: close" in head
            assert b"x-request-id: " in head
            assert json.loads(body)["code"] == "too-many-connections"
        followers.pop().close()
        until(lambda: status_of(answer_to(small, GET + b"Connection: close\r\n\r\n")) == 200)


def test_without_a_free_descriptor_the_server_neither_spins_nor_ends(small: Service) -> None:
    pid = small.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    with httpx2.Client(base_url=small.url, timeout=10) as client, ExitStack() as waiting:
        job, body = upload(small, MIB), b"a\n" + b"1\n" * 50_000  # files: small ones are rows of the database
        assert client.get(f"/v1/download/{job}/input").is_success
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(pid), before[1]))
        try:
            for _ in range(20):
                waiting.enter_context(connect(small))
            spent = _cpu_seconds(pid)
            for _ in range(10):
                time.sleep(0.2)
                assert client.get("/livez").is_success
            resource.prlimit(
                pid, resource.RLIMIT_NOFILE, (lowest_free_descriptor(pid), before[1])
            )  # the event loop keeps one descriptor
            for refused in (client.post("/v1/upload", content=body), client.get(f"/v1/download/{job}/input")):
                assert (refused.status_code, refused.json()["code"]) == (503, "unavailable")
                assert refused.headers["retry-after"]
            assert _cpu_seconds(pid) - spent < 1.0  # of two seconds
        finally:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    until(lambda: httpx2.get(f"{small.url}/readyz", timeout=10).is_success)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100
