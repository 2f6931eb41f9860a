"""Clients that are slow, stalled or many, and a server that stops under them."""

import http.client
import re
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest
from commands import FAST, Service

from faults.steps import LONG

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

DEADLINE = 1.0
HOST = b"POST /v1/upload HTTP/1.1\r\nhost: localhost\r\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Service]:
    """A server with time limits of one second."""
    patience = {"BATCHSERVE_HEAD_TIMEOUT": str(DEADLINE), "BATCHSERVE_BODY_IDLE": str(DEADLINE)}
    service = Service(tmp_path_factory.mktemp("clients"), "serve", "--port", "0", settings=FAST | patience)
    try:
        service.url = service.wait_for(r" at (http://\S+) ")[1]
        assert httpx2.put(f"{service.url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).is_success
        yield service
    finally:
        service.end(signal.SIGKILL)


def silent(_: socket.socket) -> None:
    """Sends nothing at all."""


def half_a_head(connection: socket.socket) -> None:
    connection.sendall(HOST + b"x-")


def a_line_each_moment(connection: socket.socket) -> None:
    """Sends bytes for ever, and never ends its head."""
    connection.sendall(HOST)
    for number in range(20):
        time.sleep(DEADLINE / 4)
        connection.sendall(b"x-%d: y\r\n" % number)


def a_byte_each_moment_after_an_answer(connection: socket.socket) -> None:
    connection.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert connection.recv(65536).startswith(b"HTTP/1.1 200")
    for _ in range(20):
        time.sleep(DEADLINE / 4)
        connection.sendall(b"\r\n")


def a_stalled_body(connection: socket.socket) -> None:
    connection.sendall(HOST + b"content-length: 1000\r\n\r\nabc")


SHAPES = (silent, half_a_head, a_line_each_moment, a_byte_each_moment_after_an_answer, a_stalled_body)


def seconds_until_closed(url: str, behave: Callable[[socket.socket], None]) -> float:
    address = urlsplit(url)
    began = time.monotonic()
    connection = socket.create_connection((address.hostname, address.port), timeout=10 * DEADLINE)
    with connection, suppress(ConnectionError):  # it is closed while it sends
        behave(connection)
        while connection.recv(65536):
            pass
    return time.monotonic() - began


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.__name__)
def test_a_slow_client_is_disconnected_within_its_deadline(
    service: Service, shape: Callable[[socket.socket], None], tried: Counter[str]
) -> None:
    assert 0.9 * DEADLINE < seconds_until_closed(service.url, shape) < 3 * DEADLINE
    tried["slow clients"] += 1


def test_good_clients_are_served_alongside_a_hundred_slow_ones(service: Service, tried: Counter[str]) -> None:
    with ThreadPoolExecutor(100) as pool, httpx2.Client(base_url=service.url, timeout=10) as good:
        slow = [pool.submit(seconds_until_closed, service.url, SHAPES[number % len(SHAPES)]) for number in range(100)]
        waits = []
        while not all(client.done() for client in slow):
            began = time.monotonic()
            assert good.get("/livez").status_code == 200
            assert good.post("/v1/upload", content=LONG).status_code == 201
            waits.append(time.monotonic() - began)
        assert max(client.result() for client in slow) < 5 * DEADLINE
    assert len(waits) > 5
    assert sorted(waits)[len(waits) // 2] < 0.25
    assert max(waits) < 2.0
    tried["slow clients"] += len(slow)


def test_a_client_that_pauses_between_two_requests_keeps_its_connection(service: Service) -> None:
    """The deadline applies only to a head that has begun."""
    address = urlsplit(service.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
    with closing(connection):
        for _ in range(3):
            connection.request("GET", "/livez")
            assert connection.getresponse().read().startswith(b'{"status":"ok"')
            connection.auto_open = 0  # a second connection would prove nothing
            time.sleep(1.5 * DEADLINE)


def test_requests_that_are_acknowledged_during_a_shutdown_survive_it(
    tmp_path: Path, iris_onnx: Path, tried: Counter[str]
) -> None:
    acknowledged: set[str] = set()
    statuses: Counter[int] = Counter()
    stopping = threading.Event()

    def hammer(url: str) -> None:
        with httpx2.Client(base_url=url, timeout=30) as client:
            while not stopping.is_set():
                try:
                    answer = client.post("/v1/predict", params={"model": "iris", "reuse": False}, content=LONG)
                except httpx2.TransportError:  # the server has stopped
                    return
                statuses[answer.status_code] += 1
                if answer.is_success:
                    acknowledged.add(answer.json()["id"])

    with ExitStack() as ends, ThreadPoolExecutor(4) as pool:
        service = Service(tmp_path, "serve", "--port", "0")
        ends.callback(service.end, signal.SIGKILL)
        ends.callback(stopping.set)
        url = service.wait_for(r" at (http://\S+) ")[1]
        assert httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).is_success
        clients = [pool.submit(hammer, url) for _ in range(4)]
        time.sleep(2)
        began = time.monotonic()
        assert service.end(signal.SIGTERM) in (0, -signal.SIGTERM)
        assert time.monotonic() - began < float(FAST["BATCHSERVE_GRACE"]) + 5
        for client in clients:
            client.result()
        assert not re.search(r"Traceback|Request meets", log := service.log.read_text()), log[-4000:]
        assert set(statuses) <= {202, 503}, statuses
        assert statuses[202] == len(acknowledged) > 5

        service = Service(tmp_path, "serve", "--port", "0")
        ends.callback(service.end, signal.SIGKILL)
        url = service.wait_for(r" at (http://\S+) ")[1]
        results = set()
        for job_id in sorted(acknowledged):
            job = httpx2.get(f"{url}/v1/jobs/{job_id}", params={"wait": 60}, timeout=70).json()
            while job["state"] in ("queued", "running"):
                job = httpx2.get(f"{url}/v1/jobs/{job_id}", params={"wait": 60}, timeout=70).json()
            assert job["state"] == "completed", job
            results.add(job["result"]["sha256"])
        assert len(results) == 1
    tried["stops under load"] += 1
