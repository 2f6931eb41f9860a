"""What lists of jobs take where there are many: medians of one client's requests, next to those among few jobs, and
next to what the bare driver of SQLite takes for the rows of a page by an index.

  python -m benchmarks.pages

Prints a table. The jobs are copies of a few that ran: the database is filled, the storage is not.
"""

import argparse
import json
import sqlite3
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Self
from urllib.parse import quote

import uuid_utils
from rich.console import Console
from sqlalchemy import Connection, RowMapping, insert, select

from batchserve.db.connect import Database
from batchserve.db.tables import attempts, inputs, jobs
from batchserve.domain import JobState
from benchmarks import data, load, processes, service
from benchmarks.http import latencies, request, run, send
from benchmarks.load import MODEL, ROUNDS
from benchmarks.results import Measurement, Results, Runs

MOST = 20.0
"""Milliseconds that a list may take beside the bare look-up."""
MOST_OF_WORDS = 100.0
"""The same of a search for words, which reads every job, and of a page that shows more than a list."""
FEW = 1000
PAGE = 50
STATES = {JobState.COMPLETED: 0.94, JobState.FAILED: 0.02, JobState.CANCELLED: 0.01, JobState.QUEUED: 0.01}
"""The share of each; the others are uploaded."""
FAR = "2999-01-01T00:00:00Z"
_BLOCK = 5000
_BARE = "SELECT * FROM jobs WHERE tenant = ? AND id < ? ORDER BY id DESC LIMIT ?"


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m benchmarks.pages", description=__doc__)
    asked.add_argument("--jobs", type=int, default=100_000, help="default: 100,000")
    asked.add_argument("--seconds", type=float, default=2.0, help="of each load (default: 2)")
    given = asked.parse_args()
    results = Results()
    with TemporaryDirectory(prefix="batchserve-benchmarks-") as name:
        results.add(measure(Path(name), given.jobs, given.seconds))
    Console(width=None if sys.stdout.isatty() else 200).print(results.as_table())


def measure(folder: Path, most: int, seconds: float) -> Iterator[Measurement]:
    """`seconds`: of each load."""
    taken = {count: _lists(folder, count, seconds) for count in (FEW, most)}
    bare = _bare(folder / str(most), seconds)
    for name, runs in taken[most].items():
        title = f"{name}, {most:,} jobs: median"
        limit = bare.median + (MOST_OF_WORDS if "word" in name or not name.startswith("/v1/") else MOST)
        yield Measurement.of(f"{title} / {limit:.1f} ms", runs, limit, "ms")
        yield Measurement.of(f"{title} / bare index look-up", runs, bare, "ms")
        yield Measurement.of(f"{title} / that of {FEW:,} jobs", runs, taken[FEW][name], "ms")


def _bare(home: Path, seconds: float) -> Runs:
    """The milliseconds of the driver for the rows of a page in the middle of the list."""
    with closing(sqlite3.connect(home / "storage" / "batchserve.db")) as database:
        offset = "SELECT tenant, id FROM jobs ORDER BY id LIMIT 1 OFFSET (SELECT count(*) / 2 FROM jobs)"
        tenant, middle = database.execute(offset).fetchone()
        rounds = []
        for _ in range(ROUNDS):
            taken: list[float] = []
            while sum(taken) < seconds / ROUNDS:
                started = time.perf_counter()
                rows = database.execute(_BARE, (tenant, middle, PAGE)).fetchall()
                taken.append(time.perf_counter() - started)
                if len(rows) != PAGE:
                    raise SystemExit(f"expected the {PAGE} rows of a page, got {len(rows)}")
            rounds.append(1000 * median(taken))
    return Runs(rounds)


def _lists(folder: Path, count: int, seconds: float) -> dict[str, Runs]:
    """The milliseconds of each list on a server with so many jobs."""
    home = folder / str(count)
    home.mkdir()
    with processes.batchserve(home) as server:
        _run_some(server.url, folder)
    fill(home, count)
    with processes.batchserve(home) as server:
        taken = {}
        for name, target in _targets(server.url, count).items():
            wanted = request("GET", target)
            run(latencies(server.url, wanted, seconds=seconds / ROUNDS, clients=1))  # all is warm then
            rounds = [run(latencies(server.url, wanted, seconds=seconds / ROUNDS, clients=1)) for _ in range(ROUNDS)]
            taken[name] = load.milliseconds(rounds, 50)
        return taken


