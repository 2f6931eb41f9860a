"""Submission: turns a stored input and a model into a queued job. Used by the API and by processes that write to
storage and database themselves (`batchserve.direct`). First the bytes, then the row: a job never lacks its input.
"""

import hashlib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import orjson
import uuid_utils
from sqlalchemy import Connection

from batchserve import correlation, rows
from batchserve.correlation import Correlation
from batchserve.db import notifications
from batchserve.db.connect import Database, lock
from batchserve.db.notifications import Topic
from batchserve.domain import Attempt, Dialect, Job, JobState, ModelVersion, Options, StoredInput
from batchserve.errors import JobConflict, JobNotFound
from batchserve.facts import merge_facts
from batchserve.formats import RESULT_FORMATS
from batchserve.idempotency import KeyedRequest
from batchserve.inference.outputs import ResultSchema
from batchserve.jobs import queries, requests
from batchserve.scoring.inputs import Input
from batchserve.scoring.small import Small
from batchserve.webhooks.endpoints import require_secret

__all__ = [
    "Queueing",
    "Scored",
    "Submission",
    "clean_filename",
    "complete_once",
    "create",
    "default_format",
    "default_options",
    "enqueue",
    "enqueue_all",
    "enqueue_once",
    "naming_bytes",
    "wanted_columns",
]


@dataclass(frozen=True, slots=True)
class Queueing:
    """How a job enters the queue; none of it changes the result."""

    priority: int = 0
    run_after: float | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    reuse: bool = True
    """Whether the result of an equal finished job is reused."""
    webhook: str | None = None
    """The address that its end is sent to."""
    expires_in: float | None = None
    """Its own retention after its end, in seconds."""


@dataclass(frozen=True, slots=True)
class Submission:
    """A requested prediction: its inputs, model, options and tenant."""

    tenant: str
    """The tenant of the job, which an administrator of all tenants may submit."""
    job_id: str
    """The ID of the uploaded job, or of the one to create."""
    inputs: tuple[StoredInput, ...]
    model: ModelVersion
    options: Options
    queueing: Queueing = Queueing()
    asked_by: Correlation = field(default_factory=correlation.current)
    """The request that is being answered, unless another one is given."""
    digest: str = field(init=False)
    """Equal for equal input bytes, read in the same way, model and options: such jobs have equal results."""

    def __post_init__(self) -> None:
        read_as = [[*self._identity(one), one.format, *_read_as(one.dialect)] for one in self.inputs]
        what = [read_as, self.model.digest, rows.options_adapter.dump_python(self.options, mode="json")]
        object.__setattr__(self, "digest", hashlib.sha256(orjson.dumps(what)).hexdigest())

    def _identity(self, stored: StoredInput) -> tuple[str, ...]:
        """Equal for equal bytes. Bytes that were not read yet equal no others: the job ID replaces their digest."""
        if stored.sha256 is None and stored.version is not None:
            return stored.key, stored.version
        return (stored.sha256 or self.job_id,)

    def source(self, storage: str) -> Input:
        """The first input, for scoring processes that open the storage at this address."""
        return Input.of(storage, self.inputs[0])

    def is_of(self, job: Job) -> bool:
        """Whether a job was queued for this submission."""
        asked = self.queueing
        before = (job.request_digest, job.priority, job.run_after, job.metadata, job.webhook, job.expires_in)
        wanted = (asked.priority, asked.run_after, asked.metadata, asked.webhook, asked.expires_in)
        return before == (self.digest, *wanted)


def _read_as(dialect: Dialect) -> Iterator[str]:
    """What the dialect changes. Not the usual decimal mark: jobs of older releases had no other."""
    yield dialect.delimiter
    if dialect.decimal != ".":
        yield dialect.decimal


def default_format(input_format: str, model: ModelVersion) -> str:
    """The default format of a result: the input's, except for images and for what one npy array cannot hold (text,
    several arrays)."""
    if input_format not in RESULT_FORMATS:
        return "jsonl"
    if RESULT_FORMATS[input_format].holds != "array":
        return input_format
    kinds = ResultSchema(model.signature).columns.values()
    if any(tensor.dtype == "string" for tensor in model.signature.outputs):
        return "csv"
    return "npz" if len(kinds) > 1 and any(kind.is_nested() for kind in kinds) else "npy"


def default_options(input_format: str, model: ModelVersion) -> Options:
    return Options(default_format(input_format, model))


def wanted_columns(model: ModelVersion, chosen: Sequence[str] | Mapping[str, str] | None = None) -> frozenset[str]:
    """The names that a table for the model has, where it names its columns. `chosen`: by the option `columns`."""
    if isinstance(chosen, Mapping):
        return frozenset(chosen.get(column.name, column.name) for column in model.signature.columns)
    return frozenset(chosen or (column.name for column in model.signature.columns))


def clean_filename(name: str | None) -> str | None:
    """The client's name for the file: for display only, never part of a path."""
    if name is None:
        return None
    shown = unicodedata.normalize("NFC", name)
    if not shown.isprintable():
        shown = "".join(char for char in shown if char.isprintable())
    return shown.encode()[:255].decode(errors="ignore") or None


