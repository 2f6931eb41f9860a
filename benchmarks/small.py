"""Jobs of few records, status polls and transfers."""

import asyncio
import json
import statistics
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from benchmarks import data, environments, nginx, processes, service
from benchmarks.environments import Unavailable
from benchmarks.http import Calls, fetch, latencies, request, run, send
from benchmarks.paths import Bench
from benchmarks.results import MB, Gap, Measurement

CLIENTS = 16
MODEL = "logistic"
TRANSFERS = ("upload: MB/s / nginx PUT", "download: MB/s / nginx GET")
CPU = 1.5
"""Milliseconds of user and system time of all processes of the server for a small job, while many clients submit."""
TRANSFERRED = 5
"""The number of repeats."""


@dataclass(frozen=True, slots=True)
class SmallGoals:
    """Of jobs of one size: the median of one client's, and those of CLIENTS clients in a second."""

    milliseconds: float
    jobs: int


JobCalls = Callable[[Calls, bytes], Awaitable[bytes]]


def measure(bench: Bench, *, seconds: float, rows: int) -> Iterator[Measurement | Gap]:
    """`seconds`: of each load; `rows`: of the big job and of the transferred file."""
    model = data.model(bench.folder, MODEL)
    with TemporaryDirectory(dir=bench.folder) as name:
        home = Path(name) / "server"
        home.mkdir()
        with processes.batchserve(home) as server, processes.bare(Path(name)) as bare:
            service.register(server.url, MODEL, model.graph)
            yield from _jobs(bench, server.url, server.pid, seconds)
            yield from _polls(bench, server.url, bare.url, seconds, rows)
            yield from _transfers(bench, server.url, Path(name), rows)


def _jobs(bench: Bench, url: str, pid: int, seconds: float) -> Iterator[Measurement]:
    for rows, goals in {1: SmallGoals(4.0, 800), 100: SmallGoals(5.0, 500)}.items():
        bench.say(f"small jobs of {rows} rows")
        content = data.table(bench.folder, "numbers", ".csv", rows).read_bytes()
        title = f"{rows} row{'s' if rows > 1 else ''}"
        run(_load(url, content, _three_calls, seconds=1.0, clients=CLIENTS))  # all processes are warm then
        for name, job in {"upload, predict, download": _three_calls, "one call, download": _one_call}.items():
            alone = run(_load(url, content, job, seconds=seconds, clients=1))
            before = processes.cpu_seconds(pid)
            many = run(_load(url, content, job, seconds=seconds, clients=CLIENTS))
            cpu = (processes.cpu_seconds(pid) - before) / len(many) * 1000
            most = f"{goals.milliseconds:g} ms"
            for what, percent in {"median": 50, "P99": 99}.items():
                yield Measurement(
                    f"small job, {title}: {what} of {name} / {most}", _ms(alone, percent), goals.milliseconds, "ms"
                )
            together = f"small jobs, {CLIENTS} clients, {title}, {name}:"
            per_second = CLIENTS / statistics.fmean(many)
            yield Measurement(f"{together} jobs per second / {goals.jobs}", per_second, goals.jobs, "jobs/s")
            yield Measurement(f"{together} CPU of a job / {CPU} ms", cpu, CPU, "ms")


async def _three_calls(calls: Calls, content: bytes) -> bytes:
    job_id = _id(await calls.call(request("POST", "/v1/upload", content)))
    target = f"/v1/predict/{job_id}?model={MODEL}&{service.AGAIN}"
    await calls.call(request("POST", target, headers=service.WAIT))
    return await calls.call(request("GET", f"/v1/download/{job_id}"))


async def _one_call(calls: Calls, content: bytes) -> bytes:
    target = f"/v1/predict?model={MODEL}&{service.AGAIN}"
    job_id = _id(await calls.call(request("POST", target, content, service.WAIT)))
    return await calls.call(request("GET", f"/v1/download/{job_id}"))


