"""Claims and commits: what a job and a chunk cost a database, alone and from several processes."""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from itertools import count
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any, TypeVar

from uuid_utils import uuid7

from batchserve.access import DEFAULT_TENANT
from batchserve.db.connect import Database
from batchserve.direct import Direct
from batchserve.domain import Chunk, Dialect, ModelVersion, Options, Result, ScoredChunk, StoredInput
from batchserve.engines import open_interactive
from batchserve.jobs import execution, plan
from batchserve.runtime import Runtime
from batchserve.scoring.chunks import ChunkTask, score_chunk
from batchserve.scoring.planning import Planned, PlanTask, plan_chunks
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.submission import Queueing, Submission, create
from batchserve.worker import Worker

__all__ = ["DatabaseCosts", "measure"]

T = TypeVar("T")

RECORDS = 1000
"""Of a chunk, which no process ever scores."""
ROUNDS = 3
WRITERS = 4
"""Processes that commit at the same time."""
_FACTS = {"notes": [], "model_seconds": 0.01}


@dataclass(frozen=True, slots=True)
class DatabaseCosts:
    """Seconds, and commits per second."""

    claim: float
    """Of a job: the look whether one is due, and the transaction."""
    plan: float
    """Of a chunk, of which 64 are added in a transaction."""
    commit: float
    driver: float
    """Of a chunk in a worker whose calls end at once, with its commit and its share of the plan."""
    commits: float
    """Per second, by several processes."""


def measure(url: str, folder: Path, graph: Path, chunks: int) -> DatabaseCosts:
    """The medians of several rounds. `chunks`: of each measurement."""
    settings = Settings(storage=str(folder / "storage"), database=url, processes=2)
    with closing(Database(url)) as database:
        model = Direct(database, open_storage(settings.storage)).register("logistic", graph)
        rounds = [_round(settings, database, model, chunks) for _ in range(ROUNDS)]
    return DatabaseCosts(*(median(getattr(each, field.name) for each in rounds) for field in fields(DatabaseCosts)))


def _round(settings: Settings, database: Database, model: ModelVersion, chunks: int) -> DatabaseCosts:
    for _ in range(WRITERS + 1):
        _queue(database, model)
    began = time.perf_counter()
    claimed = [_claim(database) for _ in range(WRITERS + 1)]
    claim = (time.perf_counter() - began) / len(claimed)
    planned, committed = _planned_and_committed(database, claimed[0], chunks)
    driver = _driver(settings, model, chunks)
    return DatabaseCosts(claim, planned, committed, driver, _rate(database, claimed[1:], chunks))


def _queue(database: Database, model: ModelVersion, size: int = 2**30) -> str:
    """`size`: of an input that nobody reads."""
    job_id = str(uuid7())
    source = StoredInput(f"inputs/{job_id}", "parquet", Dialect(), size, "0" * 64)
    submitted = Submission(DEFAULT_TENANT, job_id, (source,), model, Options(format="parquet"), Queueing(reuse=False))
    with database.write() as connection:
        create(connection, submitted, time.time())
    return job_id


def _claim(database: Database) -> str:
    with database.read() as connection:
        assert execution.is_due(connection, time.time())
    with database.write() as connection:
        (job,) = execution.claim_due(connection, "benchmark", 600.0, database.moment(connection), 1)
    return job.id


def _planned_and_committed(database: Database, job_id: str, chunks: int) -> tuple[float, float]:
    """Seconds of a chunk in each."""
    began = time.perf_counter()
    made = _plan(database, job_id, chunks)
    planned = (time.perf_counter() - began) / chunks
    began = time.perf_counter()
    _commit_all(database, job_id, made)
    return planned, (time.perf_counter() - began) / chunks


def _plan(database: Database, job_id: str, chunks: int) -> list[Chunk]:
    made = [_chunk(number) for number in range(chunks)]
    for first in range(0, chunks, 64):
        with database.write() as connection:
            plan.add_chunks_if_mine(connection, job_id, 1, made[first : first + 64], first + 64 >= chunks)
    return made


def _chunk(number: int) -> Chunk:
    return Chunk(number * RECORDS, RECORDS, number * RECORDS, (number + 1) * RECORDS)


def _scored(chunk: Chunk) -> ScoredChunk:
    return ScoredChunk(chunk, 0, 10_000, "0" * 64, 0, _FACTS)


def _commit_all(database: Database, job_id: str, chunks: Sequence[Chunk]) -> None:
    for chunk in chunks:
        with database.write() as connection:
            plan.commit_chunk_if_mine(connection, job_id, 1, _scored(chunk), 0.5)


def _rate(database: Database, job_ids: Sequence[str], chunks: int) -> float:
    """Commits per second by a process for each of these jobs."""
    url = database.url
    made = {job_id: _plan(database, job_id, chunks) for job_id in job_ids}
    with ProcessPoolExecutor(len(made), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_commit_of, [url] * len(made), made, [[]] * len(made)))  # all have started then
        spans = list(pool.map(_commit_of, [url] * len(made), made, made.values()))
    return chunks * len(made) / (max(end for _, end in spans) - min(begin for begin, _ in spans))


def _commit_of(url: str, job_id: str, chunks: Sequence[Chunk]) -> tuple[float, float]:
    """When it began and ended, by the clock of the host."""
    with closing(Database(url)) as database:
        with database.read():
            began = time.monotonic()
        _commit_all(database, job_id, chunks)
    return began, time.monotonic()


# --- a driver whose calls end at once ---


class _Ended:
    def __init__(self, value: Any) -> None:
        self.future: Future[Any] = Future()
        self.future.set_result(value)
        self.seconds: float | None = None

    def kill(self) -> None:
        """It has ended."""


class _NoEngine:
    """An engine whose calls take no time: what remains is the driver's part."""

    capacity = 2

    def __init__(self, chunks: int) -> None:
        self._numbers, self._chunks = count(), chunks

    def start(self) -> None:
        """There is nothing to prepare."""

    def submit(self, function: Any, *args: Any, timeout: float, urgent: bool = False) -> _Ended:  # noqa: ARG002
        (task,) = args
        if function is plan_chunks:
            return _Ended(self._planned(task))
        if function is score_chunk:
            return _Ended(self._scored(task))
        return _Ended(Result(f"results/{task.job_id}-1", 10_000 * self._chunks, "0" * 64, None, 0))

    def close(self) -> None:
        """There is nothing to end."""

    def _planned(self, task: PlanTask) -> Planned:
        first = 0 if task.after is None else task.after.first_record // RECORDS + 1
        numbers = range(first, min(first + task.most, self._chunks))
        complete = first + task.most > self._chunks
        return Planned(tuple(map(_chunk, numbers)), complete, share=0.5, ended=int(complete))

    @staticmethod
    def _scored(task: ChunkTask) -> ScoredChunk:
        return _scored(task.chunk)


def _driver(settings: Settings, model: ModelVersion, chunks: int) -> float:
    """Seconds of a chunk in a worker whose calls take no time."""
    storage = open_storage(settings.storage)
    with closing(Database(settings.database_url)) as database:
        engine = _NoEngine(chunks)
        with closing(open_interactive(settings)) as interactive:
            worker = Worker(Runtime(settings, database, storage, engine, interactive), lambda _: worker.stop())
            _queue(database, model)
            thread = Thread(target=worker.run)
            began = time.perf_counter()
            thread.start()
            thread.join()
            return (time.perf_counter() - began) / chunks
