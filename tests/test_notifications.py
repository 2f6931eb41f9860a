"""Notifications between the processes that share a PostgreSQL server."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest
from commands import Service as Command
from service import Api, ok, problem, running
from sqlalchemy import text
from test_server_database import end_connections

from batchserve import keys, service
from batchserve.access import Scope
from batchserve.db import notifications
from batchserve.db.connect import Database
from batchserve.db.notifications import ALL, Notification, Topic, parsed
from batchserve.jobs import execution
from batchserve.service import following

CSV = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n" + "5.1,3.5,1.4,0.2\n" * 500
RARELY = 100.0
"""Seconds of every poll: nothing is found by one."""
SOON = 45.0
"""Seconds in which a notification arrives, on a machine under load."""


@contextmanager
def soon() -> Iterator[None]:
    """Asserts that the block takes no longer."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SOON


class Heard:
    """All notifications of a database, in their order."""

    def __init__(self) -> None:
        self.all: list[Notification] = []
        self._changed = threading.Condition()

    def hear(self, notification: Notification) -> None:
        with self._changed:
            self.all.append(notification)
            self._changed.notify_all()

    def wait(self, arrived: Callable[[list[Notification]], bool]) -> list[Notification]:
        with self._changed:
            assert self._changed.wait_for(lambda: arrived(self.all), SOON), self.all
            return list(self.all)

    def until_last(self, topic: Topic) -> list[Notification]:
        return self.wait(lambda heard: bool(heard) and heard[-1].topic is topic)


@contextmanager
def listening(url: str) -> Iterator[tuple[Database, Heard]]:
    heard = Heard()
    with closing(Database(url)) as database, database.listening(heard.hear) as is_live:
        heard.wait(lambda heard: heard == [ALL])
        assert is_live()
        yield database, heard


@pytest.fixture
def url(request: pytest.FixtureRequest) -> str:
    """The address of a database of a server."""
    address: str = request.getfixturevalue("postgres_server").migrated()
    return address