async def _load(url: str, content: bytes, job: JobCalls, *, seconds: float, clients: int) -> list[float]:
    """The seconds of every job, while each of `clients` runs one job after the other."""
    deadline = time.perf_counter() + seconds
    taken: list[float] = []
    rows = content.count(b"\n")

    async def client() -> None:
        calls = await Calls.connect(url)
        while (started := time.perf_counter()) < deadline:
            result = await job(calls, content)
            if result.count(b"\n") != rows:
                raise Unavailable(f"{rows - 1} rows in, but the result is {result[:500]!r}")
            taken.append(time.perf_counter() - started)
        calls.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return taken


def _polls(bench: Bench, url: str, bare: str, seconds: float, rows: int) -> Iterator[Measurement]:
    job_id = service.upload(url, data.table(bench.folder, "numbers", ".csv", 100))
    source = data.table(bench.folder, "numbers", ".csv", rows)
    asked, plain = request("GET", f"/v1/jobs/{job_id}"), request("GET", "/status")

    def both() -> tuple[list[float], list[float]]:
        """Two short loads of each program, interleaved."""
        ours, theirs = [], []
        for _ in range(2):
            theirs += run(latencies(bare, plain, seconds=seconds / 2, clients=CLIENTS))
            ours += run(latencies(url, asked, seconds=seconds / 2, clients=CLIENTS))
        return ours, theirs

    bench.say("status polls")
    ours, theirs = both()
    rates = len(ours) / seconds, len(theirs) / seconds
    yield Measurement("status polls, idle: requests per second / bare Starlette route", *rates, "req/s")
    with _big_jobs(url, source):
        ours, theirs = both()
        single = run(latencies(url, asked, seconds=seconds, clients=1))
    rates = len(ours) / seconds, len(theirs) / seconds
    title = "status polls, a big job runs"
    yield Measurement(f"{title}: requests per second / bare Starlette route", *rates, "req/s")
    yield Measurement(f"{title}: P99 / 5 ms", _ms(single, 99), 5, "ms")
    yield Measurement(
        f"{title}, {CLIENTS} clients at full speed: P99 / bare Starlette route", _ms(ours, 99), _ms(theirs, 99), "ms"
    )
    service.delete(url, job_id)


@contextmanager
def _big_jobs(url: str, source: Path) -> Iterator[None]:
    """Runs one big job after the other during the block."""
    ended = threading.Event()

    def jobs() -> None:
        while not ended.is_set():
            service.three_calls(url, MODEL, source, Path("/dev/null"))

    thread = threading.Thread(target=jobs)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _transfers(bench: Bench, url: str, folder: Path, rows: int) -> Iterator[Measurement | Gap]:
    bench.say("transfers")
    source = data.table(bench.folder, "numbers", ".csv", rows)
    size = source.stat().st_size / MB
    up: list[float] = []
    down: list[float] = []
    their_up: list[float] = []
    their_down: list[float] = []
    try:
        program = environments.nginx(bench.folder)
    except Unavailable as error:
        yield from (Gap(name, f"there is no nginx: {error}") for name in TRANSFERS)
        return
    with nginx.serving(program, folder / "nginx") as web:
        for _ in range(TRANSFERRED):
            started = time.perf_counter()
            send(f"{web}/input", "PUT", source)
            uploaded = time.perf_counter()
            fetch(f"{web}/input")
            their_up.append(uploaded - started)
            their_down.append(time.perf_counter() - uploaded)
            started = time.perf_counter()
            job_id = service.upload(url, source)
            uploaded = time.perf_counter()
            fetch(f"{url}/v1/download/{job_id}/input")
            up.append(uploaded - started)
            down.append(time.perf_counter() - uploaded)
            service.delete(url, job_id)
    speeds = [size / statistics.median(seconds) for seconds in (up, their_up, down, their_down)]
    yield Measurement(TRANSFERS[0], speeds[0], speeds[1], "MB/s", None, None, TRANSFERRED, TRANSFERRED)
    yield Measurement(TRANSFERS[1], speeds[2], speeds[3], "MB/s", None, None, TRANSFERRED, TRANSFERRED)


def _id(body: bytes) -> str:
    return str(json.loads(body)["id"])


def _ms(seconds: list[float], percent: int) -> float:
    return float(np.percentile(seconds, percent)) * 1000
