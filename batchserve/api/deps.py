"""What routes share: the runtime, calls into the engine, waiting for a job, answering with one."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar
from weakref import WeakValueDictionary

from fastapi import Depends, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency, registry
from batchserve.api.auth import Keyring, caller_of, require_key_still
from batchserve.api.cache import AnswerCache
from batchserve.api.following import Following
from batchserve.api.places import Places
from batchserve.api.schemas import JobBody, job_body
from batchserve.api.turns import Lane, Place, Turn, Turns
from batchserve.domain import Attempt, Caller, Job, JobState, ModelVersion
from batchserve.engines import Call
from batchserve.errors import BadRequest, IdempotencyInProgress, ScoringCrashed, Unavailable
from batchserve.jobs import queries
from batchserve.runtime import Runtime
from batchserve.upkeep import retention
from batchserve.upkeep.inspection import UnreadableCount

T = TypeVar("T")
Options = TypeVar("Options", bound=BaseModel)
MAX_WAIT = 60.0
_LONGEST_PAUSE = 0.25
_QUICK = 0.1
"""Seconds that a call takes before it is watched whether its client is still there."""
_JOBS_SEEN = 4096
_MODELS_SEEN = 256


@dataclass(slots=True)
class Service:
    """What the app hands to its routes."""

    runtime: Runtime
    wake_worker: Callable[[], None]
    stop_worker: Callable[[], None]
    changes: "Changes"
    keys_under_way: set[tuple[str, str]] = field(default_factory=set)
    """Tenants and their idempotency keys."""
    jobs_seen: dict[tuple[str, str], None] = field(default_factory=dict)
    """Tenants and the latest jobs that were found to be theirs, and will be as long as they are there."""
    models_seen: dict[str, tuple[int, ModelVersion]] = field(default_factory=dict)
    """What references stood for, with the version of the database: true until anything is committed by anybody."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    keyring: Keyring = field(init=False)
    answers: AnswerCache = field(default_factory=AnswerCache)
    calls: Turns = field(init=False)
    """Of all calls in interactive processes."""
    long_calls: Turns = field(init=False)
    reads: Turns = field(init=False)
    """Of reads of many rows: one of a tenant at a time, so that their work leaves time for the event loop."""
    places: Places = field(init=False)
    following: Following = field(init=False)
    worker_trouble: Callable[[], str | None] = lambda: None
    """Why the worker of this process claims no job, if it does not."""
    unreadable: UnreadableCount = field(init=False)

    def __post_init__(self) -> None:
        most = self.runtime.settings.online_calls
        self.keyring = Keyring(self.runtime.database)
        self.calls = Turns(self.runtime.engine.interactive, most)
        self.long_calls = Turns(1, most)
        self.reads = Turns(2, most)
        self.places = Places(self.runtime.database)
        self.following = Following(self.runtime.database, self.runtime.settings, self.places, self.stopping)
        self.unreadable = UnreadableCount(self.runtime.database)

    async def wake(self) -> None:
        """For background tasks: one that is no coroutine would take a thread."""
        self.wake_worker()

    def stop(self) -> None:
        """The worker claims nothing more, streams and long polls end. Comes before the wait for all requests."""
        self.stopping.set()
        self.stop_worker()

    async def call(
        self, place: Place, function: Callable[..., T], *args: Any, seconds: float, asked_by: Request | None = None
    ) -> T:
        """Calls a function in an interactive scoring process, when it is the turn of this place among `calls`. Ends it
        when the server stops, and when the client leaves, if it is told who asked.

        A call whose process dies is made once more: maybe somebody killed it, for no fault of what was asked. Raises
        ScoringCrashed when that dies, too, ScoringTimeout after `seconds` of running, Unavailable when no process was
        free in time, and what the function raises.
        """
        try:
            return await self._call(place, function, args, seconds, asked_by)
        except ScoringCrashed:
            return await self._call(place, function, args, seconds, asked_by)

    async def _call(
        self, place: Place, function: Callable[..., T], args: tuple[Any, ...], seconds: float, asked_by: Request | None
    ) -> T:
        call = self._begin(await self._turn(self.calls, place, self._patience, asked_by), function, args, seconds)
        try:
            return await _unless_left(call.future, asked_by)
        except (asyncio.CancelledError, BadRequest):
            call.kill()
            raise

    def call_from_thread(self, place: Place, function: Callable[..., T], *args: Any, seconds: float) -> T:
        """The same for code that is in a thread already, and may block it."""
        try:
            return self._call_from_thread(place, function, *args, seconds=seconds)
        except ScoringCrashed:
            return self._call_from_thread(place, function, *args, seconds=seconds)

    def _call_from_thread(self, place: Place, function: Callable[..., T], *args: Any, seconds: float) -> T:
        turn = self.calls.ask(place)
        try:
            turn.given.result(self._patience)
        except TimeoutError:
            turn.end()
            raise self._busy(place.lane) from None
        return self._begin(turn, function, args, seconds).future.result()

    def _begin(self, turn: Turn, function: Callable[..., T], args: tuple[Any, ...], seconds: float) -> Call[T]:
        """A call that runs now, and ends its turn when its process is free again, however that comes about."""
        try:
            call: Call[T] = self.runtime.engine.submit_interactive(function, *args, timeout=seconds)
        except BaseException:
            turn.end()
            raise
        call.future.add_done_callback(lambda _: turn.end())
        return call

    async def _turn(self, turns: Turns, place: Place, wait: float | None, asked_by: Request | None = None) -> Turn:
        """A turn that has come. Raises Unavailable when it does not within `wait` seconds."""
        turn = turns.ask(place)
        if not turn.given.done():
            try:
                async with asyncio.timeout(wait):
                    await _unless_left(turn.given, asked_by)
            except BaseException as left:
                turn.end()
                if isinstance(left, TimeoutError):
                    raise self._busy(place.lane) from None
                raise
        return turn

    async def read(self, tenant: str, function: Callable[[], T]) -> T:
        """Reads many rows, in a thread, when it is the tenant's turn. Raises TooManyRequests and Unavailable."""
        with self.reads.place(tenant, Lane.READ) as place:
            turn = await self._turn(self.reads, place, self._patience)
            try:
                return await run_in_threadpool(function)
            finally:
                turn.end()

    @asynccontextmanager
    async def long_call(self, place: Place, wait: float | None = None) -> AsyncIterator[None]:
        """The turn of a call that may take long, one at a time, for who has this place among `long_calls`.

        There are more interactive processes: checks and online predictions always find another one. Raises Unavailable
        when its turn has not come after `wait` seconds.
        """
        turn = await self._turn(self.long_calls, place, wait)
        try:
            yield
        finally:
            turn.end()

    @property
    def _patience(self) -> float:
        return self.runtime.settings.online_wait

    def _busy(self, lane: Lane) -> Unavailable:
        seconds = f"{self.runtime.settings.online_wait:g} s; try again in a moment"
        if lane is Lane.READ:
            return Unavailable(f"other lists were read for {seconds}", retry_after=5)
        return Unavailable(f"no scoring process was free for {seconds}", retry_after=5)

    @contextmanager
    def naming_bytes(self, undo: Callable[[], None]) -> Iterator[Connection]:
        """A write transaction whose rows name bytes that are stored already. `undo` is called if they surely do not.

        A commit that failed may have happened: then the bytes stay. Bytes without a row are swept one day, a row
        without bytes would be a lie.
        """
        committing = False
        try:
            with self.runtime.database.write() as connection:
                yield connection
                committing = True
        finally:
            if not committing:
                undo()


