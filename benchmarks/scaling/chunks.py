"""What a chunk costs a scoring process and a driver: its steps on a storage, and its dispatch by an engine."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from uuid_utils import uuid7

from batchserve.db import migrate
from batchserve.db.connect import Database
from batchserve.direct import Direct
from batchserve.domain import CommittedChunk, ModelVersion, Options, StoredInput
from batchserve.engines import Engine, open_engine
from batchserve.scoring.assembly import AssembleTask, stored_parts
from batchserve.scoring.chunks import ChunkTask
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import PlanTask
from batchserve.settings import Settings
from batchserve.storage import Storage, input_key, open_storage
from batchserve.worker.limits import chunk_limits, even_limits
from benchmarks.scaling import tasks

__all__ = ["ChunkCosts", "Dispatch", "dispatch", "measure"]

TIMEOUT = 600.0


@dataclass(frozen=True, slots=True)
class ChunkCosts:
    """Seconds of a chunk, with all processes of the host busy, and its bytes."""

    format: str
    chunks: int
    plan: float
    read: float
    score: float
    write: float
    assemble: float
    input_bytes: float
    part_bytes: float


@dataclass(frozen=True, slots=True)
class Dispatch:
    """A call of a function that does nothing."""

    calls: float
    """Per second, with as many calls under way as a worker has."""
    cpu: float
    """Seconds of the driver's process."""
    round_trip: float
    """Seconds of a single call."""


def measure(storage: str, folder: Path, graph: Path, source: Path, processes: int) -> ChunkCosts:
    """A job of this input, by the steps of its calls."""
    folder.mkdir(exist_ok=True)
    settings = Settings(
        storage=storage, database=f"sqlite:///{folder / 'costs.db'}", processes=processes, process_nice=0
    )
    store = open_storage(storage)
    with closing(Database(settings.database_url)) as database:
        migrate.upgrade(database)
        model = Direct(database, store).register("logistic", graph)
    with closing(open_engine(settings)) as engine:
        engine.start()
        _steps(settings, engine, model, store, source)  # all processes have loaded the model then
        return _steps(settings, engine, model, store, source)


def _steps(settings: Settings, engine: Engine, model: ModelVersion, store: Storage, source: Path) -> ChunkCosts:
    """Of an input that no process has read before."""
    job_id, format, size = str(uuid7()), source.suffix.removeprefix("."), source.stat().st_size
    input = Input.of(settings.storage, _stored(store, job_id, source, format))
    limits = even_limits(chunk_limits(settings, model, format), format, size)
    plan, planned = _value(engine, tasks.planned, PlanTask(input, None, limits, 2**31))
    options = Options(format=format)
    given = [ChunkTask(input, job_id, 1, chunk, model, options) for chunk in planned.chunks]
    timed: list[tasks.Timed] = list(_all(engine, tasks.scored, given))
    count = len(timed)
    return ChunkCosts(
        format=format,
        chunks=count,
        plan=plan / count,
        read=mean(each.read for each in timed),
        score=mean(each.score for each in timed),
        write=mean(each.write for each in timed),
        assemble=_assembled(engine, given[0], timed) / count,
        input_bytes=size / count,
        part_bytes=mean(each.chunk.part_bytes for each in timed),
    )


def _stored(store: Storage, job_id: str, source: Path, format: str) -> StoredInput:
    with store.create(input_key(job_id)) as writer, source.open("rb") as file:
        while block := file.read(2**20):
            writer.write(block)
        stored = writer.commit()
    return StoredInput(input_key(job_id), format, bytes=stored.bytes, sha256=stored.sha256)


def _assembled(engine: Engine, task: ChunkTask, timed: Sequence[tasks.Timed]) -> float:
    done = [CommittedChunk(each.chunk.chunk, 1, each.chunk.part_bytes, 0, 0) for each in timed]
    parts, errors = stored_parts(task.job_id, done)
    given = AssembleTask(
        task.input.storage, task.job_id, 1, task.options.format, task.input.dialect, parts, errors
    )  # fmt: skip
    seconds: float = _value(engine, tasks.assembled, given)
    return seconds


def _value(engine: Engine, function: Callable[..., Any], *args: Any) -> Any:
    return engine.submit(function, *args, timeout=TIMEOUT).future.result()


def _all(engine: Engine, function: Callable[..., Any], given: Sequence[Any]) -> Iterator[Any]:
    """The values in the order of the calls, of which a worker's window is under way."""
    left, running, ended = deque(given), deque[Future[Any]](), 0
    while left or running:
        while left and len(running) < 2 * engine.capacity:
            running.append(engine.submit(function, left.popleft(), timeout=TIMEOUT).future)
        yield running.popleft().result()
        ended += 1


def dispatch(settings: Settings, hosts: int, calls: int) -> Dispatch:
    """`hosts`: processes for which the engine waits."""
    with closing(open_engine(settings)) as engine:
        engine.start()
        _await_processes(engine, hosts)
        _pipelined(engine, calls // 10)  # all processes have started then
        began = time.perf_counter()
        for _ in range(calls // 10):
            _value(engine, tasks.nothing)
        round_trip = (time.perf_counter() - began) / (calls // 10)
        used, began = time.process_time(), time.perf_counter()
        _pipelined(engine, calls)
        return Dispatch(
            calls / (time.perf_counter() - began), (time.process_time() - used) / calls, round_trip
        )  # fmt: skip


def _await_processes(engine: Engine, number: int) -> None:
    before = time.monotonic() + 60.0
    while engine.capacity < number:
        if time.monotonic() > before:
            raise TimeoutError(f"{engine.capacity} of {number} processes joined")
        time.sleep(0.05)


def _pipelined(engine: Engine, calls: int) -> None:
    running: set[Future[None]] = set()
    for _ in range(calls):
        if len(running) >= 2 * engine.capacity:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
        running.add(engine.submit(tasks.nothing, timeout=TIMEOUT).future)
    wait(running)
