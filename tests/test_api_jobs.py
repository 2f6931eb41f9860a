import asyncio
import socket
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from subprocess import PIPE
from typing import Any
from urllib.parse import urlsplit

import httpx2
import orjson
import polars as pl
import pytest
from conftest import serving
from service import Api, encoded, ok, problem, running
from sqlalchemy import Connection, Engine, event, update

from batchserve.api.cache import SIZE
from batchserve.api.schemas.jobs import job_body
from batchserve.db import tables
from batchserve.db.connect import Database
from batchserve.domain import Attempt, Job, JobState, StoredInput
from batchserve.jobs import execution, requests
from batchserve.service.notifier import JobNotifier
from batchserve.storage import open_storage

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
UNKNOWN = "01a1f7d8-94a2-73b4-888c-2ac5b95e5d38"
FAR = "2999-01-01T00:00:00Z"


def queued(api: Api, **options: Any) -> dict[str, Any]:
    job: dict[str, Any] = ok(
        api.http.post("/v1/predict", params={"model": "iris", "reuse": False, **options}, content=CSV), 202
    )
    return job


@pytest.fixture
def claimed(idle_api: Api) -> Iterator[dict[str, Any]]:
    """A job that a worker of another process holds."""
    job = queued(idle_api, priority=100)
    database = Database(idle_api.settings.database_url)
    with database.write() as connection:
        taken = execution.claim_due(connection, "far-away", 60.0, database.moment(connection), 1)
    assert [each.id for each in taken] == [job["id"]]
    yield idle_api.job(job["id"])
    with database.write() as connection:
        requests.remove_whatever_its_state(connection, job["id"])
    database.close()


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service with one scoring process and chunks of 20 records, so that a job of some thousands runs for a while."""
    with running(tmp_path_factory.mktemp("busy"), processes=1, chunk_records=20) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture(scope="module")
def long_csv(flowers: pl.DataFrame) -> bytes:
    return encoded(pl.concat([flowers] * 200), "csv")


def started(api: Api, body: bytes) -> dict[str, Any]:
    """A job of which some chunks are done and most are not."""
    job_id = ok(api.http.post("/v1/predict?model=iris&reuse=false", content=body), 202)["id"]
    deadline = time.monotonic() + 20
    while not (job := api.job(job_id))["chunks"]["done"]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert job["state"] == "running"
    return job


# --- one job ---------------------------------------------------------------------------------------------------------


def test_a_job_resource_has_its_whole_history(api: Api) -> None:
    job = api.run(CSV, "iris", metadata='{"night": "2026-11-20"}', filename="one.csv")
    assert (job["state"], job["progress"], job["eta_s"], job["queue_position"]) == ("completed", 1.0, None, None)
    assert job["input"]["filename"] == "one.csv"
    assert (job["input"]["rows"], job["rows"], job["chunks"]) == (
        1, {"total": 1, "ok": 1, "failed": 0}, {"total": 1, "done": 1},
    )  # fmt: skip
    assert job["created_at"] <= job["queued_at"] <= job["started_at"] <= job["finished_at"]
    assert job["metadata"] == {"night": "2026-11-20"}
    (attempt,) = job["attempts"]
    assert (attempt["number"], attempt["outcome"], attempt["error"]) == (1, "completed", None)
    assert set(job["links"]) == {"self", "input", "inputs", "result", "errors", "events", "cancel"}
    for name, link in job["links"].items():
        if name != "cancel":
            assert api.http.get(link).status_code == 200, link


def test_a_job_that_has_not_changed_is_not_sent_again(api: Api, idle_api: Api) -> None:
    job = api.run(CSV, "iris")
    etag = api.http.get(job["links"]["self"]).headers["etag"]
    answer = api.http.get(job["links"]["self"], headers={"if-none-match": etag})
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    waiting = idle_api.upload(CSV)
    etag = idle_api.http.get(waiting["links"]["self"]).headers["etag"]
    ok(idle_api.http.post(f"/v1/predict/{waiting['id']}?model=iris"), 202)
    changed = idle_api.http.get(waiting["links"]["self"], headers={"if-none-match": etag})
    assert (ok(changed)["state"], changed.headers["retry-after"]) == ("queued", "1")


def test_a_queued_job_changes_with_its_queue_position(idle_api: Api) -> None:
    first, second = queued(idle_api, priority=50), queued(idle_api, priority=50)

    def look(etag: str = "") -> httpx2.Response:
        return idle_api.http.get(second["links"]["self"], headers={"if-none-match": etag})

    before = look()
    assert look(before.headers["etag"]).status_code == 304
    ok(idle_api.http.post(first["links"]["cancel"]), 202)
    after = look(before.headers["etag"])
    assert ok(after)["queue_position"] == ok(before)["queue_position"] - 1
    ok(idle_api.http.post(second["links"]["cancel"]), 202)


COMMITS = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
for line in sys.stdin:
    with connection:
        connection.execute("UPDATE inputs SET filename = ?", (line.strip(),))
    print("committed", flush=True)
connection.close()
"""


