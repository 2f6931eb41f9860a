"""Fixtures of the worker tests: a database and a storage with the actions of a client, and models that double."""

import csv
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from hand import HandCall, HandClock, HandEngine
from uuid_utils import uuid7

from batchserve.access import DEFAULT_TENANT
from batchserve.db.connect import Database
from batchserve.direct import Direct
from batchserve.domain import ChunkLimits, Dialect, Job, ModelVersion, Options, StoredInput
from batchserve.engines import Engine, open_interactive
from batchserve.jobs import contents, queries, requests
from batchserve.runtime import Runtime
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import PlanTask
from batchserve.settings import Settings
from batchserve.storage import Storage, input_key, open_storage, parts_prefix
from batchserve.submission import Queueing, Submission, create
from batchserve.worker import Worker

TIMEOUT = 40.0
SHORT: dict[str, Any] = {
    "processes": 2,
    "process_memory": 512 * 2**20,
    "lease": 30.0,
    "heartbeat": 0.2,
    "rescue": 0.2,
    "poll": 0.05,
    "cancel_grace": 0.5,
    "grace": 5.0,
}


class Bench:
    """A separate database and storage, with the actions of a client."""

    def __init__(self, settings: Settings, database: Database, storage: Storage, engine: Engine) -> None:
        self.runtime = Runtime(settings, database, storage, engine, open_interactive(settings))
        self.database, self.storage = database, storage

    @contextmanager
    def worker(self, **settings: Any) -> Iterator[Worker]:
        """A worker in a thread, stopped at the end."""
        changed = self.runtime.settings.model_copy(update=settings)
        worker = Worker(replace(self.runtime, settings=changed))
        thread = threading.Thread(target=worker.run)
        thread.start()
        try:
            yield worker
        finally:
            worker.stop()
            thread.join(TIMEOUT)
            assert not thread.is_alive(), "the worker did not stop"

    def by_hand(self, **settings: Any) -> "HandWorker":
        """A worker whose clock and calls are controlled by the test."""
        return HandWorker(self, **settings)

    def register(self, name: str, model: bytes) -> ModelVersion:
        return Direct(self.database, self.storage).register(name, model)

    def store(self, key: str, content: bytes) -> StoredInput:
        with self.storage.create(key) as writer:
            writer.write(content)
            stored = writer.commit()
        return StoredInput(key, "csv", Dialect(), stored.bytes, stored.sha256)

    def submit(self, model: ModelVersion, content: bytes, **options: Any) -> str:
        """Whether the input fits the model is left to the worker."""
        job_id = str(uuid7())
        return self.queue(job_id, model, [self.store(input_key(job_id), content)], **options)

    def queue(self, job_id: str, model: ModelVersion, stored: Sequence[StoredInput], **options: Any) -> str:
        chosen = Options(**({"format": "csv"} | options))
        with self.database.write() as connection:
            submitted = Submission(DEFAULT_TENANT, job_id, tuple(stored), model, chosen, Queueing(reuse=False))
            create(connection, submitted, time.time())
        return job_id

    def plan_task(self, stored: StoredInput) -> PlanTask:
        source = Input.of(self.runtime.settings.storage, stored)
        return PlanTask(source, None, ChunkLimits(records=4), 100)

    def get(self, job_id: str) -> Job:
        with self.database.read() as connection:
            return queries.get(connection, job_id)

    def wait(self, job_id: str, condition: Callable[[Job], bool] = lambda job: job.state.finished) -> Job:
        deadline = time.monotonic() + TIMEOUT
        while time.monotonic() < deadline:
            job = self.get(job_id)
            if condition(job):
                return job
            assert not job.state.finished, job
            time.sleep(0.02)
        raise AssertionError(f"in vain: {self.get(job_id)}")

    def cancel(self, job_id: str) -> None:
        with self.database.write() as connection:
            requests.request_cancel(connection, job_id, time.time())

    def read(self, key: str | None) -> bytes:
        assert key is not None
        with contents.opened(self.database, self.storage, key) as source:
            return source.read()

    def result(self, job_id: str) -> bytes:
        job = self.get(job_id)
        assert job.result is not None, job.error
        return self.read(job.result.key)

    def errors(self, job: Job) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.read(job.result.errors_key if job.result else None).splitlines()]

    def parts(self, job_id: str) -> dict[str, float]:
        """The parts of a job, each with its modification time."""
        return {entry.key: entry.modified for entry in self.storage.list(parts_prefix(job_id))}

    def outcomes(self, job_id: str) -> list[str | None]:
        with self.database.read() as connection:
            return [attempt.outcome for attempt in queries.attempts_of(connection, job_id)]


class HandWorker:
    """Runs turn by turn in the thread of the test; time passes only when the test, or a wait, advances it."""

    def __init__(self, bench: Bench, **settings: Any) -> None:
        calm = {"lease": 60.0, "rescue": 5.0, "poll": 1.0, "cancel_grace": 5.0, "grace": 10.0}
        changed = bench.runtime.settings.model_copy(update=calm | settings)
        self.engine, self.clock = HandEngine(), HandClock(bench.database)
        self.notified: list[str] = []
        runtime = replace(bench.runtime, settings=changed, engine=self.engine)
        self.worker = Worker(runtime, self.notified.append, self.clock)

    def calls(self) -> list[HandCall]:
        """The calls that are handed to the engine in this turn or were handed to it before."""
        self.worker.turn()
        return self.engine.take()

    def chunks(self) -> list[HandCall]:
        """The same when the jobs are planned: the calls of chunks to be scored."""
        for _ in range(10):
            calls = self.calls()
            if any(call.first_record is not None for call in calls):
                return calls
            for call in calls:
                call.run()
        raise AssertionError("no chunk is handed out")

    def work(self, *calls: HandCall) -> None:
        """Runs these calls, and all calls that follow from them, until none is left."""
        waiting = list(calls)
        idle = 0
        while idle < 3:
            for call in waiting:
                call.run()
            waiting = self.calls()
            idle = 0 if waiting else idle + 1

    def stop(self) -> None:
        self.worker.stop()
        self.worker.give_back()


@contextmanager
def opened(url: str, storage: Path, engine: Engine, **settings: Any) -> Iterator[Bench]:
    database = Database(url)
    try:
        chosen = Settings(storage=str(storage), database=url, **(SHORT | settings))
        yield Bench(chosen, database, open_storage(chosen.storage), engine)
    finally:
        database.close()


def rows_of(*work: float | None) -> bytes:
    lines = [f"r{number},{'' if value is None else f'{value:.0f}'}" for number, value in enumerate(work)]
    return "\n".join(["id,work", *lines, ""]).encode()


def rows_in(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode())))


def answers(content: bytes) -> list[tuple[str, float | None]]:
    """The record ID and the prediction of each row."""
    rows = [list(row.values()) for row in rows_in(content)]
    assert all(len(row) == 2 for row in rows)
    return [(name, float(value) if value else None) for name, value in rows]


def doubled(*work: float | None) -> list[tuple[str, float | None]]:
    return [
        (f"r{number}", None if value is None else float(np.float32(2) * np.float32(round(value))))
        for number, value in enumerate(work)
    ]
