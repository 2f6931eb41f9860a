"""/v1/jobs/{job_id}: show, follow, cancel, retry and remove a job."""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from functools import partial
from typing import Annotated, Literal

import uuid_utils
from fastapi import APIRouter, BackgroundTasks, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import audit, correlation, idempotency
from batchserve.access import Action, Caller
from batchserve.api import conditional, examples
from batchserve.api.auth import CallerDep, caller_of, is_key_in_force
from batchserve.api.bodies import json_object, require_space
from batchserve.api.deps import (
    PROBLEMS,
    FollowingDep,
    IdempotencyKey,
    OwnJob,
    ServiceDep,
    bare_key,
    job_response,
    own_job,
    parsed,
    preferred_wait,
    read_body,
    read_body_from_thread,
    replayed,
    served,
    wait_for,
)
from batchserve.api.events import tag_of
from batchserve.api.plain import plain
from batchserve.api.schemas.jobs import JobBody
from batchserve.domain import Job
from batchserve.idempotency import KeyedRequest
from batchserve.jobs import plan, queries, requests
from batchserve.jobs.statements import Owned
from batchserve.quotas.account import Added, charge_if_limited
from batchserve.service import Service
from batchserve.storage import Storage, copy_object, delete_objects, part_key, parts_prefix
from batchserve.submission import naming_bytes
from batchserve.upkeep import retention

router = APIRouter(tags=["jobs"])

EVENTS_SHOWN = {"responses": {"200": {"content": {"text/event-stream": {"example": examples.EVENTS}}}}}


async def _get_job(request: Request) -> Response | None:
    if request.scope["query_string"]:
        return None
    job_id = await own_job(request.path_params["job_id"], request)
    return await get_job(job_id, request, served(request))


@router.head("/v1/jobs/{job_id}", include_in_schema=False)
@router.get(
    "/v1/jobs/{job_id}", response_model=JobBody, operation_id="get_job", summary="Show a job, now or when it changes",
    responses={304: {"description": "Nothing has changed (If-None-Match)."}, **PROBLEMS},
)  # fmt: skip
@plain(_get_job)
async def get_job(
    job_id: OwnJob,
    request: Request,
    service: ServiceDep,
    wait: Annotated[float, Query(ge=0, le=60, description="Seconds to wait for another state.")] = 0.0,
    prefer: Annotated[str | None, Header(description="`wait=30` does the same.")] = None,  # noqa: ARG001 - see below
    if_none_match: Annotated[str | None, Header()] = None,  # noqa: ARG001 - `conditional` reads it, and the others
) -> Response:
    if seconds := wait or preferred_wait(request):
        before = (await service.read_job(job_id)).state
        if not before.finished:
            await wait_for(request, service, job_id, seconds, lambda state: state is not before)
    version = await service.runtime.database.version()
    body = await read_body(service, job_id)
    tag = _etag(body)
    answer = job_response(body, 200, {"etag": tag})
    request.app.state.answers.put((caller_of(request).tenant, request.scope["path"]), version, answer)
    return conditional.answered(request, tag) or answer


async def existing_job(job_id: OwnJob, service: ServiceDep) -> Job:
    """The job of the path. A deleted one is refused here, before the status of a stream is sent."""
    return await service.read_job(job_id)


@router.head("/v1/jobs/{job_id}/events", include_in_schema=False, dependencies=[Depends(existing_job)])
async def head_of_events() -> Response:
    """The head of a stream alone: a stream lasts as long as its job."""
    return Response(media_type="text/event-stream")


@router.get(
    "/v1/jobs/{job_id}/events", response_class=EventSourceResponse, responses=PROBLEMS,
    operation_id="follow_job", summary="Follow a job by server-sent events", openapi_extra=EVENTS_SHOWN,
)  # fmt: skip
async def follow_job(
    job: Annotated[Job, Depends(existing_job)],
    request: Request,
    following: FollowingDep,
    last_event_id: Annotated[str | None, Header()] = None,
) -> AsyncIterator[ServerSentEvent]:
    """`state` when the state changes, `progress` in between; the data is the job. Ends with the finished state.

    An event's ID identifies its content: reconnecting with Last-Event-ID repeats nothing. The stream also ends when the
    job is deleted, when the key is revoked, and when the server stops.
    """
    told = last_event_id
    state = told.partition("-")[0] if told else None
    allowed = partial(is_key_in_force, request, request.app.state.keyring)
    async with aclosing(following.follow(job.id, allowed)) as changes:
        async for change in changes:
            if change.tag != told:
                yield change.as_progress if state == change.state else change.as_state
                told, state = change.tag, change.state


@router.post(
    "/v1/jobs/{job_id}/cancel", status_code=202, response_model=JobBody, responses=PROBLEMS,
    operation_id="cancel_job", summary="Cancel a job",
)  # fmt: skip
async def cancel_job(job_id: OwnJob, service: ServiceDep, caller: CallerDep, background: BackgroundTasks) -> Response:
    """Immediate for a queued job, within seconds for a running one. Finished chunks are kept; a finished job does not
    change."""

    database = service.runtime.database

    def request(connection: Connection) -> None:
        now = database.moment(connection).wall
        job = requests.request_cancel(connection, job_id, now)
        if job is not None:
            audit.note_job(connection, caller, Action.CANCEL, job_id, job.tenant, now)

    def cancel() -> JobBody:
        database.write_freeing(request)
        return read_body_from_thread(service, job_id)

    body = await run_in_threadpool(cancel)
    background.add_task(service.wake)
    return job_response(body, 202)