@contextmanager
def naming_bytes(database: Database, undo: Callable[[], None]) -> Iterator[Connection]:
    """A write transaction whose rows name bytes that are stored already. `undo` is called if it certainly did not
    commit. A failed commit may have happened: then the bytes stay. Bytes without a row are swept later; a row without
    bytes would be invalid.
    """
    committing = False
    try:
        with database.write() as connection:
            yield connection
            committing = True
    finally:
        if not committing:
            undo()


@dataclass(frozen=True, slots=True)
class Scored:
    """A small job that was scored before it is queued."""

    worker: str
    """The name of the process in whose care it was scored."""
    small: Small


def create(connection: Connection, submission: Submission, now: float, request: KeyedRequest | None = None) -> None:
    """Creates and queues the job of a new input."""
    requests.create(
        connection,
        submission.job_id,
        submission.inputs,
        submission.model,
        now,
        submission.tenant,
        submission.asked_by.traceparent,
    )
    enqueue_once(connection, submission, now, request)


def complete_once(
    connection: Connection,
    submission: Submission,
    job: Job,
    scored: Scored,
    now: float,
    request: KeyedRequest | None = None,
) -> tuple[Job, Attempt] | None:
    """Completes an uploaded job with its `scored` result; returns it and its attempt, as they would be read. None, and
    nothing has changed: it is for `enqueue_once`, because an equal job has a result, the job is no longer `uploaded`,
    or its model was deleted. `job`: as it was read while it was uploaded.
    """
    queueing, small = submission.queueing, scored.small
    if queueing.reuse and queries.find_equal(connection, submission.digest, submission.tenant) is not None:
        return None
    asked = replace(
        job,
        model=submission.model,
        options=submission.options,
        request_digest=submission.digest,
        metadata=dict(queueing.metadata),
        priority=queueing.priority,
        run_after=queueing.run_after,
        webhook=queueing.webhook,
        expires_in=queueing.expires_in,
        request_id=submission.asked_by.request_id,
        traceparent=submission.asked_by.traceparent,
    )
    _require_signed(connection, submission)
    facts = merge_facts({"notes": list(submission.model.signature.notes)}, small.scored.facts)
    done = requests.complete_if_uploaded(
        connection, asked, scored.worker, small.result, facts, now, only=small.scored, small=small.contents
    )
    if done is not None and request is not None:
        request.remember(connection, submission.job_id, 202, now)
    return done


def enqueue_once(
    connection: Connection, submission: Submission, now: float, request: KeyedRequest | None = None
) -> str:
    """Queues an uploaded job, or completes it from an equal one; returns its ID. An input that was predicted otherwise
    before gets a new job. Idempotent in all cases.

    Raises JobConflict when the job was never queued, or its input was removed, and ModelNotFound when the model was
    deleted meanwhile.
    """
    if enqueue(connection, submission, now) is None:
        submission = _on_same_input(connection, submission, now)
    if request is not None:
        request.remember(connection, submission.job_id, 202, now)
    return submission.job_id


def _on_same_input(connection: Connection, submission: Submission, now: float) -> Submission:
    """The submission for an existing or new job on the input of one that was queued before."""
    job = queries.get(connection, submission.job_id)
    if job.queued_at is None:
        raise JobConflict(f"job {job.id} is {job.state} and was never queued: upload the input again")
    requests.require_read(job)
    lock(connection, "inputs")  # of two equal requests at once, the second finds the job of the first
    for other in (job, *queries.find_on_input(connection, job.input.key, submission.digest, job.tenant)):
        if submission.is_of(other):
            return replace(submission, job_id=other.id)
    another = replace(submission, job_id=str(uuid_utils.uuid7()))
    requests.create_on_inputs_of(connection, another.job_id, job, now)
    enqueue(connection, another, now)
    return another


def enqueue_all(connection: Connection, submissions: Iterable[Submission], now: float) -> dict[str, JobState]:
    """Queues those of several jobs that exist and are still `uploaded`; returns the state of each by its ID."""
    states: dict[str, JobState] = {}
    for submission in submissions:
        with suppress(JobNotFound):  # deleted meanwhile
            if (state := enqueue(connection, submission, now)) is not None:
                states[submission.job_id] = state
    return states


def _require_signed(connection: Connection, submission: Submission) -> None:
    """Raises InvalidOptions for an address on the job that requests could not be signed for."""
    if submission.queueing.webhook is not None:
        require_secret(connection, submission.tenant)


def enqueue(connection: Connection, submission: Submission, now: float) -> JobState | None:
    """Queues an uploaded job, or completes it from an equal one; returns its state. None: it is no longer `uploaded`.

    Raises ModelNotFound when the model was deleted meanwhile, and InvalidOptions for a webhook without a secret.
    """
    job_id, digest, queueing = submission.job_id, submission.digest, submission.queueing
    _require_signed(connection, submission)
    equal = queries.find_equal(connection, digest, submission.tenant) if queueing.reuse else None
    queued = requests.enqueue_if_uploaded(
        connection,
        job_id,
        submission.model,
        submission.options,
        digest,
        metadata=queueing.metadata,
        priority=queueing.priority,
        run_after=queueing.run_after,
        webhook=queueing.webhook,
        expires_in=queueing.expires_in,
        now=now,
        asked_by=submission.asked_by,
    )
    if not queued:
        return None
    if equal is not None and requests.complete_as_equal_if_queued(connection, job_id, equal, now):
        return JobState.COMPLETED
    notifications.send(connection, Topic.QUEUED, [job_id])
    return JobState.QUEUED
