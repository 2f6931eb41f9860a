"""Jobs of few records, status polls and transfers."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import truediv
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import data, environments, load, lone_sync, nginx, processes, service
from benchmarks.environments import Unavailable
from benchmarks.http import fetch, latencies, request, run, send
from benchmarks.load import CLIENTS, MODEL, ROUNDS, JobCalls
from benchmarks.paths import Bench
from benchmarks.peers.stopwatch import cpu_seconds
from benchmarks.processes import Server
from benchmarks.results import MB, Gap, Measurement, Runs

TRANSFERS = ("upload: MB/s / nginx PUT", "download: MB/s / nginx GET")
CPU = 1.5
"""Of a small job, while many clients submit: 1.5 ms of user and system time of all processes of the server."""
TRANSFERRED = 5
"""The number of repeats."""
STATUS = request("GET", "/status")
"""Of the bare route."""


@dataclass(frozen=True, slots=True)
class SmallGoals:
    """Of jobs of one size: the median of one client's, and those of CLIENTS clients in a second."""

    milliseconds: float
    jobs: int


GOALS = {1: SmallGoals(4.0, 800), 100: SmallGoals(5.0, 500)}
"""By the number of rows: 4 ms and 5 ms, 800 and 500 jobs."""


@dataclass
class JobRounds:
    """What one load of each kind gave in every round, and the bare route and a lone sync next to it."""

    alone: list[list[float]] = field(default_factory=list)
    """Seconds of each job of one client."""
    sync: Runs = field(default_factory=Runs)
    """Milliseconds of a lone sync."""
    rate: Runs = field(default_factory=Runs)
    """Jobs of CLIENTS clients in a second."""
    cpu: Runs = field(default_factory=Runs)
    """Milliseconds of CPU time of one of them."""
    bare_rate: Runs = field(default_factory=Runs)
    bare_cpu: Runs = field(default_factory=Runs)


def measure(bench: Bench, *, seconds: float, rows: int) -> Iterator[Measurement | Gap]:
    """`seconds`: of each load; `rows`: of the big job and of the transferred file."""
    model = data.model(bench.folder, MODEL)
    with TemporaryDirectory(dir=bench.folder) as name:
        home = Path(name) / "server"
        home.mkdir()
        with processes.batchserve(home) as server, processes.bare(Path(name)) as bare:
            service.register(server.url, MODEL, model.graph)
            for count, goals in GOALS.items():
                bench.say(f"small jobs of {count} rows")
                content = data.table(bench.folder, "numbers", ".csv", count).read_bytes()
                load.jobs(server.url, content, load.three_calls, seconds=1.0, clients=CLIENTS)  # all are warm then
                for what, job in load.JOBS.items():
                    rounds = _rounds(server, bare, home, content, job, seconds / ROUNDS)
                    yield from _jobs(f"{count} row{'s' if count > 1 else ''}", what, goals, rounds)
            yield from _polls(bench, server.url, bare.url, seconds, rows)
            yield from _transfers(bench, server.url, Path(name), rows)


def _rounds(server: Server, bare: Server, home: Path, content: bytes, job: JobCalls, seconds: float) -> JobRounds:
    """`seconds`: of each load; that of the bare route takes a third."""
    rounds = JobRounds()
    for _ in range(ROUNDS):
        rounds.sync.add(1000 * lone_sync.seconds(home))
        rounds.alone.append(load.jobs(server.url, content, job, seconds=seconds, clients=1))
        before = cpu_seconds(server.pid)
        done = load.jobs(server.url, content, job, seconds=seconds, clients=CLIENTS)
        rounds.rate.add(load.per_second(done))
        rounds.cpu.add(1000 * (cpu_seconds(server.pid) - before) / len(done))
        before = cpu_seconds(bare.pid)
        called = run(latencies(bare.url, STATUS, seconds=seconds / 3, clients=CLIENTS))
        rounds.bare_rate.add(load.per_second(called))
        rounds.bare_cpu.add(1000 * (cpu_seconds(bare.pid) - before) / len(called))
    return rounds


