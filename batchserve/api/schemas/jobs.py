"""Bodies about jobs, and how they are made from the domain."""

from datetime import datetime
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from batchserve.api import examples
from batchserve.api.schemas.models import ModelReference, model_reference
from batchserve.api.schemas.times import time_of, time_or_none
from batchserve.domain import Attempt, Job, JobState
from batchserve.errors import BatchserveError
from batchserve.formats import FORMATS
from batchserve.storage.locations import is_external


class InputBody(BaseModel):
    bytes: int | None = Field(description="Of all inputs. Null: unknown before they were read.")
    sha256: str | None = Field(description="Null for one that is read in place.")
    url: str | None = Field(description="Where the first input is read in place; null for one that was uploaded.")
    query: str | None = Field(description="Whose rows are the input; null for any other.")
    connection: str | None = Field(description="The database of the query.")
    files: int = Field(description="Number of inputs; `inputs` of the links lists them.")
    media_type: str
    format: str
    filename: str | None
    rows: int | None = Field(description="Records, known when planning is done.")


class Rows(BaseModel):
    total: int | None
    ok: int
    failed: int


class Chunks(BaseModel):
    total: int | None
    done: int


class ResultBody(BaseModel):
    bytes: int
    sha256: str | None = Field(description="Null where the storage composed the result without reading its bytes.")
    media_type: str
    format: str
    rows: int


class OutputBody(BaseModel):
    url: str | None = Field(description="With `{stem}`, one for each input; null for an archive and for a table.")
    archive: bool = Field(description="A ZIP of one result for each input.")
    table: str | None = Field(description="`connection.schema.name` of a table; null for others.")
    mode: str | None = Field(description="Of a table: `append` or `replace`.")
    files: int
    overwrite: bool
    partition_by: str | None


class AttemptBody(BaseModel):
    number: int
    worker: str
    started_at: datetime
    finished_at: datetime | None
    outcome: str | None
    error: dict[str, Any] | None


class JobBody(BaseModel):
    """A job. `state` is one of uploaded, queued, running, completed, failed, cancelled, expired."""

    model_config = ConfigDict(json_schema_extra={"example": examples.JOB})

    id: str
    tenant: str = Field(description="The tenant of the key that created it.")
    state: JobState
    reason: str | None
    model: ModelReference | None
    input: InputBody
    options: dict[str, Any]
    attempt: int
    attempts: list[AttemptBody]
    cancel_requested: bool
    rows: Rows
    chunks: Chunks
    progress: float = Field(ge=0, le=1, description="The finished share, including assembly; 1.0 when completed.")
    rows_per_s: float | None
    eta_s: float | None
    queue_position: int | None
    result: ResultBody | None
    output: OutputBody | None = Field(description="What the result is, other than one that is kept and downloaded.")
    reused_from: str | None
    error: dict[str, Any] | None
    notes: list[str]
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None = Field(description="When the bytes of an ended job are due to be removed, or were.")
    request_id: str | None = Field(description="Of the request that queued it: its predict, or the latest retry.")
    metadata: dict[str, str]
    links: dict[str, str]


class RefusedJob(BaseModel):
    """A job that stays uploaded because its input does not fit the model."""

    id: str
    problem: dict[str, Any] = Field(description="`code` and `detail` of the problem that its predict would return.")

    @classmethod
    def of(cls, job_id: str, error: BatchserveError) -> Self:
        return cls(id=job_id, problem={"code": error.code, "detail": error.detail})


class QueuedBody(BaseModel):
    """The outcome of one request that queues uploaded jobs."""

    model_config = ConfigDict(json_schema_extra={"example": examples.QUEUED})

    queued: int = Field(description="Jobs that wait for a worker now.")
    completed: int = Field(description="Jobs that reused the result of an equal job.")
    refused: list[RefusedJob]
    jobs: list[str] = Field(description="The ids of the queued and the completed jobs, in the order of their upload.")


class JobList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.JOBS})

    jobs: list[JobBody]
    next: str | None = Field(description="Value of `after` for the next page; null on the last one.")
    total: int | None = Field(None, description="Jobs of all pages, with `total=true`; null without.")


