"""Queue positions, lists and event streams are cheap, however many jobs are queued and however many clients poll."""

import asyncio
import os
import random
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, aclosing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2
import pytest
import waiting
from service import Api, ok
from sqlalchemy import Connection, Engine, event, insert, update

from batchserve.api.events import JobEvents, job_events
from batchserve.db.connect import Database
from batchserve.db.tables import inputs
from batchserve.db.tables import jobs as job_rows
from batchserve.domain import Job
from batchserve.jobs import lists, queries, requests
from batchserve.service.following import Following
from batchserve.service.places import NEAR, Places
from batchserve.settings import Settings

TENANTS = ("default", "other")


def fill(database: Database, count: int, **values: Any) -> list[str]:
    """Queues that many jobs, a millisecond after each other; a value may be a function of the number of the job."""

    def row(number: int) -> dict[str, Any]:
        given = {name: value(number) if callable(value) else value for name, value in values.items()}
        return {
            "id": f"0b-{number:06d}", "state": "queued", "priority": 0, "options": {}, "metadata": {},
            "created_at": number / 1000, "queued_at": number / 1000, "tenant": "default", "run_after": None, **given,
        }  # fmt: skip

    rows = [row(number) for number in range(count)]
    with database.write() as connection:
        connection.execute(insert(job_rows), rows)
        stored = {"number": 0, "key": "i", "format": "csv", "delimiter": ",", "bytes": 10, "sha256": "a" * 64,
                  "filename": "file.csv"}  # fmt: skip
        connection.execute(insert(inputs), [{"job_id": row["id"], **stored} for row in rows])
    return [row["id"] for row in rows]