async def _unless_left(future: Future[T], client: Request | None) -> T:
    """What a future gives. Raises BadRequest when the client has left before."""
    outcome = asyncio.wrap_future(future)
    if client is None or (await asyncio.wait([outcome], timeout=_QUICK))[0]:
        return await outcome
    leaving = asyncio.ensure_future(client.receive())  # nothing else can come: its body has
    try:
        watched: list[asyncio.Future[Any]] = [outcome, leaving]
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        if outcome.done():
            return await outcome
        raise BadRequest("the client left before its answer was there")
    finally:
        leaving.cancel()
        outcome.cancel()


class Changes:
    """Wakes who waits for a job when the worker of this process, if it `has_worker`, has ended an attempt at it. That
    one started, and what workers of other processes do, nobody tells: look too."""

    def __init__(self, *, has_worker: bool) -> None:
        self.has_worker = has_worker
        self._loop = asyncio.get_running_loop()
        self._waiting: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()

    def tell(self, job_id: str) -> None:
        """From any thread."""
        if job_id in self._waiting:
            with suppress(RuntimeError):  # the loop has ended, and with it all who waited
                self._loop.call_soon_threadsafe(self._wake, job_id)

    def next_of(self, job_id: str) -> asyncio.Event:
        """An event that is set when an attempt at the job ends."""
        return self._waiting.setdefault(job_id, asyncio.Event())

    def _wake(self, job_id: str) -> None:
        if event := self._waiting.pop(job_id, None):
            event.set()


