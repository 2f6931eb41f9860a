"""What is measured: the costs on each kind of database and storage, and whole jobs to compare a simulation with."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from batchserve.settings import Settings
from benchmarks import data, processes, servers, service
from benchmarks.environments import Unavailable
from benchmarks.scaling import chunks, database
from benchmarks.scaling.chunks import ChunkCosts, Dispatch
from benchmarks.scaling.database import DatabaseCosts
from benchmarks.scaling.simulation import Cluster, Costs, simulate

__all__ = ["Measured", "Site", "Sizes", "measure"]

MODEL = "logistic"
WARMING = 100_000
MOST_TEXT = 500_000
"""Rows of the CSV, which is only planned and read."""
ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class Sizes:
    rows: int
    """Of the job."""
    chunks: int
    """Of each measurement of a database."""
    calls: int
    repeats: int
    processes: int


@dataclass(frozen=True, slots=True)
class Site:
    """A database and a storage."""

    name: str
    database: DatabaseCosts
    chunks: ChunkCosts
    text: ChunkCosts
    """Of a CSV."""
    rows: int
    seconds: tuple[float, ...]
    """From queued to completed, of whole jobs by a server and its processes."""

    def costs(self, dispatch: Dispatch) -> Costs:
        return Costs(
            driver=max(0.0, self.database.driver - self.database.commit) + dispatch.cpu,
            commit=self.database.commit,
            commits=self.database.commits,
            claim=self.database.claim,
            plan=self.chunks.plan,
            read=self.chunks.read,
            score=self.chunks.score,
            write=self.chunks.write,
            assemble=self.chunks.assemble,
            bytes=round(self.chunks.input_bytes + self.chunks.part_bytes),
        )

    def predicted(self, dispatch: Dispatch, processes: int) -> float:
        return simulate(self.chunks.chunks, self.costs(dispatch), Cluster(1, processes)).seconds


@dataclass(frozen=True, slots=True)
class Measured:
    sites: tuple[Site, ...]
    local: Dispatch
    ray: Dispatch | None
    missing: dict[str, str]
    """What was not measured, with the reasons."""
    load: float
    """Average of the minute before."""
    sizes: Sizes


def measure(folder: Path, sizes: Sizes, say: Callable[[str], None]) -> Measured:
    load, missing = os.getloadavg()[0], dict[str, str]()
    found, ray = [], None
    with TemporaryDirectory(dir=folder) as name:
        home = Path(name)
        say("dispatch")
        local = chunks.dispatch(
            Settings(storage=str(home / "local"), processes=sizes.processes, process_nice=0),
            sizes.processes,
            sizes.calls,
        )
        try:
            say("dispatch on Ray")
            ray = _on_ray(home / "ray", sizes.calls)
        except Unavailable as error:
            missing["Ray"] = str(error)
        for opened in (_embedded, _of_servers):
            try:
                with opened(home) as (title, address, storage, environment):
                    say(title)
                    with patch.dict(os.environ, environment):
                        found.append(_site(title, folder, home / title[:6], address, storage, sizes))
            except Unavailable as error:
                missing["PostgreSQL and SeaweedFS"] = str(error)
    return Measured(tuple(found), local, ray, missing, load, sizes)


_Opened = tuple[str, str, str, dict[str, str]]
"""Title, addresses of database and storage, environment."""


@contextmanager
def _embedded(home: Path) -> Iterator[_Opened]:
    from batchserve.runtime import open_database

    folder = home / "embedded"
    with open_database(Settings(storage=str(folder))):
        """It exists then."""
    yield "SQLite, folder", f"sqlite:///{folder / 'batchserve.db'}", str(folder), {}


@contextmanager
def _of_servers(_home: Path) -> Iterator[_Opened]:
    with servers.database() as address, servers.bucket() as bucket:
        yield "PostgreSQL, SeaweedFS", address, bucket.address, bucket.environment


def _site(title: str, cache: Path, home: Path, address: str, storage: str, sizes: Sizes) -> Site:
    home.mkdir()
    graph = data.model(cache, MODEL).graph
    source = data.table(cache, "numbers", ".parquet", sizes.rows)
    text = data.table(cache, "numbers", ".csv", min(sizes.rows, MOST_TEXT))
    return Site(
        title,
        database.measure(address, home, graph, sizes.chunks),
        chunks.measure(storage, home / "chunks", graph, source, sizes.processes),
        chunks.measure(storage, home / "text", graph, text, sizes.processes),
        sizes.rows,
        tuple(_jobs(cache, home, graph, address, storage, sizes)),
    )


def _jobs(cache: Path, home: Path, graph: Path, address: str, storage: str, sizes: Sizes) -> Iterator[float]:
    """The seconds of whole jobs."""
    folder = home / "server"
    folder.mkdir()
    settings = {"BATCHSERVE_DATABASE": address, "BATCHSERVE_STORAGE": storage}
    settings |= {"BATCHSERVE_PROCESSES": str(sizes.processes), "BATCHSERVE_PROCESS_NICE": "0"}
    with processes.batchserve(folder, **settings) as server:
        service.register(server.url, MODEL, graph)
        for number in range(2 + sizes.repeats):
            rows = sizes.rows if number > 1 else min(WARMING, sizes.rows)
            source = data.table(cache, "numbers", ".parquet", rows)
            steps = service.three_calls(server.url, MODEL, source, folder / "result", "parquet")
            if number > 1:
                yield steps.predict


def _on_ray(storage: Path, calls: int) -> Dispatch:
    """Measured by a process on the head of a cluster. Raises Unavailable."""
    storage.mkdir()
    with ExitStack() as opened:
        cluster = opened.enter_context(servers.ray_cluster())
        command = [*cluster.command, sys.executable, "-m", __name__, cluster.address, str(storage), str(calls)]
        own = processes.environment() | cluster.environment
        done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise Unavailable(f"the driver failed: {done.stderr.strip()[-500:]}")
    return Dispatch(*json.loads(done.stdout.splitlines()[-1]))


def _print_dispatch(engine: str, storage: str, calls: str) -> None:
    settings = Settings(engine=engine, storage=storage, ray_reserved={"CPU": 0.1})
    found = chunks.dispatch(settings, 2, int(calls))
    print(json.dumps([found.calls, found.cpu, found.round_trip]))


if __name__ == "__main__":
    _print_dispatch(*sys.argv[1:])