@pytest.mark.sqlite
def test_a_poll_shows_a_commit_of_another_process_at_once(idle_api: Api) -> None:
    link = idle_api.upload(CSV)["links"]["self"]
    path = Path(idle_api.settings.storage) / "batchserve.db"
    with subprocess.Popen([sys.executable, "-c", COMMITS, path], stdin=PIPE, stdout=PIPE, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        for number in range(20):
            for _ in range(3):
                ok(idle_api.http.get(link))
            print(f"{number}.csv", file=other.stdin, flush=True)
            assert other.stdout.readline() == "committed\n"
            assert ok(idle_api.http.get(link))["input"]["filename"] == f"{number}.csv"


def test_a_poll_shows_what_has_changed_by_time_alone(idle_api: Api) -> None:
    """A job of a higher priority becomes due: nothing is committed, but the other job is further back in the queue."""
    second = queued(idle_api, priority=80)
    position = second["queue_position"]
    first = queued(idle_api, priority=90, run_after=datetime.fromtimestamp(time.time() + 0.5, UTC).isoformat())
    deadline = time.monotonic() + 10
    while (told := ok(idle_api.http.get(second["links"]["self"]))["queue_position"]) == position:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert told == position + 1
    for job in (first, second):
        ok(idle_api.http.post(job["links"]["cancel"]), 202)


def test_polls_of_an_unchanged_job_read_it_a_few_times_a_second(idle_api: Api) -> None:
    link = idle_api.upload(CSV)["links"]["self"]
    statements: list[str] = []

    def count(connection: Connection, _cursor: object, statement: str, *_: object) -> None:
        if str(connection.engine.url) == idle_api.settings.database_url:  # not of services of other tests
            statements.append(statement)

    ok(idle_api.http.get(link))
    event.listen(Engine, "before_cursor_execute", count)
    try:
        bodies = [idle_api.http.get(link).content for _ in range(100)]
    finally:
        event.remove(Engine, "before_cursor_execute", count)
    assert len(set(bodies)) == 1
    assert len(statements) < 50


def test_every_form_of_a_poll_gets_the_same_response(idle_api: Api) -> None:
    job = queued(idle_api)
    link = job["links"]["self"]
    plain = [idle_api.http.get(link) for _ in range(2)]
    others = [idle_api.http.get(link, headers={"prefer": "return=minimal"}), idle_api.http.get(f"{link}?wait=0")]
    for answer in (*plain, *others):
        assert uuid.UUID(answer.headers.pop("x-request-id")).version == 7  # of its own
        assert (ok(answer), answer.headers) == (ok(plain[0]), plain[0].headers)
        assert (answer.headers["content-type"], answer.headers["retry-after"]) == ("application/json", "1")
        assert answer.headers["location"] == link
    began = time.monotonic()
    ok(idle_api.http.get(link, headers={"prefer": "wait=1"}))
    assert time.monotonic() - began > 0.9
    ok(idle_api.http.post(job["links"]["cancel"]), 202)


def test_a_poll_of_a_deleted_job_is_a_problem_at_once(idle_api: Api) -> None:
    link = idle_api.upload(CSV)["links"]["self"]
    etag = idle_api.http.get(link).headers["etag"]
    assert idle_api.http.get(link, headers={"if-none-match": etag}).status_code == 304
    assert idle_api.http.delete(link).status_code == 204
    problem(idle_api.http.get(link), 404, "job-not-found")
    problem(idle_api.http.get(link, headers={"if-none-match": etag}), 404, "job-not-found")


def test_polls_of_more_jobs_than_the_cache_holds_each_get_their_own_job(idle_api: Api) -> None:
    ids = [idle_api.upload(CSV)["id"] for _ in range(SIZE + 5)]
    for _ in range(2):
        assert [idle_api.job(job_id)["id"] for job_id in ids] == ids


def test_a_retry_changes_the_etag_of_its_job(idle_api: Api) -> None:
    """It is queued as before, but since another time."""
    job = queued(idle_api)
    tags = []
    for _ in range(2):
        ok(idle_api.http.post(job["links"]["cancel"]), 202)
        ok(idle_api.http.post(f"{job['links']['self']}/retry"), 202)
        tags.append(idle_api.http.get(job["links"]["self"]).headers["etag"])
    assert tags[0] != tags[1]
    ok(idle_api.http.post(job["links"]["cancel"]), 202)


def test_the_speed_is_that_of_the_last_attempt() -> None:
    """600 of 1000 rows were done, then a day passed; the second attempt did 100 in 10 seconds."""
    job = Job(
        "j", JobState.RUNNING, (StoredInput("inputs/j", "csv", bytes=1, sha256="a" * 64),), 0.0,
        attempt=2, rows_ok=700, planned=True, rows_planned=1000, progress=0.7, started_at=0.0,
    )  # fmt: skip
    attempts = [Attempt(1, "w", 0.0, 60.0, "released"), Attempt(2, "w", 86_400.0, rows_before=600)]
    body = job_body(job, attempts, None, 86_410.0)
    assert (body.rows_per_s, body.eta_s) == (10.0, 30.0)
    stopped = replace(job, state=JobState.FAILED, finished_at=86_420.0)
    ended = [attempts[0], replace(attempts[1], finished_at=86_420.0, outcome="failed")]
    body = job_body(stopped, ended, None, 99_999.0)
    assert (body.rows_per_s, body.eta_s, body.progress) == (5.0, None, 0.7)
    nothing_yet = [*ended, Attempt(3, "w", 90_000.0, rows_before=700)]
    assert job_body(replace(job, attempt=3), nothing_yet, None, 90_010.0).rows_per_s is None


@pytest.mark.slow
@pytest.mark.sqlite
def test_reads_are_quick_while_writers_wait_for_the_lock(idle_api: Api) -> None:
    """Twenty cancels wait for another process that holds the lock, and occupy all connections for writing."""
    job = queued(idle_api)
    statuses: list[int] = []

    def cancel() -> None:
        statuses.append(idle_api.http.post(job["links"]["cancel"]).status_code)

    threads = [threading.Thread(target=cancel) for _ in range(20)]
    times: list[float] = []
    with closing(sqlite3.connect(Path(idle_api.settings.storage) / "batchserve.db")) as other:
        other.isolation_level = None
        other.execute("BEGIN IMMEDIATE")
        held = time.monotonic()
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        while time.monotonic() - held < 8:
            for path in ("/livez", job["links"]["self"]):
                began = time.monotonic()
                ok(idle_api.http.get(path))
                times.append(time.monotonic() - began)
            time.sleep(0.05)
        assert statuses == []
        other.execute("ROLLBACK")
    for thread in threads:
        thread.join(30)
    assert statuses == [202] * 20
    assert len(times) > 10
    assert max(times) < 6  # the lock is held for eight seconds


def test_a_long_poll_ends_when_the_state_changes(idle_api: Api) -> None:
    job = queued(idle_api)
    cancel = threading.Timer(0.4, lambda: idle_api.http.post(job["links"]["cancel"]))
    cancel.start()
    began = time.monotonic()
    changed = ok(idle_api.http.get(job["links"]["self"], params={"wait": 30}))
    cancel.join()
    assert changed["state"] == "cancelled"
    assert 0.3 < time.monotonic() - began < 20


def test_a_long_poll_ends_after_its_time_and_at_once_for_a_finished_job(api: Api, idle_api: Api) -> None:
    job = queued(idle_api)
    began = time.monotonic()
    assert ok(idle_api.http.get(job["links"]["self"], headers={"prefer": "wait=1"}))["state"] == "queued"
    assert 0.9 < time.monotonic() - began < 20
    began = time.monotonic()
    assert ok(api.http.get(api.run(CSV, "iris")["links"]["self"], params={"wait": 30}))["state"] == "completed"
    assert time.monotonic() - began < 20
    problem(idle_api.http.get(job["links"]["self"], params={"wait": 61}), 422, "invalid-options")
    problem(idle_api.http.get(job["links"]["self"], params={"wait": "nan"}), 422, "invalid-options")


@pytest.mark.parametrize(
    ("method", "suffix"),
    [("GET", ""), ("GET", "?wait=5"), ("GET", "/events"), ("POST", "/cancel"), ("POST", "/retry"), ("DELETE", "")],
)
@pytest.mark.parametrize("job_id", ["nope", UNKNOWN, "0" * 5000])
def test_an_unknown_job_is_not_found(api: Api, method: str, suffix: str, job_id: str) -> None:
    problem(api.http.request(method, f"/v1/jobs/{job_id}{suffix}"), 404, "job-not-found")


# --- lists -----------------------------------------------------------------------------------------------------------


def test_jobs_are_listed_newest_first_in_pages(api: Api) -> None:
    ids = [api.upload(CSV, filename=f"page-{number}.csv")["id"] for number in range(5)]
    seen: list[str] = []
    query: dict[str, Any] = {"q": "page-", "limit": 2}
    sizes = []
    while True:
        page = ok(api.http.get("/v1/jobs", params=query))
        sizes.append(len(page["jobs"]))
        seen += [job["id"] for job in page["jobs"]]
        if page["next"] is None:
            break
        query["after"] = page["next"]
    assert seen == ids[::-1]
    assert sizes == [2, 2, 1]


def test_jobs_are_filtered_by_state_model_and_text(api: Api) -> None:
    marks = [
        api.run(CSV, "iris", metadata='{"batch": "filter-me"}')["id"],
        api.run(CSV + b",,,\n", "iris@1", metadata='{"batch": "filter-me"}', on_row_error="fail")["id"],
        api.run(CSV, "petals", metadata='{"batch": "filter-me"}')["id"],
    ]

    def found(**query: str) -> list[str]:
        listed = ok(api.http.get("/v1/jobs", params={"q": "filter-me", **query}))["jobs"]
        return [job["id"] for job in reversed(listed)]

    assert found() == marks
    assert found(state="completed") == [marks[0], marks[2]]
    assert found(state="failed") == [marks[1]]
    assert found(model="iris") == marks[:2]
    assert found(model="iris@1", state="failed") == [marks[1]]
    assert found(model="iris@2") == []
    assert found(model="rose") == []
    assert found(q=marks[2]) == [marks[2]]


def test_jobs_are_filtered_by_several_states_and_by_times_and_counted(api: Api) -> None:
    mark = '{"batch": "filter-times"}'
    done = [api.run(CSV, "iris", metadata=mark, reuse=False) for _ in range(2)]
    failed = api.run(CSV + b",,,\n", "iris", metadata=mark, on_row_error="fail")
    waiting = ok(
        api.http.post(
            "/v1/predict", params={"model": "iris", "metadata": mark, "reuse": False, "run_after": FAR}, content=CSV
        ),
        202,
    )
    ids = [job["id"] for job in (*done, failed, waiting)]

    def found(**query: Any) -> list[int]:
        page = ok(api.http.get("/v1/jobs", params={"q": "filter-times", "total": True, **query}))
        assert page["total"] == len(page["jobs"])
        return [ids.index(job["id"]) for job in page["jobs"]]

    assert found(state=["failed", "queued"]) == found(state="failed,queued") == [3, 2]
    assert found(since="1h") == found(since="2020-01-01", until="2999-01-01T00:00:00+02:00") == [3, 2, 1, 0]
    assert found(until="1h") == found(since="2999-01-01") == []
    begun = int(done[1]["id"][:8] + done[1]["id"][9:13], 16) / 1000
    assert found(since=datetime.fromtimestamp(begun, UTC).isoformat()) == [3, 2, 1]
    assert found(order="asc") == [0, 1, 2, 3]
    assert found(sort="finished") == [2, 1, 0]
    assert found(sort="finished", order="asc", state="completed") == [0, 1]
    assert found(finished_since=failed["finished_at"]) == [2]
    assert found(finished_until=failed["finished_at"], order="asc") == [0, 1]
    assert ok(api.http.get("/v1/jobs", params={"limit": 1}))["total"] is None
    api.http.post(waiting["links"]["cancel"])


@pytest.mark.parametrize("query", [{}, {"state": "completed,failed"}, {"sort": "finished"}, {"order": "asc"}])
def test_the_pages_of_every_list_are_linked_by_next(api: Api, query: dict[str, str]) -> None:
    mark = '{"batch": "filter-pages"}'
    for _ in range(3):
        api.run(CSV, "iris", metadata=mark, reuse=False)
    asked: dict[str, Any] = {"q": "filter-pages", "total": True, **query}
    whole = ok(api.http.get("/v1/jobs", params=asked))
    seen: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = ok(api.http.get("/v1/jobs", params={**asked, "limit": 2, **after}))
        seen += [job["id"] for job in page["jobs"]]
        assert page["total"] == whole["total"] >= 3
        if page["next"] is None:
            break
        after = {"after": page["next"]}
    assert seen == [job["id"] for job in whole["jobs"]]


def test_a_search_takes_wildcards_literally(api: Api) -> None:
    names = ["100%_sure.csv", "100 not sure.csv", "back\\slash.csv"]
    for name in names:
        api.upload(CSV, filename=name)

    def found(text: str) -> list[str]:
        return [job["input"]["filename"] for job in ok(api.http.get("/v1/jobs", params={"q": text}))["jobs"]]

    assert found("100%_") == ["100%_sure.csv"]
    assert found("back\\slash") == ["back\\slash.csv"]
    assert found("' OR 1=1 --") == []


@pytest.mark.parametrize(
    "query",
    [
        "state=lost", "limit=0", "limit=201", "limit=x", "model=iris@x", "model=iris@",
        "model=iris@99999999999999999999999",
        "state=failed&state=lost", "state=failed,", "since=soon", "until=2026-13-01", "finished_since=x", "sort=size",
        "sort=created&finished_since=1d", "order=up", "total=perhaps", "after=1.5_x", "after=x&sort=finished",
    ],
)  # fmt: skip
def test_an_invalid_filter_is_named(api: Api, query: str) -> None:
    body = problem(api.http.get(f"/v1/jobs?{query}"), 422, "invalid-options")
    assert any(part.partition("=")[0] in body["detail"] for part in query.split("&"))


# --- events ----------------------------------------------------------------------------------------------------------


def events(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each with its name, ID and data."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if "data" in fields:
            found.append({"event": fields["event"], "id": fields["id"], "job": orjson.loads(fields["data"])})
    return found


@pytest.mark.slow
def test_events_report_each_state_once_and_end_with_the_job(
    tmp_path: Path, iris_onnx: Path, flowers: pl.DataFrame
) -> None:
    body = encoded(pl.concat([flowers] * 70), "csv")
    settings = {"BATCHSERVE_PROCESSES": "1", "BATCHSERVE_CHUNK_RECORDS": "50", "BATCHSERVE_POLL": "0.1"}
    with serving(tmp_path, **settings) as url:
        assert httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes()).is_success
        job = ok(httpx2.post(f"{url}/v1/upload", content=body), 201)
        link = url + job["links"]["events"]
        with httpx2.stream("GET", link, timeout=30) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            blocks = stream.iter_text()
            text = next(blocks)
            assert events(text)[0]["job"]["state"] == "uploaded"
            ok(httpx2.post(f"{url}/v1/predict/{job['id']}?model=iris"), 202)
            text += "".join(blocks)
        told = events(text)
        states = [event["job"]["state"] for event in told if event["event"] == "state"]
        assert states[0] == "uploaded"
        assert states[-2:] == ["running", "completed"]
        assert len(states) == len(set(states))
        progress = [event["job"]["progress"] for event in told]
        assert progress == sorted(progress)
        assert any(event["event"] == "progress" for event in told)
        assert len({event["id"] for event in told}) == len(told)
        again = httpx2.get(link, headers={"last-event-id": told[-2]["id"]})
        assert [event["id"] for event in events(again.text)] == [told[-1]["id"]]
        assert events(httpx2.get(link, headers={"last-event-id": told[-1]["id"]}).text) == []


def test_events_of_a_finished_job_are_its_last_state(api: Api) -> None:
    job = api.run(CSV, "iris")
    for headers in ({}, {"last-event-id": "what is this"}):
        (event,) = events(api.http.get(job["links"]["events"], headers=headers).text)
        assert (event["event"], event["job"]) == ("state", job)


@contextmanager
def followed(url: str, job: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The rest of the stream of a job's events, of which the first was read."""
    with httpx2.stream("GET", url + job["links"]["events"], timeout=30) as stream:
        blocks = stream.iter_text()
        assert events(next(blocks))[0]["job"]["id"] == job["id"]
        yield blocks


@pytest.mark.slow
def test_streams_and_long_polls_end_with_their_job_or_their_server(tmp_path: Path) -> None:
    with ExitStack() as server:
        url = server.enter_context(serving(tmp_path))
        deleted, kept = (ok(httpx2.post(f"{url}/v1/upload", content=CSV), 201) for _ in range(2))
        with followed(url, deleted) as rest:
            assert httpx2.delete(url + deleted["links"]["self"]).status_code == 204
            assert events("".join(rest)) == []
        with followed(url, kept) as rest, ThreadPoolExecutor() as pool:
            poll = pool.submit(httpx2.get, url + kept["links"]["self"], params={"wait": 30}, timeout=30)
            time.sleep(0.5)
            began = time.monotonic()
            server.close()
            assert time.monotonic() - began < 20
            assert events("".join(rest)) == []
            assert ok(poll.result())["state"] == "uploaded"


@pytest.mark.slow
def test_a_stopping_server_claims_no_more_jobs_while_requests_end(tmp_path: Path) -> None:
    with ExitStack() as server:
        url = server.enter_context(serving(tmp_path, BATCHSERVE_GRACE="8", BATCHSERVE_LOG_FORMAT="json"))
        address = urlsplit(url)
        with (
            socket.create_connection((address.hostname, address.port), 20) as slow,
            ThreadPoolExecutor() as pool,
        ):
            slow.sendall(b"POST /v1/upload HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n" + CSV)
            time.sleep(0.5)
            began = time.monotonic()
            ending = pool.submit(server.close)
            while '"worker_stop"' not in (tmp_path / "server.log").read_text():
                assert time.monotonic() - began < 7
                time.sleep(0.05)
            assert not ending.done()  # the upload may still finish
            ending.result()
        assert 7 < time.monotonic() - began < 20


# --- cancel ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["uploaded", "queued"])
def test_a_job_that_is_not_running_yet_is_cancelled_at_once(idle_api: Api, state: str) -> None:
    job = idle_api.upload(CSV) if state == "uploaded" else queued(idle_api)
    cancelled = ok(idle_api.http.post(job["links"]["cancel"]), 202)
    assert (cancelled["state"], cancelled["cancel_requested"], cancelled["progress"]) == ("cancelled", True, 0.0)
    assert ok(idle_api.http.post(job["links"]["cancel"]), 202) == cancelled


def test_cancelling_a_running_job_is_a_request_to_its_worker(idle_api: Api, claimed: dict[str, Any]) -> None:
    assert claimed["state"] == "running"
    asked = ok(idle_api.http.post(claimed["links"]["cancel"]), 202)
    assert (asked["state"], asked["cancel_requested"], asked["finished_at"]) == ("running", True, None)


def test_a_cancelled_job_stops_before_its_end_and_keeps_its_finished_chunks(busy: Api, long_csv: bytes) -> None:
    job = started(busy, long_csv)
    ok(busy.http.post(job["links"]["cancel"]), 202)
    cancelled = busy.finished(job["id"])
    assert (cancelled["state"], cancelled["attempts"][0]["outcome"]) == ("cancelled", "cancelled")
    done = cancelled["rows"]["ok"]
    assert 0 < done < 30_000
    body = problem(busy.http.get(job["links"]["result"]), 404, "result-not-ready")
    assert body["state"] == "cancelled"
    partial = busy.result(cancelled, partial="true")
    assert partial.headers["batchserve-incomplete"].startswith("rows 0-")
    assert 0 < partial.text.count("\n") - 1 <= done
    assert 0 < cancelled["progress"] < 1  # the share that is done


def test_cancelling_a_finished_job_changes_nothing(api: Api) -> None:
    job = api.run(CSV, "iris")
    assert ok(api.http.post(job["links"]["cancel"]), 202) == job
    assert api.result(job).text.count("\n") == 2


# --- retry -----------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_resumes_where_it_stopped(busy: Api, flowers: pl.DataFrame) -> None:
    body = encoded(pl.concat([flowers] * 30), "csv")
    job = started(busy, body)
    ok(busy.http.post(job["links"]["cancel"]), 202)
    stopped = busy.finished(job["id"])
    assert stopped["state"] == "cancelled"
    retried = ok(busy.http.post(f"{job['links']['self']}/retry"), 202)
    assert (retried["state"] in ("queued", "running"), retried["cancel_requested"]) == (True, False)
    done = busy.finished(job["id"])
    assert (done["state"], done["rows"]) == ("completed", {"total": 4500, "ok": 4500, "failed": 0})
    assert [attempt["outcome"] for attempt in done["attempts"]] == ["cancelled", "completed"]
    undisturbed = busy.run(body, "iris")
    assert done["result"]["sha256"] == undisturbed["result"]["sha256"]


def test_a_retry_with_a_key_is_done_once(idle_api: Api) -> None:
    job = queued(idle_api)
    ok(idle_api.http.post(job["links"]["cancel"]), 202)
    url = f"{job['links']['self']}/retry"
    first = idle_api.http.post(url, headers={"idempotency-key": f"retry-{job['id']}"})
    assert ok(first, 202)["state"] == "queued"
    again = idle_api.http.post(url, headers={"idempotency-key": f"retry-{job['id']}"})
    assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
    problem(idle_api.http.post(url), 409, "job-conflict")


def test_only_a_stopped_job_that_was_queued_can_be_retried(api: Api, idle_api: Api) -> None:
    never = idle_api.upload(CSV)
    problem(idle_api.http.post(f"{never['links']['self']}/retry"), 409, "job-conflict")
    ok(idle_api.http.post(never["links"]["cancel"]), 202)
    problem(idle_api.http.post(f"{never['links']['self']}/retry"), 409, "job-conflict")
    done = api.run(CSV, "iris")
    assert "is completed" in problem(api.http.post(f"{done['links']['self']}/retry"), 409, "job-conflict")["detail"]


def test_failed_records_are_scored_again_in_a_new_job(api: Api) -> None:
    body = CSV + b"5.1,3.5,1.4,0.2\n" * 150 + b",,,\n"
    job = api.run(body, "iris")
    assert (job["state"], job["rows"]["failed"]) == ("completed", 1)
    again = ok(api.http.post(f"{job['links']['self']}/retry", json={"rows": "failed"}), 202)
    assert again["id"] != job["id"]
    done = api.finished(again["id"])
    assert (done["state"], done["rows"]) == ("completed", job["rows"])
    assert done["result"]["sha256"] == job["result"]["sha256"]
    assert api.errors(done) == api.errors(job)
    fine = api.run(CSV, "iris")
    problem(api.http.post(f"{fine['links']['self']}/retry", json={"rows": "failed"}), 409, "job-conflict")


@pytest.mark.parametrize("body", [{"rows": "some"}, {"colour": "blue"}, [1], "x"])
def test_a_retry_with_an_invalid_body_is_refused(api: Api, body: Any) -> None:
    job = api.run(CSV, "iris")
    problem(api.http.post(f"{job['links']['self']}/retry", json=body), 422, "invalid-options")


# --- delete ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["uploaded", "queued", "cancelled"])
def test_a_job_that_is_not_running_can_be_deleted(idle_api: Api, state: str) -> None:
    before = idle_api.stored()
    job = idle_api.upload(CSV) if state == "uploaded" else queued(idle_api)
    if state == "cancelled":
        ok(idle_api.http.post(job["links"]["cancel"]), 202)
    assert idle_api.stored() - before == {f"inputs/{job['id']}"}
    answer = idle_api.http.delete(job["links"]["self"])
    assert (answer.status_code, answer.content) == (204, b"")
    problem(idle_api.http.get(job["links"]["self"]), 404, "job-not-found")
    problem(idle_api.http.delete(job["links"]["self"]), 404, "job-not-found")
    assert idle_api.stored() == before


def test_a_finished_job_is_deleted_with_all_its_bytes(api: Api) -> None:
    before = api.stored()
    jobs_done = [
        api.run(CSV + b",,,\n", "iris"),
        api.run(CSV + b"5.1,3.5,1.4,0.2\n" * 120 + b",,,\n", "iris", on_row_error="fail"),
    ]
    assert [job["state"] for job in jobs_done] == ["completed", "failed"]
    assert len(api.stored() - before) >= 5
    for job in jobs_done:
        assert api.http.delete(job["links"]["self"]).status_code == 204
    assert api.stored() == before


def test_deleting_a_job_removes_the_results_of_its_earlier_attempts(idle_api: Api) -> None:
    """An attempt that lost its lease while it assembled the result has left a result."""
    job, other = queued(idle_api), queued(idle_api)
    database = Database(idle_api.settings.database_url)
    with database.write() as connection:
        connection.execute(update(tables.jobs).where(tables.jobs.c.id.in_([job["id"], other["id"]])).values(attempt=2))
    database.close()
    left = [f"results/{job['id']}-{name}" for name in ("1", "1.errors", "2")]
    storage = open_storage(idle_api.settings.storage)
    for key in [*left, f"results/{other['id']}-1"]:
        storage.compose(key, [b"left"])
    assert idle_api.http.delete(job["links"]["self"]).status_code == 204
    stored = idle_api.stored()
    assert stored.isdisjoint(left)
    assert f"results/{other['id']}-1" in stored
    assert idle_api.http.delete(other["links"]["self"]).status_code == 204


def test_a_refused_retry_of_failed_records_leaves_no_copies(api: Api, iris_onnx: Path) -> None:
    api.register("brief", iris_onnx)
    job = api.run(CSV + b"5.1,3.5,1.4,0.2\n" * 150 + b",,,\n", "brief")
    assert api.http.delete("/v1/models/brief/versions/1").status_code == 204
    with api.unchanged():
        detail = problem(api.http.post(f"{job['links']['self']}/retry", json={"rows": "failed"}), 409, "job-conflict")
        assert "brief@1 was deleted" in detail["detail"]


def test_a_running_job_is_not_deleted(idle_api: Api, claimed: dict[str, Any]) -> None:
    detail = problem(idle_api.http.delete(claimed["links"]["self"]), 409, "job-conflict")["detail"]
    assert "cancel it" in detail
    assert idle_api.job(claimed["id"])["state"] == "running"
    assert f"inputs/{claimed['id']}" in idle_api.stored()


def test_all_waiters_of_a_job_are_notified_of_its_next_change_only() -> None:
    async def wait() -> None:
        notifier = JobNotifier(has_worker=True)
        both = [notifier.subscribe("1"), notifier.subscribe("1")]
        other = notifier.subscribe("2")
        await asyncio.to_thread(notifier.notify, "1")
        await asyncio.wait_for(asyncio.gather(*(change.wait() for change in both)), 5)
        assert not other.is_set()
        assert not notifier.subscribe("1").is_set()
        notifier.notify("3")  # there is no waiter

    asyncio.run(wait())