async def get_service(request: Request) -> Service:  # as a plain function it would take a thread, for each request
    service: Service = request.app.state.service
    return service


ServiceDep = Annotated[Service, Depends(get_service)]


async def own_job(job_id: str, request: Request) -> str:
    """The ID in the path. Raises JobNotFound for a job of another tenant: behind this door, an ID is proof enough."""
    service, caller = await get_service(request), caller_of(request)
    if (caller.tenant, job_id) not in service.jobs_seen:
        with service.runtime.database.read() as connection:
            queries.require_seen(connection, job_id, caller.tenant)
        service.jobs_seen[caller.tenant, job_id] = None
        if len(service.jobs_seen) > _JOBS_SEEN:
            del service.jobs_seen[next(iter(service.jobs_seen))]  # the oldest
    return job_id


OwnJob = Annotated[str, Depends(own_job)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Makes the request safe to repeat: same key and content, same job; kept 24 hours.", max_length=257
    ),
]
# The app adds the schema: a `model` here would be documented as application/json.
_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "What was wrong, what was expected and what came.", "content": _PROBLEM},
    "5XX": {"description": "Not ready: Retry-After says when to try again. Or our fault.", "content": _PROBLEM},
}


def parsed(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Raises RequestValidationError, which names each option that is unknown or has a wrong value."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


async def read_body(service: Service, job_id: str) -> JobBody:
    """A job as its clients see it. Raises JobNotFound."""
    job, attempts, place, now = _read(service, job_id)  # inline: costs less than a thread hop
    if job.state is JobState.QUEUED and place is None:
        place = (await run_in_threadpool(service.places.of, [job], now))[job_id]
    return job_body(job, attempts, place, now)


def read_body_from_thread(service: Service, job_id: str) -> JobBody:
    """The same for code that is in a thread already."""
    job, attempts, place, now = _read(service, job_id)
    if job.state is JobState.QUEUED and place is None:
        place = service.places.of([job], now)[job_id]
    return job_body(job, attempts, place, now)


def _read(service: Service, job_id: str) -> tuple[Job, list[Attempt], int | None, float]:
    """A job, its attempts, its place in the queue unless that is far back, and as of when that is true."""
    with service.runtime.database.read() as connection:
        job = retention.dated(queries.get(connection, job_id), service.runtime.settings)
        attempts = queries.attempts_of(connection, job_id) if job.attempt else []
        now = time.time()
        return job, attempts, service.places.near(connection, job, now), now


def resolve_model(service: Service, reference: str) -> ModelVersion:
    """Raises ModelNotFound."""
    database = service.runtime.database
    version = database.version()
    kept = service.models_seen.get(reference)
    if kept is not None and kept[0] == version:
        return kept[1]
    with database.read() as connection:
        model = registry.resolve(connection, reference)
    if version is not None:
        if len(service.models_seen) >= _MODELS_SEEN:
            service.models_seen.clear()
        service.models_seen[reference] = version, model
    return model


def read_job(service: Service, job_id: str) -> Job:
    with service.runtime.database.read() as connection:
        return queries.get(connection, job_id)


async def wait_for(
    request: Request, service: Service, job_id: str, seconds: float, until: Callable[[JobState], bool]
) -> None:
    """Waits until the state is as wanted, for at most `seconds`, or until the server stops. Raises JobNotFound, and
    Unauthorized when the key of the request is revoked meanwhile.

    The worker of this process tells of its changes; for others it looks, often at first.
    """
    deadline = time.monotonic() + min(seconds, MAX_WAIT)
    pause = _LONGEST_PAUSE if service.changes.has_worker else 0.01
    while True:
        change = service.changes.next_of(job_id)
        with service.runtime.database.read() as connection:  # inline: costs less than a thread hop, waits for no writer
            state = queries.state_of(connection, job_id)
        left = deadline - time.monotonic()
        if until(state) or left <= 0 or service.stopping.is_set():
            return
        try:
            async with asyncio.timeout(min(pause, left)):
                await change.wait()
        except TimeoutError:
            require_key_still(request, service.keyring)
        pause = min(pause * 1.5, _LONGEST_PAUSE)


def finished(state: JobState) -> bool:
    return state.finished


def job_headers(body: JobBody) -> dict[str, str]:
    headers = {"location": body.links["self"]}
    if body.state in (JobState.QUEUED, JobState.RUNNING):
        headers["retry-after"] = str(max(1, min(30, round(body.eta_s or 1))))
    return headers


def job_response(body: JobBody, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(
        body.model_dump_json(), status, {**job_headers(body), **(headers or {})}, media_type="application/json"
    )


def preferred_wait(prefer: str | None) -> float:
    """Seconds of `Prefer: wait=N`; 0 without it."""
    for preference in (prefer or "").split(","):
        name, _, value = preference.strip().partition("=")
        if name.lower() == "wait" and value.strip('"').isdecimal():
            return min(float(value.strip('"')), MAX_WAIT)
    return 0.0


def bare_key(key: str | None) -> str | None:
    """The key without the quotes of a structured header. Raises BadRequest for one that is empty or too long."""
    if key is None:
        return None
    key = key.strip().removeprefix('"').removesuffix('"')
    if not 0 < len(key) <= 255:
        raise BadRequest(f"an Idempotency-Key has 1 to 255 characters, got {len(key)}")
    if not key.isprintable():
        raise BadRequest(f"an Idempotency-Key has printable characters only, got {key!r}")
    return key


async def once(service: Service, caller: Caller, key: str | None, work: Callable[[], Awaitable[Response]]) -> Response:
    """Runs one request for a key at a time; a second one meanwhile gets a 409. What was done before is up to `work`."""
    if key is None:
        return await work()
    if (caller.tenant, key) in service.keys_under_way:
        raise IdempotencyInProgress(
            f"a request with the Idempotency-Key {key!r} is under way: wait for its answer", retry_after=1
        )
    service.keys_under_way.add((caller.tenant, key))
    try:
        return await work()
    finally:
        service.keys_under_way.discard((caller.tenant, key))


async def replayed(service: Service, caller: Caller, key: str | None, content: str) -> Response | None:
    """The answer to an earlier request with this key. Raises IdempotencyMismatch when its content was another."""
    if key is None:
        return None

    def recall() -> idempotency.Remembered | None:
        with service.runtime.database.read() as connection:
            return idempotency.recall(connection, key, content, caller.tenant)

    remembered = await run_in_threadpool(recall)
    if remembered is None:
        return None
    headers = {"idempotency-replayed": "true"}
    if remembered.job_id is None:
        return Response(remembered.answer, remembered.status, headers, media_type="application/json")
    return job_response(await read_body(service, remembered.job_id), remembered.status, headers)