@contextmanager
def statements(database: Database) -> Iterator[list[str]]:
    """All statements that a database runs meanwhile, except those that begin and end transactions."""
    found: list[str] = []

    def note(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        # Services of other tests may run in this process.
        if str(connection.engine.url) == database.url and not statement.startswith("BEGIN"):
            found.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def all_jobs(database: Database) -> list[Job]:
    with database.read() as connection:
        return [job for tenant in TENANTS for job in lists.list_page(connection, tenant, limit=10**6)]


def steps(connection: Connection, work: Callable[[], object]) -> int:
    """The thousands of steps that SQLite takes for a call."""
    taken = []
    driver: Any = connection.connection.driver_connection
    driver.set_progress_handler(lambda: taken.append(1), 1000)
    work()
    driver.set_progress_handler(None, 0)
    return len(taken)


def test_positions_that_are_counted_together_equal_those_counted_alone(database: Database) -> None:
    """Priorities, jobs of one moment, jobs that are not due, and jobs that came after the count."""
    chance = random.Random(3)
    queued = {
        "priority": lambda _: chance.choice((-5, 0, 7)),
        "queued_at": lambda _: chance.randrange(40) / 10,
        "tenant": lambda _: chance.choice(TENANTS),
        "run_after": lambda _: chance.choice((None, None, 50.0, 150.0)),
    }
    fill(database, 400, **queued)
    places, found = Places(database), all_jobs(database)

    def alone(now: float) -> dict[str, int | None]:
        with database.read() as connection:
            return {job.id: queries.queue_position(connection, job, now) for job in found}

    assert places.of(found, 100.0) == alone(100.0)
    later = alone(200.0)
    assert later != alone(100.0)  # time alone has passed
    waiting.until(lambda: places.of(found, 200.0) == later)  # a count is valid for ten times as long as it took
    fill(database, 1, id="late", priority=0, queued_at=1e9)
    late = [job for job in all_jobs(database) if job.id == "late"]
    place = places.of(late, 200.0)["late"]
    with database.read() as connection:
        low = sum(job.priority == -5 and job.tenant == "default" for job in found)
        assert place == sum(job.tenant == "default" for job in found) - low
        assert place == queries.queue_position(connection, late[0], 200.0)


def test_a_queue_is_counted_once_for_all_requests(sqlite: Database) -> None:
    fill(sqlite, 3000)
    places, found = Places(sqlite), all_jobs(sqlite)
    with statements(sqlite) as asked:
        for job in found[:300]:
            assert places.of([job], 1e9) == {job.id: int(job.id[4:])}
        time.sleep(1.0)  # and as long as nothing is committed
        places.of(found, 1e9)
    assert len(asked) == 1


def test_the_position_of_a_job_reads_those_before_it_and_at_most_a_thousand(sqlite: Database) -> None:
    fill(sqlite, 12_000)
    with sqlite.read() as connection:
        front, middle, back = (queries.get(connection, f"0b-{number:06d}") for number in (10, NEAR, 11_999))
        assert queries.queue_position(connection, front, 1e9, NEAR) == 10
        assert queries.queue_position(connection, middle, 1e9, NEAR) == NEAR
        assert queries.queue_position(connection, back, 1e9, NEAR) is None
        assert queries.queue_position(connection, back, 1e9) == 11_999
        whole = steps(connection, lambda: queries.queue_position(connection, back, 1e9))
        near = [
            steps(connection, lambda job=job: queries.queue_position(connection, job, 1e9, NEAR))  # type: ignore[misc]
            for job in (front, middle, back)
        ]
    assert max(near) * 8 < whole
    assert near[0] * 20 < whole


def test_no_poll_reads_the_whole_queue_because_of_jobs_that_are_not_due(sqlite: Database) -> None:
    fill(sqlite, 12_000, run_after=2e11)
    with sqlite.read() as connection:
        back = queries.get(connection, "0b-011999")
        assert queries.queue_position(connection, back, 1e9, NEAR) is None
        whole = steps(connection, lambda: queries.queue_position(connection, back, 1e9))
        assert steps(connection, lambda: queries.queue_position(connection, back, 1e9, NEAR)) * 8 < whole


def test_no_predict_reads_all_queued_jobs_that_are_equal(sqlite: Database) -> None:
    fill(sqlite, 12_000, request_digest="d")
    fill(sqlite, 1, id="aaa", state="completed", request_digest="e")
    with sqlite.read() as connection:
        assert queries.find_equal(connection, "d") is None
        found = queries.find_equal(connection, "e")
        assert found is not None
        assert found.id == "aaa"
        assert steps(connection, lambda: queries.find_equal(connection, "d")) < 50


# --- lists ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def filled_api(idle_api: Api) -> Iterator[tuple[Api, Database]]:
    """A service whose default tenant has 300 queued jobs."""
    database = Database(idle_api.settings.database_url)
    ids = fill(database, 300, metadata=lambda number: {"number": str(number)})
    yield idle_api, database
    with database.write() as connection:
        connection.execute(job_rows.delete().where(job_rows.c.id.in_(ids)))
    database.close()


def test_a_long_page_takes_as_few_queries_as_a_short_one(filled_api: tuple[Api, Database]) -> None:
    api, database = filled_api
    counts = []
    for limit in (50, 200):
        with statements(database) as asked:
            page = ok(api.http.get("/v1/jobs", params={"limit": limit, "state": "queued"}))
        counts.append(len(asked) / (limit // 50))
        assert len(page["jobs"]) == limit
        places = [job["queue_position"] for job in page["jobs"]]
        assert all(place is not None for place in places)
        assert len(set(places)) == limit
    assert counts[1] <= counts[0] <= 6


def test_a_page_ends_early_when_its_jobs_take_too_many_bytes(filled_api: tuple[Api, Database]) -> None:
    api, database = filled_api
    with database.write() as connection:
        large = job_rows.c.id.in_([f"0b-{number:06d}" for number in range(100, 110)])
        connection.execute(update(job_rows).where(large).values(facts={"notes": ["n" * 1_500_000]}))
        connection.execute(
            update(job_rows).where(job_rows.c.id == "0b-000104").values(facts={"notes": ["n" * 6_000_000]})
        )
    seen: list[str] = []
    after, sizes = None, []
    while True:
        query = {"limit": "200", "q": "file", **({"after": after} if after else {})}
        answer = api.http.get("/v1/jobs", params=query)
        page = ok(answer)
        seen += [job["id"] for job in page["jobs"]]
        sizes.append((len(answer.content), len(page["jobs"])))
        if (after := page["next"]) is None:
            break
        assert after == seen[-1]
    assert seen == [f"0b-{number:06d}" for number in reversed(range(300))]
    assert all(size < 4 * 2**20 + 100 or count == 1 for size, count in sizes)
    assert 1 in [count for _, count in sizes]


def test_jobs_are_counted_by_state_without_reading_them(sqlite: Database) -> None:
    fill(sqlite, 100)
    with statements(sqlite) as run, sqlite.read() as connection:
        queries.count_by_state(connection, "default")
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {run[-1]}", ("x",) * run[-1].count("?")).all()
    assert len(plan) == 1
    assert re.fullmatch(
        r"SEARCH jobs USING COVERING INDEX \w+ \((state|tenant)=\? AND (state|tenant)=\?\)", plan[0].detail
    )


# --- event streams ----------------------------------------------------------------------------------------------------


async def until(done: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not done():  # noqa: ASYNC110 - of many followers, and of what they were told
            await asyncio.sleep(0.01)


async def always() -> bool:
    return True


def test_event_streams_share_one_poll_and_read_nothing_while_nothing_is_committed(sqlite: Database) -> None:
    ids = fill(sqlite, 1000)
    followed = [ids[-1 - number % 50] for number in range(150)]

    async def follow_all() -> None:
        following = Following(sqlite, Settings(), Places(sqlite), asyncio.Event(), job_events)
        latest: dict[int, JobEvents] = {}

        async def follow(number: int) -> None:
            async with aclosing(following.follow(followed[number], always)) as changes:
                async for change in changes:
                    latest[number] = change

        tasks = [asyncio.create_task(follow(number)) for number in range(150)]
        await until(lambda: len(latest) == 150)
        assert len({id(told) for told in latest.values()}) == 50  # one body for each job
        await asyncio.sleep(0.6)
        with statements(sqlite) as asked:
            await asyncio.sleep(1.2)
        assert asked == []
        before = dict(latest)
        with statements(sqlite) as asked:
            with sqlite.write() as connection:
                connection.execute(update(job_rows).where(job_rows.c.id == ids[0]).values(state="running"))
            await until(lambda: all(latest[number].tag != before[number].tag for number in range(150)))
        assert len(asked) < 6  # the commit itself among them
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(follow_all())


def test_a_later_event_stream_gets_the_state_at_once_and_a_deleted_job_ends_its_streams(database: Database) -> None:
    ids = fill(database, 3)

    async def follow_two() -> tuple[list[str], list[str]]:
        following = Following(database, Settings(), Places(database), asyncio.Event(), job_events)
        told: tuple[list[str], list[str]] = ([], [])

        async def follow(job_id: str, into: list[str]) -> None:
            async with aclosing(following.follow(job_id, always)) as changes:
                async for change in changes:
                    into += [change.state]

        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(follow(ids[0], told[0]))
            await until(lambda: bool(told[0]))
            group.create_task(follow(ids[1], told[1]))
            await until(lambda: bool(told[1]))
            with database.write() as connection:
                connection.execute(update(job_rows).where(job_rows.c.id == ids[0]).values(state="cancelled"))
                requests.delete_if_not_running(connection, ids[1])
        return told

    states, others = asyncio.run(follow_two())
    assert states == ["queued", "cancelled"]
    assert set(others) == {"queued"}


def server_process(folder: Path) -> int:
    """The ID of the server in this folder."""
    for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        if Path(f"/proc/{child}/cwd").readlink() == folder:
            return int(child)
    raise AssertionError(f"no server runs in {folder}")


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("state", ["queued", "running"])
def test_500_streams_take_less_than_a_tenth_of_a_core(
    tmp_path: Path, start_server: Callable[..., AbstractContextManager[str]], state: str
) -> None:
    with start_server(tmp_path, "--no-worker") as url, ExitStack() as open_:
        database = Database(f"sqlite:///{tmp_path / 'storage' / 'batchserve.db'}")
        ids = fill(database, 10_000, state=lambda number: state if number >= 9_500 else "queued")
        database.close()
        address = urlsplit(url)
        for job_id in ids[-500:]:
            stream = open_.enter_context(socket.create_connection((address.hostname, address.port), timeout=60))
            stream.sendall(f"GET /v1/jobs/{job_id}/events HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            received = b""
            while b"data:" not in received:
                received += stream.recv(65536)
        process = server_process(tmp_path)
        before = cpu_seconds(process)
        for _ in range(10):
            time.sleep(1)
            assert httpx2.get(f"{url}/livez", timeout=60).is_success
        assert cpu_seconds(process) - before < 1.0