def _jobs(size: str, what: str, goals: SmallGoals, rounds: JobRounds) -> Iterator[Measurement]:
    most = f"{goals.milliseconds:g} ms"
    alone, median = f"small job, {size}:", load.milliseconds(rounds.alone, 50)
    yield Measurement.of(f"{alone} median of {what} / {most}", median, goals.milliseconds, "ms")
    yield Measurement.of(f"{alone} median of {what} / a lone sync", median, rounds.sync, "ms")
    worst = load.milliseconds(rounds.alone, 99)
    yield Measurement.of(f"{alone} P99 of {what} / {most}", worst, goals.milliseconds, "ms")
    many = f"small jobs, {CLIENTS} clients, {size}, {what}:"
    yield Measurement.of(f"{many} jobs per second / {goals.jobs}", rounds.rate, goals.jobs, "jobs/s")
    yield Measurement.of(f"{many} jobs per second / bare Starlette route", rounds.rate, rounds.bare_rate, "1/s")
    yield Measurement.of(f"{many} CPU of a job / {CPU} ms", rounds.cpu, CPU, "ms")
    yield Measurement.of(f"{many} CPU of a job / bare Starlette route", rounds.cpu, rounds.bare_cpu, "ms")


def _polls(bench: Bench, url: str, bare: str, seconds: float, rows: int) -> Iterator[Measurement]:
    job_id = service.upload(url, data.table(bench.folder, "numbers", ".csv", 100))
    source = data.table(bench.folder, "numbers", ".csv", rows)
    asked = {url: request("GET", f"/v1/jobs/{job_id}"), bare: STATUS}

    def both(clients: int) -> tuple[list[list[float]], list[list[float]]]:
        """Short loads of each program, in turn: the seconds of every call of each round, ours and the bare route's."""
        rounds: dict[str, list[list[float]]] = {url: [], bare: []}
        for _ in range(ROUNDS):
            for server, taken in rounds.items():
                taken.append(run(latencies(server, asked[server], seconds=seconds / ROUNDS, clients=clients)))
        return rounds[url], rounds[bare]

    bench.say("status polls")
    ours, theirs = both(CLIENTS)
    title, per_second = "status polls, idle", "requests per second / bare Starlette route"
    yield Measurement.of(f"{title}: {per_second}", _rates(ours), _rates(theirs), "req/s")
    with _big_jobs(url, source):
        ours, theirs = both(CLIENTS)
        single, their_single = both(1)
    title = "status polls, a big job runs"
    yield Measurement.of(f"{title}: {per_second}", _rates(ours), _rates(theirs), "req/s")
    worst, their_worst = load.milliseconds(single, 99), load.milliseconds(their_single, 99)
    yield Measurement.of(f"{title}: P99 / 5 ms", worst, 5, "ms")
    yield Measurement.of(f"{title}: P99 / bare Starlette route", worst, their_worst, "ms")
    worst, their_worst = load.milliseconds(ours, 99), load.milliseconds(theirs, 99)
    title = f"{title}, {CLIENTS} clients at full speed"
    yield Measurement.of(f"{title}: P99 / bare Starlette route", worst, their_worst, "ms")
    service.delete(url, job_id)


def _rates(rounds: list[list[float]]) -> Runs:
    return Runs([load.per_second(taken) for taken in rounds])


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
    up, down, their_up, their_down = Runs(), Runs(), Runs(), Runs()
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
            their_up.add(uploaded - started)
            their_down.add(time.perf_counter() - uploaded)
            started = time.perf_counter()
            job_id = service.upload(url, source)
            uploaded = time.perf_counter()
            fetch(f"{url}/v1/download/{job_id}/input")
            up.add(uploaded - started)
            down.add(time.perf_counter() - uploaded)
            service.delete(url, job_id)
    for name, ours, theirs in zip(TRANSFERS, (up, down), (their_up, their_down), strict=True):
        yield Measurement.of(name, ours.each(partial(truediv, size)), theirs.each(partial(truediv, size)), "MB/s")