RetriedRows = Literal["unfinished", "failed"]


class RetryBody(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"rows": "failed"}})

    rows: RetriedRows = Field(
        "unfinished", description="`failed`: a new job that scores the failed records of a completed one again."
    )


RETRY = {
    "required": False,
    "content": {"application/json": {"schema": RetryBody.model_json_schema(), "example": {"rows": "failed"}}},
}


@router.post(
    "/v1/jobs/{job_id}/retry", status_code=202, response_model=JobBody, responses=PROBLEMS,
    operation_id="retry_job", summary="Resume a failed or cancelled job", openapi_extra={"requestBody": RETRY},
)  # fmt: skip
async def retry_job(
    job_id: OwnJob,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Finished chunks are kept; the others are scored. With `rows: failed`, the response is a new job with the merged
    result: a result never changes.
    """
    rows = parsed(RetryBody, await json_object(request, service.runtime.settings)).rows
    key = bare_key(idempotency_key)
    keyed = KeyedRequest(caller.tenant, key, idempotency.fingerprint("retry", job_id, rows))
    background.add_task(service.wake)
    with service.only_one(caller.tenant, key):
        if (answer := await replayed(service, keyed)) is not None:
            return answer
        return job_response(await retry(service, caller, job_id, rows, keyed), 202)


async def retry(service: Service, caller: Caller, job_id: str, rows: RetriedRows, keyed: KeyedRequest) -> JobBody:
    """The retried job. Raises JobConflict."""

    def retry() -> JobBody:
        if rows == "failed":
            require_space(service.runtime)
            retried = str(uuid_utils.uuid7())
            discard = partial(_remove_parts, service.runtime.storage, retried)
            _copy_scored(service, job_id, retried, discard)
            transaction = naming_bytes(service.runtime.database, undo=discard)
        else:
            retried = job_id
            transaction = service.runtime.database.write()
        with transaction as connection:
            now = service.runtime.database.moment(connection).wall
            if rows == "failed":
                job = queries.get(connection, job_id)
                requests.create_retry_of_failed_rows(connection, job, retried, now, correlation.current())
                added = Added(again=job.rows_failed, queues=True)
            else:
                job = requests.retry_if_stopped(connection, job_id, now, correlation.current())
                added = Added(queues=True)
            audit.note_job(connection, caller, Action.RETRY, job_id, job.tenant, now)
            keyed.remember(connection, retried, 202, now)
            charge_if_limited(service.limits, connection, job.tenant, added, now)
        return read_body_from_thread(service, retried)

    return await run_in_threadpool(retry)


@router.delete(
    "/v1/jobs/{job_id}", status_code=204, responses=PROBLEMS, operation_id="delete_job",
    summary="Remove a job with its input and result",
)  # fmt: skip
async def delete_job(job_id: OwnJob, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """Bytes shared with another job (`reused_from`) stay. A running job is cancelled first, by its owner (409)."""
    if conditional.is_conditional(request):
        conditional.require(request, _etag(await read_body(service, job_id)), exists=True)
    await run_in_threadpool(_delete, service, caller, job_id)
    return Response(status_code=204)


def _copy_scored(service: Service, job_id: str, retry_id: str, discard: Callable[[], None]) -> None:
    """Copies the parts that the new job reuses before a row references them."""
    storage = service.runtime.storage
    with service.runtime.database.read() as connection:
        requests.require_failed_rows(queries.get(connection, job_id))
        done = plan.done_chunks(connection, job_id)
    try:
        for committed in done:
            if not committed.errors_bytes:
                first, attempt = committed.chunk.first_record, committed.attempt
                source, target = part_key(job_id, first, attempt), part_key(retry_id, first, attempt)
                copy_object(storage, source, target, committed.part_bytes)
    except FileNotFoundError:
        discard()
        with service.runtime.database.read() as connection:  # deleted or expired meanwhile
            requests.require_failed_rows(queries.get(connection, job_id))
        raise
    except BaseException:
        discard()
        raise


def _delete(service: Service, caller: Caller, job_id: str) -> None:
    database = service.runtime.database

    def delete(connection: Connection) -> Owned:
        job = requests.delete_if_not_running(connection, job_id)
        audit.note_job(connection, caller, Action.DELETE, job_id, job.tenant, database.moment(connection).wall)
        return job

    job = database.write_freeing(delete)
    retention.remove_bytes(database, service.runtime.storage, job)


def _remove_parts(storage: Storage, job_id: str) -> None:
    delete_objects(storage, [part.key for part in storage.list(parts_prefix(job_id))])


def _etag(body: JobBody) -> str:
    return f'W/"{tag_of(body)}"'