def _targets(url: str, count: int) -> dict[str, str]:
    """Addresses by name. A deep page begins in the middle of the list."""
    created = _cursor(url, f"until={count // 2}s")
    finished = _cursor(url, f"finished_until={count // 2}s")
    old = f"since={count}s&until={count * 9 // 10}s"
    lists = {
        "all": "",
        "a deep page": f"after={created}",
        "a deep page, oldest first": f"order=asc&after={created}",
        "failed": "state=failed",
        "failed, a deep page": f"state=failed&after={created}",
        "failed or cancelled": "state=failed,cancelled",
        "completed, oldest first": "state=completed&order=asc",
        "of a model": f"model={MODEL}",
        "failed of a model": f"model={MODEL}&state=failed",
        "a time": old,
        "failed in a time": f"state=failed&{old}",
        "running, of which there are none": "state=running",
        "by their end": "sort=finished",
        "by their end, a deep page": f"sort=finished&after={finished}",
        "failed, by their end, oldest first": "state=failed&sort=finished&order=asc",
        "finished in a time": f"finished_{old.replace('&', '&finished_')}",
        "of a model, by their end": f"model={MODEL}&sort=finished",
        "counted": "total=true",
        "failed, counted": "state=failed&total=true",
        "a word that one name has": "q=file-1.csv",
        "a word that no name has": "q=nothing",
    }
    pages = {
        "/jobs": "/jobs",
        "/jobs, failed ones": "/jobs?q=state:failed",
        "/jobs, a word that no name has": "/jobs?q=nothing",
        "/": "/",
    }
    return {f"/v1/jobs, {name}": f"/v1/jobs?limit={PAGE}&{query}" for name, query in lists.items()} | pages


def _cursor(url: str, query: str) -> str:
    """The place behind the first job of a list, in a query."""
    found = json.loads(send(f"{url}/v1/jobs?limit=1&{query}", "GET"))["next"]
    if found is None:
        raise SystemExit(f"no job was found in the list {query}")
    return quote(found)


def _run_some(url: str, folder: Path) -> None:
    """One job in each state, to be copied."""
    source, faulty = data.table(folder, "numbers", ".csv", 100), folder / "faulty.csv"
    faulty.write_text(f"{source.read_text().rstrip()}?\n")
    service.register(url, MODEL, data.model(folder, MODEL).graph)
    asked = f"{url}/v1/predict?model={MODEL}&{service.AGAIN}"
    send(asked, "POST", source, service.WAIT)
    send(f"{asked}&on_row_error=fail", "POST", faulty, service.WAIT)
    delayed = f"{asked}&run_after={FAR}"
    send(delayed, "POST", source)
    send(f"{url}/v1/jobs/{json.loads(send(delayed, 'POST', source))['id']}/cancel", "POST")
    service.upload(url, source)


def fill(home: Path, count: int) -> None:
    """Adds copies of the jobs in that folder, a second apart and up to now, until there are so many."""
    database = Database(f"sqlite:///{home / 'storage' / 'batchserve.db'}")
    with database.write() as connection:
        examples = [_Example.of(connection, row) for row in connection.execute(select(jobs)).mappings().all()]
        by_state = {example.job["state"]: example for example in examples}
        numbers = range(count - len(examples))
        for first in numbers[::_BLOCK]:
            copies = [
                by_state[_state(number)].copy(number, time.time() - count + number)
                for number in numbers[first : first + _BLOCK]
            ]
            for table, name in ((jobs, "job"), (inputs, "input"), (attempts, "attempt")):
                rows = [row for copy in copies if (row := getattr(copy, name)) is not None]
                connection.execute(insert(table), rows)
    database.close()


@dataclass(frozen=True, slots=True)
class _Example:
    """The rows of a job."""

    job: dict[str, Any]
    input: dict[str, Any]
    attempt: dict[str, Any] | None

    @classmethod
    def of(cls, connection: Connection, job: RowMapping) -> Self:
        its_input = connection.execute(select(inputs).where(inputs.c.job_id == job["id"])).mappings().one()
        tried = connection.execute(select(attempts).where(attempts.c.job_id == job["id"])).mappings().one_or_none()
        return cls(dict(job), dict(its_input), None if tried is None else dict(tried))

    def copy(self, number: int, moment: float) -> Self:
        """`moment`: of its creation."""
        job_id = str(uuid_utils.uuid7(nanoseconds=int(1e9 * moment)))
        times = {name: moment for name in ("queued_at", "started_at", "finished_at") if self.job[name] is not None}
        return replace(
            self,
            job=self.job | times | {"id": job_id, "created_at": moment},
            input=self.input | {"job_id": job_id, "filename": f"file-{number}.csv"},
            attempt=None if self.attempt is None else self.attempt | {"job_id": job_id},
        )


def _state(number: int) -> JobState:
    """By the last two digits, so that every page has jobs of several states."""
    share = (number * 37 % 100) / 100
    for state, its_share in STATES.items():
        if share < its_share:
            return state
        share -= its_share
    return JobState.UPLOADED


if __name__ == "__main__":
    main()
