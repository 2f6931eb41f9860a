"""Steps of the service, each in a separate process that a test may kill, run without disk space, or run concurrently.

The processes are forked from one that has imported everything already. A step opens what it needs, begins when its test
says so, and reports what was acknowledged over a socket, with `send`: a `write` would be counted as one to a file.
"""

import asyncio
import contextlib
import ctypes
import hashlib
import io
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import anyio.to_thread
import httpx2
import orjson
from sqlalchemy import Connection, select
from starlette.concurrency import run_in_threadpool
from starlette.testclient import TestClient

from batchserve import logs
from batchserve.app import create_app
from batchserve.db import tables
from batchserve.domain import Job, JobState
from batchserve.jobs import execution, lists, queries, requests
from batchserve.runtime import Runtime
from batchserve.scoring import assembly
from batchserve.service import Service
from batchserve.service.calls import Calls
from batchserve.settings import Settings
from batchserve.upkeep.sweep import sweep
from batchserve.worker import Worker

T = TypeVar("T")

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
ROWS = ["5.1,3.5,1.4,0.2\n", "6.3,3.3,6.0,2.5\n", "5.9,3.0,4.2,1.5\n"]
LONG = HEADER + "".join(ROWS) * 20  # three chunks
FLAWED = LONG.replace(ROWS[1], ",,,\n", 1)  # ... one of them with a failed record
SHORT = HEADER + "".join(ROWS) + ",,,\n"  # done in one call
QUERY: dict[str, Any] = {"model": "iris", "reuse": False}
UNFINISHED = (JobState.QUEUED, JobState.RUNNING)
DAY = 86400.0

SETTINGS: dict[str, Any] = {
    "chunk_records": 25,
    "inline_bytes": 0,
    "poll": 0.02,
    "rescue": 0.1,
    "free_bytes": 0,
    "log_level": "error",
}


class EndedCall(Generic[T]):
    """A call that has ended; see `engines.Call`."""

    def __init__(self, future: "Future[T]") -> None:
        self.future = future
        self.seconds: float | None = None

    def kill(self) -> None:
        """It has ended."""


class EngineOfThisProcess:
    """Calls functions at once in the thread of the caller, so that one process has the trace of a whole job, in order.

    `dies_before`: the function whose call ends this process.
    """

    capacity = 1

    def __init__(self, dies_before: Callable[..., object] | None = None) -> None:
        self._dies_before = dies_before

    def start(self) -> None:
        """There is nothing to prepare."""

    def submit(self, function: Callable[..., T], *args: Any, timeout: float, urgent: bool = False) -> EndedCall[T]:  # noqa: ARG002
        if function is self._dies_before:
            os.kill(os.getpid(), signal.SIGKILL)
        future: Future[T] = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:  # noqa: BLE001 - handed on, as every engine does
            future.set_exception(error)
        return EndedCall(future)

    async def run(self, function: Callable[..., T], *args: Any, seconds: float) -> T:
        return self.submit(function, *args, timeout=seconds).future.result()

    def close(self) -> None:
        """There is nothing to end."""


@dataclass(frozen=True)
class Site:
    """A storage folder, and the service on it."""

    settings: Settings

    @contextlib.contextmanager
    def api(self) -> Iterator[TestClient]:
        """A service without a worker, all of whose writes are made by one thread."""
        app = create_app(self.settings, worker=False)
        with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as http:
            assert http.portal is not None
            http.portal.call(_in_this_process, app.state.service)
            yield http

    @contextlib.contextmanager
    def runtime(self, engine: EngineOfThisProcess | None = None) -> Iterator[Runtime]:
        with Runtime.open(self.settings) as runtime:
            yield replace(runtime, engine=engine or EngineOfThisProcess())


async def _in_this_process(service: Service) -> None:
    service.calls = Calls(EngineOfThisProcess(), most=64, patience=10.0)
    anyio.to_thread.current_default_thread_limiter().total_tokens = 1