@pytest.fixture
def rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in this process is found by a poll."""
    monkeypatch.setattr(service, "_PAUSE_OF_LISTENERS", RARELY)
    monkeypatch.setattr(following, "PAUSE", RARELY)
    monkeypatch.setattr(following, "ALLOWED_FOR", RARELY)


@contextmanager
def apart(folder: Path, url: str, iris_onnx: Path, *, worker: bool = True) -> Iterator[Api]:
    """A service without a worker, and, if wanted, a worker in a process of its own that never polls in time."""
    storage = folder / "storage"
    with running(storage, worker=False, database=url, chunk_records=100) as api:
        api.register("iris", iris_onnx)
        if not worker:
            yield api
            return
        settings = {
            "BATCHSERVE_STORAGE": str(storage),
            "BATCHSERVE_DATABASE": url,
            "BATCHSERVE_PROCESSES": "1",
            "BATCHSERVE_POLL": str(RARELY),
            "BATCHSERVE_RESCUE": str(RARELY),
            "BATCHSERVE_CHUNK_RECORDS": "100",
        }
        process = Command(folder, "worker", settings=settings)
        try:
            process.wait_for("Worker is ready")
            time.sleep(1.0)  # its first poll is over
            yield api
        finally:
            process.end()


# --- what is sent ---


@pytest.mark.postgres
def test_a_job_notifies_when_it_is_queued_and_when_it_has_ended_and_never_in_between(
    url: str, tmp_path: Path, iris_onnx: Path
) -> None:
    with listening(url) as (_, heard), running(tmp_path, database=url, chunk_records=50, direct_seconds=0) as api:
        api.register("iris", iris_onnx)
        job = api.run(CSV, "iris")
        assert job["chunks"]["done"] == 10
        sent = heard.until_last(Topic.ENDED)[1:]
    assert sent == [Notification(topic, frozenset({job["id"]})) for topic in (Topic.QUEUED, Topic.ENDED)]


@pytest.mark.postgres
def test_a_cancel_request_notifies_of_a_running_job_and_a_release_of_a_queued_one(
    url: str, tmp_path: Path, iris_onnx: Path
) -> None:
    with listening(url) as (database, heard), running(tmp_path, worker=False, database=url) as api:
        api.register("iris", iris_onnx)
        first, second = (
            ok(api.http.post("/v1/predict", content=CSV, params={"model": "iris", "reuse": False}), 202)["id"]
            for _ in range(2)
        )
        with database.write() as connection:
            for job in execution.claim_due(connection, "worker", 60.0, database.moment(connection), 2):
                if job.id == second:
                    execution.release_if_mine(connection, job.id, job.attempt, database.moment(connection).wall)
        ok(api.http.post(f"/v1/jobs/{first}/cancel"), 202)
        ok(api.http.post(f"/v1/jobs/{first}/cancel"), 202)  # once more, which changes nothing
        ok(api.http.post(f"/v1/jobs/{second}/cancel"), 202)
        sent = heard.until_last(Topic.ENDED)[1:]
    assert [(notification.topic, *notification.job_ids) for notification in sent] == [
        (Topic.QUEUED, first),
        (Topic.QUEUED, second),
        (Topic.QUEUED, second),
        (Topic.CANCEL, first),
        (Topic.ENDED, second),
    ]


@pytest.mark.postgres
def test_jobs_of_lost_workers_notify_when_they_are_queued_again(url: str, tmp_path: Path, iris_onnx: Path) -> None:
    with listening(url) as (database, heard), running(tmp_path, worker=False, database=url) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/predict", content=CSV, params={"model": "iris"}), 202)["id"]
        with database.write() as connection:
            execution.claim_due(connection, "worker", -1.0, database.moment(connection), 1)
        with database.write() as connection:
            assert execution.rescue_expired(connection, 3, database.moment(connection)) == ([job], [])
        sent = heard.wait(lambda heard: len(heard) == 3)[1:]
    assert sent == [Notification(Topic.QUEUED, frozenset({job}))] * 2


@pytest.mark.postgres
def test_a_revoked_key_notifies_and_what_is_rolled_back_does_not(url: str) -> None:
    with listening(url) as (database, heard):
        with database.write() as connection:
            keys.create(connection, "k", Scope.USER, "default", time.time())
        with suppress(ZeroDivisionError), database.write() as connection:
            keys.revoke(connection, "k", time.time())
            raise ZeroDivisionError
        with database.write() as connection:
            notifications.send(connection, Topic.CANCEL, ["1"])
        with database.write() as connection:
            keys.revoke(connection, "k", time.time())
        sent = heard.until_last(Topic.REVOKED)[1:]
    assert sent == [Notification(Topic.CANCEL, frozenset({"1"})), Notification(Topic.REVOKED)]


@pytest.mark.postgres
def test_many_jobs_are_notified_without_their_names(url: str) -> None:
    with listening(url) as (database, heard):
        with database.write() as connection:
            notifications.send(connection, Topic.QUEUED, [f"{number:036}" for number in range(100)])
            notifications.send(connection, Topic.ENDED, [f"{number:036}" for number in range(1000)])
        sent = heard.until_last(Topic.ENDED)[1:]
    assert [len(notification.job_ids) for notification in sent] == [100, 0]


def test_what_another_program_sends_may_mean_anything() -> None:
    assert parsed("hello") == ALL
    assert parsed("") == ALL
    assert parsed("ended a b") == Notification(Topic.ENDED, frozenset({"a", "b"}))
    assert parsed("queued") == Notification(Topic.QUEUED)


# --- who is woken ---


@pytest.mark.postgres
@pytest.mark.usefixtures("rarely")
def test_a_worker_and_a_request_of_two_processes_are_woken_without_a_poll(
    url: str, tmp_path: Path, iris_onnx: Path
) -> None:
    with apart(tmp_path, url, iris_onnx) as api:
        for _ in range(3):
            with soon():
                assert api.run(CSV, "iris")["state"] == "completed"


@pytest.mark.postgres
@pytest.mark.usefixtures("rarely")
def test_an_event_stream_shows_the_end_of_a_job_of_another_process_without_a_poll(
    url: str, tmp_path: Path, iris_onnx: Path
) -> None:
    with apart(tmp_path, url, iris_onnx) as api, ThreadPoolExecutor(1) as pool:
        job = api.upload(CSV)["id"]

        def states() -> list[str]:
            with api.http.stream("GET", f"/v1/jobs/{job}/events") as stream:
                return [
                    line.partition('"state":"')[2].partition('"')[0] for line in stream.iter_lines() if "data:" in line
                ]

        following = pool.submit(states)
        time.sleep(1.0)
        with soon():
            ok(api.http.post(f"/v1/predict/{job}", params={"model": "iris"}), 202)
            seen = following.result(RARELY)
            assert (seen[0], seen[-1]) == ("uploaded", "completed")


@pytest.mark.postgres
@pytest.mark.usefixtures("rarely")
def test_a_running_job_of_another_process_is_cancelled_without_a_poll(
    url: str, tmp_path: Path, iris_onnx: Path
) -> None:
    with apart(tmp_path, url, iris_onnx) as api:
        head, _, row = CSV.partition("\n")
        job = ok(api.http.post("/v1/predict", content=f"{head}\n{row * 2000}", params={"model": "iris"}), 202)["id"]
        deadline = time.monotonic() + SOON
        while api.job(job)["state"] != "running" and time.monotonic() < deadline:
            time.sleep(0.01)
        with soon():
            ok(api.http.post(f"/v1/jobs/{job}/cancel"), 202)
            ended = ok(api.http.get(f"/v1/jobs/{job}", params={"wait": 60}))
            assert ended["state"] == "cancelled"


@pytest.mark.postgres
@pytest.mark.usefixtures("rarely")
def test_streams_and_long_polls_end_without_a_poll_when_their_key_is_revoked(
    url: str, tmp_path: Path, iris_onnx: Path
) -> None:
    with (
        apart(tmp_path, url, iris_onnx, worker=False) as api,
        ThreadPoolExecutor(2) as pool,
        closing(Database(url)) as database,
    ):
        with database.write() as connection:
            _, key = keys.create(connection, "k", Scope.USER, "default", time.time())
        api.http.headers["authorization"] = f"Bearer {key}"
        job = api.upload(CSV)["id"]
        poll = pool.submit(api.http.get, f"/v1/jobs/{job}", params={"wait": 60})
        stream = pool.submit(api.http.get, f"/v1/jobs/{job}/events")
        time.sleep(1.0)
        with soon():
            with database.write() as connection:
                keys.revoke(connection, "k", time.time())
            problem(poll.result(RARELY), 401, "unauthorized")
            assert stream.result(RARELY).text.count("event:") == 1


# --- lost connections ---


@pytest.mark.postgres
def test_a_listener_connects_again_and_tells_that_anything_may_have_happened(url: str) -> None:
    with listening(url) as (database, heard):
        end_connections(url)
        heard.wait(lambda heard: heard == [ALL, ALL])
        with database.write() as connection:
            notifications.send(connection, Topic.QUEUED, ["1"])
        assert heard.until_last(Topic.QUEUED)[-1].job_ids == {"1"}


@pytest.mark.postgres
def test_a_listener_survives_what_cannot_be_handled(url: str) -> None:
    heard = Heard()

    def hear(notification: Notification) -> None:
        heard.hear(notification)
        raise ValueError("no")

    with closing(Database(url)) as database, database.listening(hear):
        heard.wait(lambda heard: heard == [ALL])
        for topic in (Topic.QUEUED, Topic.ENDED):
            with database.write() as connection:
                notifications.send(connection, topic)
            heard.until_last(topic)


@pytest.mark.postgres
def test_a_listener_without_a_server_ends_at_once(tmp_path: Path) -> None:
    address = f"postgresql+psycopg://u@/d?host={tmp_path}"
    with closing(Database(address)) as database:
        with database.listening(lambda _: None) as is_live:
            time.sleep(0.5)
            assert not is_live()
            began = time.monotonic()
        assert time.monotonic() - began < 2.0


def test_sqlite_sends_nothing(sqlite: Database) -> None:
    heard = Heard()
    with sqlite.listening(heard.hear) as is_live:
        with sqlite.write() as connection:
            notifications.send(connection, Topic.QUEUED, ["1"])
            assert connection.scalar(text("SELECT 1")) == 1
        assert not is_live()
    assert heard.all == []
