"""A database server instead of the embedded database: the same loads to a service on each."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks import data, load, processes, servers, service
from benchmarks.http import latencies, request, run
from benchmarks.load import CLIENTS
from benchmarks.paths import Bench
from benchmarks.results import Measurement, Runs

TITLE = "PostgreSQL"
ROUNDS = 4
"""Loads of each kind, of each service in turn, and each as often first as second."""


def measure(bench: Bench, *, seconds: float) -> Iterator[Measurement]:
    """`seconds`: of all loads of one kind."""
    content = data.table(bench.folder, "numbers", ".csv", 1).read_bytes()
    graph = data.model(bench.folder, load.MODEL).graph
    with TemporaryDirectory(dir=bench.folder) as name, servers.database() as address:
        homes = Path(name) / "server", Path(name) / "embedded"
        for home in homes:
            home.mkdir()
        with (
            processes.batchserve(homes[0], BATCHSERVE_DATABASE=address) as ours,
            processes.batchserve(homes[1]) as embedded,
        ):
            for each in (ours, embedded):
                service.register(each.url, load.MODEL, graph)
            yield from _compared(bench, (ours.url, embedded.url), content, seconds / ROUNDS)


def _compared(bench: Bench, urls: tuple[str, str], content: bytes, seconds: float) -> Iterator[Measurement]:
    waiting = {url: _waiting(url, content) for url in urls}

    def jobs(url: str, clients: int) -> float:
        return load.per_second(load.jobs(url, content, load.three_calls, seconds=seconds, clients=clients), clients)

    def polls(url: str, clients: int) -> float:
        asked = request("GET", f"/v1/jobs/{waiting[url]}")
        return load.per_second(run(latencies(url, asked, seconds=seconds, clients=clients)), clients)

    kinds: dict[str, tuple[str, Callable[[str, int], float]]] = {
        "small jobs, 1 row, upload, predict, download: jobs per second": ("jobs/s", jobs),
        "status polls, idle: requests per second": ("req/s", polls),
    }
    for kind, (unit, rate) in kinds.items():
        for clients in (1, CLIENTS):
            name = f"{TITLE}, {clients} client{'s' if clients > 1 else ''}, {kind}"
            bench.say(name)
            rates = Runs(), Runs()
            for url in urls:
                rate(url, clients)  # all processes are warm then
            for number in range(ROUNDS):
                both = list(zip(rates, urls, strict=True))
                for runs, url in reversed(both) if number % 2 else both:
                    runs.add(rate(url, clients))
            yield Measurement.of(f"{name} / SQLite", *rates, unit)


def _waiting(url: str, content: bytes) -> str:
    """A job that stays as it is."""
    with TemporaryDirectory() as name:
        source = Path(name) / "rows.csv"
        source.write_bytes(content)
        return service.upload(url, source)
