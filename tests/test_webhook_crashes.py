"""Kills of the processes that deliver webhooks, at every step: nothing is lost, and the ID stays."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import FAST, Service
from receivers import Received, Receiver, receiving
from service import ok
from standardwebhooks import Webhook as Verifier
from waiting import until

pytestmark = pytest.mark.slow

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
SETTINGS = {
    **FAST,
    "BATCHSERVE_PROCESSES": "1",
    "BATCHSERVE_FREE_BYTES": "0",
    "BATCHSERVE_WEBHOOK_NETWORKS": "127.0.0.0/8",
    "BATCHSERVE_WEBHOOK_TIMEOUT": "1",  # a lease is three of these
}


@contextmanager
def served(folder: Path, *arguments: str) -> Iterator[tuple[Service, httpx2.Client]]:
    service = Service(folder, "serve", "--port", "0", *arguments, settings=SETTINGS)
    try:
        url = service.wait_for(r" at (http://\S+) ")[1]
        with httpx2.Client(base_url=url, timeout=60) as http:
            yield service, http
    finally:
        service.end()


def prepared(folder: Path, url: str) -> tuple[str, str]:
    """An uploaded job, and the secret of an endpoint at this address, in a server that has stopped."""
    with served(folder, "--no-worker") as (_, http):
        secret = ok(http.post("/v1/webhooks", json={"url": url}), 201)["secret"]
        return ok(http.post("/v1/upload", content=CSV), 201)["id"], secret


def states(http: httpx2.Client) -> list[str]:
    (webhook,) = ok(http.get("/v1/webhooks"))["webhooks"]
    return [one["state"] for one in ok(http.get(webhook["links"]["deliveries"]))["deliveries"]]


def test_what_ended_before_a_kill_is_delivered_after_it(tmp_path: Path) -> None:
    with receiving() as receiver:
        job_id, secret = prepared(tmp_path, receiver.url)
        with served(tmp_path, "--no-worker") as (service, http):
            ok(http.post(f"/v1/jobs/{job_id}/cancel"), 202)
            service.end(signal.SIGKILL)
        with served(tmp_path) as (_, http):
            (request,) = receiver.wait(1)
            until(lambda: states(http) == ["delivered"])
    event = Verifier(secret).verify(request.body, dict(request.headers))
    assert (event["type"], event["data"]["id"]) == ("job.cancelled", job_id)


@pytest.mark.parametrize("answers", [False, True], ids=["during an attempt", "before its outcome is known"])
def test_a_kill_at_an_attempt_repeats_it_with_the_same_id(answers: bool, tmp_path: Path) -> None:
    kills: list[Callable[[], Any]] = []

    def kill(_: Received) -> int:
        if kills:
            kills.pop()()
            if not answers:
                threading.Event().wait(1.0)
        return 204

    with receiving(kill) as receiver:
        job_id, secret = prepared(tmp_path, receiver.url)
        with served(tmp_path) as (service, http):
            kills.append(lambda: os.kill(service.process.pid, signal.SIGKILL))
            with suppress(httpx2.TransportError):  # the kill may come before the response
                http.post(f"/v1/jobs/{job_id}/cancel")
            service.process.wait(30)
        with served(tmp_path) as (_, http):
            until(lambda: states(http) == ["delivered"])
            found = list(receiver.requests)
    assert len(found) >= 2
    assert len({request.id for request in found}) == 1
    for request in found:
        assert Verifier(secret).verify(request.body, dict(request.headers))["data"]["id"] == job_id


def test_after_kills_under_load_every_end_has_arrived(tmp_path: Path, iris_onnx: Path) -> None:
    """Each end at least once, and each once by its ID."""
    with receiving() as receiver:
        ends: set[str] = set()
        with served(tmp_path) as (_, http):
            ok(http.put("/v1/models/iris", content=iris_onnx.read_bytes()), 201)
            ok(http.post("/v1/webhooks", json={"url": receiver.url}), 201)
        for _ in range(4):
            with served(tmp_path) as (service, http):
                enough = len(receiver.requests) + 6
                killing = threading.Thread(target=_kill_when, args=[service, receiver, enough])
                killing.start()
                try:
                    while True:
                        answer = http.post("/v1/predict?model=iris&reuse=false", content=CSV)
                        ends.add(answer.json()["id"])
                except httpx2.TransportError:
                    pass
                killing.join()
        with served(tmp_path) as (_, http):
            until(lambda: "pending" not in states(http))

            until(lambda: ends <= {request.event["data"]["id"] for request in receiver.requests})
    by_job: dict[str, set[str]] = {}
    for request in receiver.requests:
        by_job.setdefault(request.event["data"]["id"], set()).add(request.id)
    assert {len(ids) for ids in by_job.values()} == {1}


def _kill_when(service: Service, receiver: Receiver, requests: int) -> None:
    until(lambda: len(receiver.requests) >= requests)
    service.process.kill()
