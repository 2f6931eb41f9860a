"""Jobs of the service over HTTP, step by step."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.environments import Unavailable
from benchmarks.http import fetch, send

WAIT = {"prefer": "wait=60"}
# Otherwise a second job with the same input would reuse the result of the first one.
AGAIN = "reuse=false"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Steps:
    """Seconds, and the CPU seconds of the server: in those of `predict`, and in all of them."""

    upload: float
    predict: float
    download: float
    predict_cpu: float
    cpu: float

    @property
    def together(self) -> float:
        return self.upload + self.predict + self.download


def register(url: str, name: str, graph: Path, headers: Mapping[str, str] | None = None) -> None:
    send(f"{url}/v1/models/{name}", "PUT", graph, headers)


def upload(url: str, source: Path, headers: Mapping[str, str] | None = None) -> str:
    """The ID of the new job."""
    return str(_json(send(f"{url}/v1/upload", "POST", source, headers))["id"])


def three_calls(
    url: str, model: str, source: Path, result: Path, format: str = "csv", *, used: Callable[[], float] = float
) -> Steps:
    """Measures upload, predict with wait, and download. The job is deleted, which is not measured.

    `used`: gives the CPU seconds of the server until now; its calls are not measured either.
    """
    start = used()
    job_id, uploaded = _timed(lambda: upload(url, source))
    before = used()
    target = f"{url}/v1/predict/{job_id}?{_query(model, format)}"
    _, predicted = _timed(lambda: _finished(url, _json(send(target, "POST", headers=WAIT))))
    predict_cpu = used() - before
    _, downloaded = _timed(lambda: fetch(f"{url}/v1/download/{job_id}", result))
    cpu = used() - start
    delete(url, job_id)
    return Steps(uploaded, predicted, downloaded, predict_cpu, cpu)


def one_call(
    url: str, model: str, source: Path, result: Path, format: str = "csv", *, used: Callable[[], float] = float
) -> tuple[float, float]:
    """The seconds of predict with a body and of download, and the CPU seconds of the server in them.

    The job is deleted, which is not measured. `used`: as in `three_calls`.
    """
    before, started = used(), time.perf_counter()
    job_id = _finished(url, _json(send(f"{url}/v1/predict?{_query(model, format)}", "POST", source, WAIT)))
    fetch(f"{url}/v1/download/{job_id}", result)
    taken, cpu = time.perf_counter() - started, used() - before
    delete(url, job_id)
    return taken, cpu


def delete(url: str, job_id: str) -> None:
    send(f"{url}/v1/jobs/{job_id}", "DELETE")


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    """What the call returns, and its seconds."""
    started = time.perf_counter()
    returned = call()
    return returned, time.perf_counter() - started


def _query(model: str, format: str) -> str:
    return f"model={model}&format={format}&{AGAIN}"


def _finished(url: str, job: dict[str, Any]) -> str:
    while job["state"] in ("queued", "running"):
        job = _json(send(f"{url}/v1/jobs/{job['id']}?wait=60", "GET"))
    if job["state"] != "completed" or job["rows"]["failed"]:
        raise Unavailable(f"the job ended as {job['state']}, rows {job['rows']}, error {job['error']}")
    return str(job["id"])


def _json(body: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(body)
    return answer