def job_body(job: Job, attempts: list[Attempt], queue_position: int | None, now: float) -> JobBody:
    (rate, eta), first = _speed(job, attempts, now), job.input
    query = job.options.query if job.options is not None else None
    return JobBody(
        id=job.id,
        tenant=job.tenant,
        state=job.state,
        reason=job.reason,
        model=model_reference(job.model) if job.model else None,
        input=InputBody(
            bytes=job.inputs_bytes if job.inputs_total > 1 else first.bytes,
            sha256=first.sha256,
            url=first.key if is_external(first.key) else None,
            query=query.text if query is not None else None,
            connection=query.connection if query is not None else None,
            files=job.inputs_total,
            media_type=FORMATS[first.format].media_type,
            format=first.format,
            filename=first.filename,
            rows=job.rows_planned if job.planned else None,
        ),
        options=_options(job),
        attempt=job.attempt,
        attempts=[_attempt(attempt) for attempt in attempts],
        cancel_requested=job.cancel_requested_at is not None,
        rows=Rows(total=job.rows_planned if job.planned else None, ok=job.rows_ok, failed=job.rows_failed),
        chunks=Chunks(total=job.chunks_total if job.planned else None, done=job.chunks_done),
        progress=job.progress,
        rows_per_s=rate,
        eta_s=eta,
        queue_position=queue_position,
        result=_result(job),
        output=_output(job),
        reused_from=job.reused_from,
        error=job.error,
        notes=list(job.notes),
        created_at=time_of(job.created_at),
        queued_at=time_or_none(job.queued_at),
        started_at=time_or_none(job.started_at),
        finished_at=time_or_none(job.finished_at),
        expires_at=time_or_none(job.expires_at),
        request_id=job.request_id,
        metadata=job.metadata,
        links=_links(job),
    )


def _options(job: Job) -> dict[str, Any]:
    if job.options is None:
        return {}
    return {
        "format": job.options.format,
        "passthrough": job.options.passthrough,
        "columns": job.options.columns,
        "key": job.options.key,
        "on_row_error": job.options.on_row_error,
        "max_errors": job.options.max_errors,
        "top_k": job.options.top_k,
        "inputs": job.options.inputs,
        "input_file": job.options.input_file,
        "priority": job.priority,
        "run_after": time_or_none(job.run_after),
        "webhook": job.webhook,
        "expires_in": job.expires_in,
    }


def _output(job: Job) -> OutputBody | None:
    options = job.options
    if options is None or (options.target is None and options.table is None and not options.archive):
        return None
    target, table = options.target, options.table
    return OutputBody(
        url=target.url if target else None,
        archive=options.archive,
        table=table.shown if table else None,
        mode=table.mode if table else None,
        files=0 if table else job.inputs_total if options.is_per_input else 1,
        overwrite=target is not None and target.overwrite,
        partition_by=target.partition_by if target else None,
    )


def _result(job: Job) -> ResultBody | None:
    if job.state is not JobState.COMPLETED or job.result is None or job.options is None:
        return None
    format = "zip" if job.options.archive else job.options.format
    return ResultBody(
        bytes=job.result.bytes,
        sha256=job.result.sha256,
        media_type=FORMATS[format].media_type,
        format=format,
        rows=job.rows_done,
    )


def _speed(job: Job, attempts: list[Attempt], now: float) -> tuple[float | None, float | None]:
    """Rows per second in the last attempt, and the remaining seconds at that speed."""
    rows = job.rows_done - attempts[-1].rows_before if attempts else 0
    if rows <= 0:
        return None, None
    attempt = attempts[-1]
    elapsed = max((attempt.finished_at or now) - attempt.started_at, 1e-3)
    running = job.state is JobState.RUNNING and job.progress > 0
    gained = job.progress * rows / job.rows_done
    return round(rows / elapsed, 1), round((1 - job.progress) * elapsed / gained, 1) if running else None


def _links(job: Job) -> dict[str, str]:
    download, self_ = f"/v1/download/{job.id}", f"/v1/jobs/{job.id}"
    return {
        "self": self_,
        "input": f"{download}/input",
        "inputs": f"{self_}/inputs",
        "result": download,
        "errors": f"{download}/errors",
        "events": f"{self_}/events",
        "cancel": f"{self_}/cancel",
    }


def _attempt(attempt: Attempt) -> AttemptBody:
    return AttemptBody(
        number=attempt.number,
        worker=attempt.worker,
        started_at=time_of(attempt.started_at),
        finished_at=time_or_none(attempt.finished_at),
        outcome=attempt.outcome,
        error=attempt.error,
    )
