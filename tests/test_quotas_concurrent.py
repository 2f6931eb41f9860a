"""Quotas are exact: 16 clients at once, in one process and over several servers, never get more than is allowed."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import FAST, Service
from service import ok
from uuid_utils import uuid7
from waiting import until

from batchserve import registry
from batchserve.access import Caller, Quota
from batchserve.db.connect import Database
from batchserve.domain import Dialect, JobState, ModelVersion, Options, Signature, StoredInput
from batchserve.errors import QuotaExceeded, StorageQuotaExceeded
from batchserve.jobs import expiry, queries, requests
from batchserve.jobs.statements import Owned
from batchserve.quotas import account, limits
from batchserve.quotas.account import Added, charge, differing, usage_of
from batchserve.storage import input_key
from batchserve.submission import Submission, create

CLIENTS = 16
HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
CSV = HEADER + "5.1,3.5,1.4,0.2\n"
FAR = "2999-01-01T00:00:00Z"
QUEUED = {"model": "iris", "run_after": FAR, "reuse": False}


def at_once(act: Callable[[int], Any], count: int = CLIENTS) -> list[Any]:
    """The outcomes of so many threads that begin together."""
    barrier = threading.Barrier(count)

    def begin(number: int) -> Any:
        barrier.wait(30)
        return act(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(begin, range(count)))


@pytest.fixture
def model(database: Database) -> ModelVersion:
    with database.write() as connection:
        return registry.add(connection, "iris", "d1", 1, Signature((), ()), {}, 1.0)


@pytest.fixture(params=[account.SETTLES, 0.0], ids=["new", "kept"])
def limited(request: pytest.FixtureRequest, database: Database, monkeypatch: pytest.MonkeyPatch) -> Database:
    monkeypatch.setattr(account, "SETTLES", request.param)
    with database.write() as connection:
        quota = Quota("red", jobs=10, bytes=1000, rows_per_day=100)
        limits.set_limits(connection, quota, database.moment(connection).wall, Caller())
    return database


def test_sixteen_clients_queue_no_more_jobs_and_bytes_than_allowed(limited: Database, model: ModelVersion) -> None:
    def client(number: int) -> int:
        accepted = 0
        with closing(Database(limited.url)) as own:
            for _ in range(3):
                job_id = str(uuid7())
                stored = StoredInput(input_key(job_id), "csv", Dialect(), 150 if number % 2 else 70, job_id)
                submission = Submission("red", job_id, (stored,), model, Options("csv"))
                try:
                    with own.write() as connection:
                        now = own.moment(connection).wall
                        create(connection, submission, now)
                        charge(connection, "red", Added(stored.bytes or 0, queues=True), now)
                    accepted += 1
                except (QuotaExceeded, StorageQuotaExceeded):
                    pass
        return accepted

    accepted = sum(at_once(client))
    with limited.read() as connection:
        use = usage_of(connection, "red", limited.moment(connection).wall)
        assert queries.count_by_state(connection) == {"queued": accepted}
        assert differing(connection) == []
        assert use.jobs == accepted <= 10
        assert use.bytes <= 1000
        assert accepted == 10 or use.bytes > 1000 - 150


def test_sixteen_workers_plan_no_more_rows_than_allowed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "SETTLES", 0.0)
    with database.write() as connection:
        quota, now = Quota("red", rows_per_day=100), database.moment(connection).wall
        limits.set_limits(connection, quota, now, Caller())
        charge(connection, "red", Added(), now)

    def worker(_: int) -> int:
        with closing(Database(database.url)) as own:
            try:
                with own.write() as connection:
                    charge(connection, "red", Added(rows=7), own.moment(connection).wall)
                return 7
            except QuotaExceeded:
                return 0

    assert sum(at_once(worker)) == 98
    with database.read() as connection:
        assert usage_of(connection, "red", database.moment(connection).wall).rows == 98


def test_jobs_that_share_an_input_and_are_deleted_at_once_give_it_back_once(
    database: Database, model: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "SETTLES", 0.0)
    with database.write() as connection:
        limits.set_limits(connection, Quota("red", bytes=10**6), database.moment(connection).wall, Caller())
    stored = StoredInput("inputs/shared", "csv", Dialect(), 50, "s")
    with database.write() as connection:
        now = database.moment(connection).wall
        first = requests.create(connection, "0", (stored,), model, now, "red")
        charge(connection, "red", Added(50), now)
        for number in range(1, CLIENTS):
            requests.create_on_inputs_of(connection, str(number), first, now)

    def delete(number: int) -> Owned:
        with closing(Database(database.url)) as own:
            return own.write_freeing(lambda connection: requests.delete_if_not_running(connection, str(number)))

    at_once(delete)
    with database.read() as connection:
        assert usage_of(connection, "red", now).bytes == 0
        assert differing(connection) == []


def test_uploads_and_expiries_of_several_tenants_at_once_end_with_right_accounts(
    database: Database, model: ModelVersion, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(account, "SETTLES", 0.0)
    tenants = ("red", "blue", "green")
    with database.write() as connection:
        limits.set_limits(connection, Quota("*", bytes=10**6), database.moment(connection).wall, Caller())

    def client(number: int) -> None:
        with closing(Database(database.url)) as own:
            for turn in range(5):
                tenant, job_id = tenants[(number + turn) % 3], str(uuid7())

                def store(connection: Any, tenant: str = tenant, job_id: str = job_id) -> None:
                    stored = StoredInput(input_key(job_id), "csv", Dialect(), 10, job_id)
                    requests.create(connection, job_id, (stored,), model, 1.0, tenant)
                    charge(connection, tenant, Added(10), 1.0)

                own.write_freeing(store)
                over: dict[str, Any] = {"ended_before": 0.0, "uploaded_before": 2.0}
                with own.read() as connection:
                    found = expiry.find_over(connection, **over, most=7)
                own.write_freeing(partial(expiry.expire_if_over, job_ids=found, **over, now=3.0))

    at_once(client, 8)
    with database.read() as connection:
        assert differing(connection) == []


# --- over servers ----------------------------------------------------------------------------------------------------


@contextmanager
def servers(folder: Path, database: str, count: int) -> Iterator[list[str]]:
    settings = {
        **FAST,
        "BATCHSERVE_DATABASE": database,
        "BATCHSERVE_STORAGE": str(folder / "storage"),
        "BATCHSERVE_FREE_BYTES": "0",
        "BATCHSERVE_PROCESSES": "1",
    }
    with ExitStack() as stack:
        started = []
        for _ in range(count):
            service = Service(folder, "serve", "--port", "0", "--no-worker", settings=settings)
            stack.callback(service.end)
            started.append(service)
        yield [service.wait_for(r" at (http://\S+) ")[1] for service in started]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize("sent", ["queued", "stored"])
def test_the_quota_holds_over_two_servers(sent: str, database_url: str, tmp_path: Path, iris_onnx: Path) -> None:
    with servers(tmp_path, database_url, 2) as urls:
        ok(httpx2.put(f"{urls[0]}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60), 201)
        given = {"jobs": 20} if sent == "queued" else {"bytes": 20 * len(CSV) + 5}
        ok(httpx2.put(f"{urls[0]}/v1/quotas/default", json=given))
        until(lambda: all(_limit(url) for url in urls))

        def client(number: int) -> Counter[int]:
            found: Counter[int] = Counter()
            with httpx2.Client(base_url=urls[number % 2], timeout=60) as http:
                for _ in range(4):
                    params: dict[str, Any] = (
                        {"model": "iris", "run_after": FAR, "reuse": False} if sent == "queued" else {}
                    )
                    path = "/v1/predict" if sent == "queued" else "/v1/upload"
                    found[http.post(path, params=params, content=CSV).status_code] += 1
            return found

        counts: Counter[int] = sum(at_once(client), Counter())
        accepted, refused = (202, 429) if sent == "queued" else (201, 507)
        assert counts == {accepted: 20, refused: CLIENTS * 4 - 20}
        usage = ok(httpx2.get(f"{urls[1]}/v1/usage"))
        assert usage["jobs" if sent == "queued" else "bytes"]["used"] == (20 if sent == "queued" else 20 * len(CSV))
        state = JobState.QUEUED if sent == "queued" else JobState.UPLOADED
        assert len(ok(httpx2.get(f"{urls[1]}/v1/jobs", params={"state": state, "limit": 200}))["jobs"]) == 20


def _limit(url: str) -> bool:
    """Whether a server has read the limits. Its requests use what it has read for a second."""
    usage = ok(httpx2.get(f"{url}/v1/usage"))
    return usage["jobs"]["limit"] is not None or usage["bytes"]["limit"] is not None