class Told:
    """The events that a step sends to its test, each a name with its data."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._begun = False

    def wait(self, http: TestClient | None = None) -> None:
        """Everything is open, and a fault may occur: at the first wait, the step begins when the test says so.

        Its calls come from this thread; those of a service from the one that writes for it: the writer of its
        database, if all bytes go into rows.
        """
        if not self._begun:
            self("ready", thread=_writing_thread(http) if http else threading.get_native_id())
            self._begun = bool(self._channel.recv(1))

    def __call__(self, event: str, **details: Any) -> None:
        self._channel.sendall(orjson.dumps({"event": event, **details}) + b"\n")


def _writing_thread(http: TestClient) -> int:
    assert http.portal is not None
    runtime = http.app.state.service.runtime  # type: ignore[attr-defined]
    if not runtime.settings.inline_bytes:
        return http.portal.call(run_in_threadpool, threading.get_native_id)
    thread: int = http.portal.call(runtime.database.commit, lambda _: threading.get_native_id())
    return thread


# --- the steps -------------------------------------------------------------------------------------------------------


def prepare(site: Site, tell: Told, model: str, content: str = "", is_run: bool = False) -> None:
    """A model and a finished job, which must not be lost; and, if requested, a second job, queued or finished."""
    tell.wait()
    with site.api() as http:
        _ok(http.put("/v1/models/iris", content=Path(model).read_bytes()), 201)
        _queue(http, FLAWED)
    run(site, tell)
    if content:
        with site.api() as http:
            tell("queued", id=_queue(http, content))
    if is_run:
        run(site, tell)


def upload(site: Site, tell: Told) -> None:
    """Upload and predict, each reported when it is acknowledged, and retried when it is refused."""
    with site.api() as http:
        tell.wait(http)
        job = _insist(tell, lambda: http.post("/v1/upload", content=LONG), (201,)).json()
        tell("uploaded", id=job["id"], sha256=_digest(LONG.encode()))
        _insist(tell, lambda: http.post(f"/v1/predict/{job['id']}", params=QUERY), (202,))
        tell("queued", id=job["id"])


def score(site: Site, tell: Told) -> None:
    """Two jobs that are scored within the call that submits them, each reported when it is acknowledged."""
    with site.api() as http:
        http.app.state.service.notifier.has_worker = True  # type: ignore[attr-defined]
        tell.wait(http)
        job = _insist(tell, lambda: http.post("/v1/upload", content=SHORT), (201,)).json()
        tell("uploaded", id=job["id"], sha256=_digest(SHORT.encode()))
        _insist_on_result(tell, http, f"/v1/predict/{job['id']}", "")
        _insist_on_result(tell, http, "/v1/predict", SHORT)


def _insist_on_result(tell: Told, http: TestClient, path: str, content: str) -> None:
    job = _insist(tell, lambda: http.post(path, params=QUERY, content=content), (202,)).json()
    assert job["state"] == "completed", job
    tell("queued", id=job["id"])


def submit_together(site: Site, tell: Told) -> None:
    """Two uploads and two jobs that are scored within their calls, whose writes wait for one transaction."""
    with site.api() as http:
        http.app.state.service.notifier.has_worker = True  # type: ignore[attr-defined]
        tell.wait(http)
        assert http.portal is not None
        http.portal.call(_submit_together, tell, http.app)


async def _submit_together(tell: Told, app: Any) -> None:
    is_released = threading.Event()
    address = "http://127.0.0.1:8000"
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url=address) as http:
        holding = asyncio.ensure_future(app.state.service.runtime.database.commit(lambda _: is_released.wait(20)))
        await asyncio.sleep(0)
        calls = [_submit(tell, http, path) for path in ("/v1/upload", "/v1/predict") * 2]
        submitting = asyncio.gather(*calls)
        await asyncio.sleep(0.3)  # long enough for all to wait; a group that is smaller is tested as well
        is_released.set()
        await submitting
        await asyncio.wait([holding])  # it may share the transaction that fails


async def _submit(tell: Told, http: httpx2.AsyncClient, path: str) -> None:
    is_scored = path == "/v1/predict"
    params, wanted = (QUERY, 202) if is_scored else ({}, 201)
    answer = await http.post(path, params=params, content=SHORT)
    for _ in range(2):
        if answer.is_success:
            break
        tell("refused", status=answer.status_code, type=answer.headers["content-type"], code=answer.json()["code"])
        answer = await http.post(path, params=params, content=SHORT)
    job = _ok(answer, wanted)
    tell("uploaded", id=job["id"], sha256=_digest(SHORT.encode()))
    if is_scored:
        assert job["state"] == "completed", job
        tell("queued", id=job["id"])


def submit(site: Site, tell: Told, count: int, rows: int = 60) -> None:
    """Queues that many jobs, with one request each, and reports the statuses of the responses."""
    with site.api() as http:
        tell.wait(http)
        for number in range(count):
            content = HEADER + "".join(ROWS) * (rows // 3) + f"{number}.5,1.5,{os.getpid() % 7},0.5\n"
            answer = http.post("/v1/predict", params=QUERY, content=content)
            tell("answered", status=answer.status_code)
            if answer.is_success:
                tell("queued", id=answer.json()["id"], sha256=_digest(content.encode()))


def run(site: Site, tell: Told, dies_before: str = "") -> None:
    """Runs a worker until no job is unfinished. A job that fails is reported, and retried."""
    function = getattr(assembly, dies_before) if dies_before else None
    with site.runtime(EngineOfThisProcess(function)) as runtime:

        def look(job_id: str) -> None:
            with runtime.database.read() as connection:
                job = queries.get(connection, job_id)
                unfinished = _unfinished(connection)
            if job.state is JobState.FAILED and job.error is not None:
                tell("failed", id=job_id, code=job.error["code"])
                with runtime.database.write() as connection:
                    requests.retry_if_stopped(connection, job_id, time.time())
            elif not unfinished:
                worker.stop()

        worker = Worker(runtime, look)
        tell.wait()
        worker.run()


def rescue(site: Site, tell: Told) -> None:
    """Advances the time, so that the jobs of dead workers are queued again."""
    tell.wait()
    with site.runtime() as runtime:
        _let_leases_lapse(runtime)


def help_out(site: Site, tell: Told) -> None:
    """Runs one of several workers until no job is unfinished."""
    with site.runtime() as runtime:
        worker = Worker(runtime, lambda _: None)
        tell.wait()

        def watch() -> None:
            while True:
                time.sleep(0.1)
                with runtime.database.read() as connection:
                    if not _unfinished(connection):
                        worker.stop()
                        return

        threading.Thread(target=watch).start()
        worker.run()


def delete(site: Site, tell: Told, job_id: str) -> None:
    """Deletes until the job is gone: 204, or 404 if an earlier try that was refused had deleted it."""
    with site.api() as http:
        tell.wait(http)
        _insist(tell, lambda: http.delete(f"/v1/jobs/{job_id}"), (204, 404))
        tell("deleted", id=job_id)


def recover(site: Site, tell: Told) -> None:
    """Reports what a restart finds, then what exists after its worker and its sweep."""
    tell.wait()
    with site.runtime() as runtime, runtime.database.read() as connection:
        tell("integrity", says=_integrity(connection), foreign_keys=len(_broken_references(connection)))
        visible = {entry.key: _stored_digest(runtime, entry.key) for entry in runtime.storage.list("")}
        in_rows = connection.execute(select(tables.contents)).mappings()
        visible |= {row["key"]: _digest(row["content"]) for row in in_rows}
        found = {
            job.id: {"state": job.state, "result": visible.get(job.result.key if job.result else "")}
            for job in _all(connection)
        }
    tell("visible", objects={key: sha256 for key, sha256 in visible.items() if not key.startswith("batchserve.db")})
    tell("found", jobs=found)
    with site.runtime() as runtime:
        _let_leases_lapse(runtime)
        with runtime.database.read() as connection:
            is_done = not _unfinished(connection)
    if not is_done:
        run(site, tell)
    with site.runtime() as runtime:
        swept = sweep(runtime.database, runtime.storage, DAY / 24, time.time() + DAY)
    with site.api() as http:
        tell("jobs", jobs=_jobs(http), swept=swept.total)
    files = [path for path in Path(site.settings.storage).rglob("*") if path.is_file()]
    names = [path.relative_to(site.settings.storage).as_posix() for path in files]
    tell("files", names=[name for name in names if not name.startswith("batchserve.db")])


def _let_leases_lapse(runtime: Runtime) -> None:
    with runtime.database.write() as connection:
        now = runtime.database.moment(connection)
        execution.rescue_expired(connection, 3, replace(now, steady=now.steady + DAY))


def _unfinished(connection: Connection) -> list[Job]:
    return [job for job in _all(connection) if job.state in UNFINISHED]


def _all(connection: Connection) -> list[Job]:
    return lists.list_page(connection, limit=1000)


# --- shared ----------------------------------------------------------------------------------------------------------


def _jobs(http: TestClient) -> dict[str, dict[str, Any]]:
    """Every job as its clients see it: input, result and errors list by their digests, None for missing ones."""
    found: dict[str, dict[str, Any]] = {}
    for job in _ok(http.get("/v1/jobs", params={"limit": 100}))["jobs"]:
        parts = {"input": f"/v1/download/{job['id']}/input", "result": f"/v1/download/{job['id']}"}
        answers = {name: http.get(path) for name, path in parts.items()}
        found[job["id"]] = {
            "state": job["state"],
            "rows": job["rows"],
            **{name: _digest(answer.content) if answer.is_success else None for name, answer in answers.items()},
        }
    return found


def _queue(http: TestClient, content: str) -> str:
    job_id: str = _ok(http.post("/v1/predict", params=QUERY, content=content), 202)["id"]
    return job_id


def _insist(tell: Told, ask: Callable[[], httpx2.Response], wanted: tuple[int, ...]) -> httpx2.Response:
    """Repeats a request until it succeeds, at most three times; reports how it was refused."""
    for _ in range(3):
        answer = ask()
        if answer.status_code in wanted:
            return answer
        kind = answer.headers["content-type"]
        tell("refused", status=answer.status_code, type=kind, code=answer.json()["code"])
    raise AssertionError("refused three times")


def _ok(answer: httpx2.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _stored_digest(runtime: Runtime, key: str) -> str:
    with runtime.storage.open(key) as source:
        return _digest(source.read())


def _integrity(connection: Connection) -> list[str]:
    if connection.dialect.name != "sqlite":
        return ["ok"]  # a server answers for itself
    return list(connection.exec_driver_sql("PRAGMA integrity_check").scalars())


def _broken_references(connection: Connection) -> list[Any]:
    if connection.dialect.name != "sqlite":
        return []
    return list(connection.exec_driver_sql("PRAGMA foreign_key_check").all())


def perform(
    step: str, storage: str, channel: socket.socket, arguments: dict[str, Any], settings: dict[str, Any]
) -> None:
    """The main function of a forked process: runs its step and reports its end."""
    if sys.platform == "linux":  # a tracer need not be an ancestor
        pr_set_ptracer, anyone = 0x59616D61, -1
        ctypes.CDLL(None).prctl(pr_set_ptracer, ctypes.c_ulong(anyone), 0, 0, 0)
    sys.stderr = io.StringIO()  # a log that is written would be a call among those of the disk
    site = Site(Settings(storage=storage, **{**SETTINGS, **settings}))
    logs.configure(site.settings.log_format, site.settings.log_level)
    tell = Told(channel)
    try:
        globals()[step](site, tell, **arguments)
    except BaseException as error:
        tell("died", error="".join(traceback.format_exception(error)))
        raise
    tell("done")
