"""Servers and workers that are killed while schedules run: each tick queues its job once."""

import json
import signal
from collections.abc import Iterator
from contextlib import closing
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx2
import postgres
import pytest
from commands import FAST, Service
from sqlalchemy import func, select, update
from waiting import until

from batchserve.db import tables
from batchserve.db.connect import Database

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCHEDULES, TICKS = 4, 6
ROWS = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n" + "5.1,3.5,1.4,0.2\n" * 50


class Site:
    """A folder with its data, and the services on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.inputs = folder, folder / "in"
        self.inputs.mkdir()
        (self.inputs / "flowers.csv").write_text(ROWS)
        places = json.dumps({"*": [f"{self.inputs.as_uri()}/"]})
        self.settings = FAST | {"BATCHSERVE_INPUT_PREFIXES": places, "BATCHSERVE_FREE_BYTES": "0"}
        self.services: list[Service] = []

    def serve(self) -> Service:
        service = Service(self.folder, "serve", "--port", "0", "--no-worker", settings=self.settings)
        self.services.append(service)
        service.url = service.wait_for(r" at (http://\S+) ")[1]
        return service

    def work(self) -> Service:
        service = Service(self.folder, "worker", settings=self.settings)
        self.services.append(service)
        service.wait_for(r"Worker is ready")
        return service

    def create(self, url: str, model: Path) -> None:
        httpx2.put(f"{url}/v1/models/flowers", content=model.read_bytes(), timeout=60).raise_for_status()
        request = {
            "model": "flowers",
            "input": {"urls": [f"{self.inputs.as_uri()}/*.csv"]},
            "metadata": {"tick": "{schedule} {date} {time}"},
            "reuse": False,
        }
        for number in range(SCHEDULES):
            body = {"name": f"s{number}", "cron": "* * * * *", "request": request, "overlap": "queue"}
            answer = httpx2.post(f"{url}/v1/schedules", json=body, timeout=60)
            assert answer.status_code == 201, answer.text
            httpx2.post(f"{url}/v1/schedules/s{number}/pause", timeout=60).raise_for_status()

    def begin(self) -> None:
        """Makes the last minutes due for each schedule, and the next ones never."""
        with self.database() as database, database.write() as connection:
            minute = database.moment(connection).wall // 60 * 60
            due = {"paused_at": None, "next_at": minute - 60 * (TICKS - 1)}
            connection.execute(update(tables.schedules).values(due))

    def database(self) -> closing[Database]:
        return closing(Database(postgres.address_of(self.folder / "storage")))

    def ticks(self) -> list[dict[str, Any]]:
        with self.database() as database, database.read() as connection:
            return [dict(row) for row in connection.execute(select(tables.ticks)).mappings()]

    def queued(self) -> int:
        return sum(tick["state"] == "queued" for tick in self.ticks())

    def jobs(self) -> list[dict[str, Any]]:
        with self.database() as database, database.read() as connection:
            return [dict(row) for row in connection.execute(select(tables.jobs)).mappings()]

    def jobs_of_ticks(self) -> list[tuple[int, str]]:
        with self.database() as database, database.read() as connection:
            return [(row.tick_id, row.job_id) for row in connection.execute(select(tables.tick_jobs))]

    def close(self) -> None:
        for service in self.services:
            service.end(signal.SIGKILL)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    site = Site(tmp_path)
    yield site
    site.close()


def test_each_tick_queues_its_job_once_whatever_is_killed(site: Site, iris_onnx: Path) -> None:
    first, second, worker = site.serve(), site.serve(), site.work()
    site.create(first.url, iris_onnx)
    site.begin()
    alive = {"first": first, "second": second, "worker": worker}
    for number, name in zip(range(1, SCHEDULES * (TICKS - 1), 3), cycle(alive), strict=False):
        until(lambda number=number: site.queued() >= number, 120)  # type: ignore[misc]
        alive[name].end(signal.SIGKILL)
        alive[name] = site.work() if name == "worker" else site.serve()
    until(lambda: site.queued() >= SCHEDULES * TICKS, 120)
    for number in range(SCHEDULES):
        httpx2.post(f"{alive['first'].url}/v1/schedules/s{number}/pause", timeout=60).raise_for_status()
    ticks = site.ticks()
    assert {tick["state"] for tick in ticks} <= {"queued", "skipped"}  # those of later minutes may have been paused
    assert len({(tick["schedule_id"], tick["at"]) for tick in ticks}) == len(ticks)
    queued = [tick for tick in ticks if tick["state"] == "queued"]
    assert {tick["jobs"] for tick in queued} == {1}
    pairs = site.jobs_of_ticks()
    assert sorted(tick_id for tick_id, _ in pairs) == sorted(tick["id"] for tick in queued)
    jobs = site.jobs()
    assert {job["id"] for job in jobs} == {job_id for _, job_id in pairs}
    assert len({job["metadata"]["tick"] for job in jobs}) == len(jobs) == len(queued)
    until(lambda: {job["state"] for job in site.jobs()} == {"completed"}, 120)
    assert {job["rows_ok"] for job in site.jobs()} == {50}


def test_what_was_due_while_nothing_ran_is_caught_up_when_a_server_starts(site: Site, iris_onnx: Path) -> None:
    server = site.serve()
    site.create(server.url, iris_onnx)
    server.end(signal.SIGKILL)
    with site.database() as database, database.write() as connection:
        connection.execute(update(tables.schedules).values(cron="0 * * * *"))
        hour = database.moment(connection).wall // 3600 * 3600
        connection.execute(update(tables.schedules).values(paused_at=None, next_at=hour - 86400.0))
    server = site.serve()
    until(lambda: site.queued() == SCHEDULES)
    with site.database() as database, database.read() as connection:
        assert connection.scalar(select(func.count()).select_from(tables.jobs)) == SCHEDULES
        newest = connection.scalars(select(tables.ticks.c.at).where(tables.ticks.c.state == "queued")).all()
    assert set(newest) <= {hour, hour + 3600.0}
    codes = {tick["error"]["code"] for tick in site.ticks() if tick["state"] == "skipped"}
    assert codes == {"missed"}
    server.end(signal.SIGTERM)
