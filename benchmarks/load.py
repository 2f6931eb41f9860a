"""Loads of small jobs: each of some clients runs one job after the other on a connection of its own."""

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from benchmarks import service
from benchmarks.environments import Unavailable
from benchmarks.http import Calls, request, run
from benchmarks.results import Runs

MODEL = "logistic"
CLIENTS = 16
ROUNDS = 3
"""Loads of each kind, one of every program in turn; each gives one value, and a figure is their median."""
NO_HEADERS: Mapping[str, str] = MappingProxyType({})

JobCalls = Callable[[Calls, bytes, Mapping[str, str]], Awaitable[bytes]]


async def three_calls(calls: Calls, content: bytes, headers: Mapping[str, str]) -> bytes:
    job_id = _id(await calls.call(request("POST", "/v1/upload", content, headers)))
    target = f"/v1/predict/{job_id}?model={MODEL}&{service.AGAIN}"
    await calls.call(request("POST", target, headers={**service.WAIT, **headers}))
    return await calls.call(request("GET", f"/v1/download/{job_id}", headers=headers))


async def one_call(calls: Calls, content: bytes, headers: Mapping[str, str]) -> bytes:
    target = f"/v1/predict?model={MODEL}&{service.AGAIN}"
    job_id = _id(await calls.call(request("POST", target, content, {**service.WAIT, **headers})))
    return await calls.call(request("GET", f"/v1/download/{job_id}", headers=headers))


JOBS: dict[str, JobCalls] = {"upload, predict, download": three_calls, "one call, download": one_call}


def jobs(
    url: str, content: bytes, job: JobCalls, *, seconds: float, clients: int, headers: Mapping[str, str] = NO_HEADERS
) -> list[float]:
    """The seconds of every job, of which each client starts the last one within `seconds`, and at least one.

    Raises Unavailable when a result lacks records.
    """
    taken: list[float] = []
    rows = content.count(b"\n")

    async def client(deadline: float) -> None:
        calls = await Calls.connect(url)
        ended = 0.0
        while ended < deadline:
            started = time.perf_counter()
            result = await job(calls, content, headers)
            if result.count(b"\n") != rows:
                raise Unavailable(f"{rows - 1} rows in, but the result is {result[:500]!r}")
            ended = time.perf_counter()
            taken.append(ended - started)
        calls.close()

    async def together() -> None:
        deadline = time.perf_counter() + seconds
        await asyncio.gather(*(client(deadline) for _ in range(clients)))

    run(together())
    return taken


def per_second(taken: Sequence[float], clients: int = CLIENTS) -> float:
    """Of clients that were busy all the time."""
    return clients / statistics.fmean(taken)


def milliseconds(rounds: Sequence[Sequence[float]], percent: int) -> Runs:
    """The percentile of each round."""
    return Runs([1000 * float(np.percentile(taken, percent)) for taken in rounds])


def _id(body: bytes) -> str:
    return str(json.loads(body)["id"])
