"""Jobs of the service over HTTP, step by step."""

import json
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.environments import Unavailable
from benchmarks.http import fetch, send

WAIT = {"prefer": "wait=60"}
# Otherwise a second job with the same input would reuse the result of the first one.
AGAIN = "reuse=false"


@dataclass(frozen=True, slots=True)
class Steps:
    """Seconds."""

    upload: float
    predict: float
    download: float

    @property
    def together(self) -> float:
        return self.upload + self.predict + self.download


def register(url: str, name: str, graph: Path) -> None:
    send(f"{url}/v1/models/{name}", "PUT", graph)


def upload(url: str, source: Path) -> str:
    """The ID of the new job."""
    return str(_json(send(f"{url}/v1/upload", "POST", source))["id"])


def three_calls(url: str, model: str, source: Path, result: Path, format: str = "csv") -> Steps:
    """Measures upload, predict with wait, and download. The job is deleted, which is not measured."""
    moments = [time.perf_counter()]
    job_id = upload(url, source)
    moments.append(time.perf_counter())
    _finished(url, _json(send(f"{url}/v1/predict/{job_id}?{_query(model, format)}", "POST", headers=WAIT)))
    moments.append(time.perf_counter())
    fetch(f"{url}/v1/download/{job_id}", result)
    moments.append(time.perf_counter())
    delete(url, job_id)
    return Steps(*(after - before for before, after in pairwise(moments)))


def one_call(url: str, model: str, source: Path, result: Path, format: str = "csv") -> float:
    """The seconds of predict with a body and of download. The job is deleted, which is not measured."""
    started = time.perf_counter()
    job_id = _finished(url, _json(send(f"{url}/v1/predict?{_query(model, format)}", "POST", source, WAIT)))
    fetch(f"{url}/v1/download/{job_id}", result)
    taken = time.perf_counter() - started
    delete(url, job_id)
    return taken


def delete(url: str, job_id: str) -> None:
    send(f"{url}/v1/jobs/{job_id}", "DELETE")


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
