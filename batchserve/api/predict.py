"""POST /v1/predict: a job -> queued; the answer comes back at once."""

import time
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, BackgroundTasks, Header, Query, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import json_object
from batchserve.api.deps import (
    PROBLEMS,
    IdempotencyKey,
    OwnJob,
    Service,
    ServiceDep,
    bare_key,
    finished,
    job_response,
    once,
    parsed,
    preferred_wait,
    read_body,
    read_job,
    replayed,
    resolve_model,
    wait_for,
)
from batchserve.api.queueing import Asked, enqueue, input_of
from batchserve.api.schemas import JobBody, PredictOptions, QueuedBody, query_parameters
from batchserve.api.upload import (
    INPUT_BODY,
    Delimiter,
    Filename,
    check_input,
    keep,
    received_input,
)
from batchserve.api.uploaded import predict_uploaded
from batchserve.domain import Job, JobState, ModelVersion
from batchserve.errors import JobConflict
from batchserve.jobs import queries, requests

router = APIRouter(tags=["predict"])

Prefer = Annotated[str | None, Header(description="`wait=10`: answer when the job is finished, or after 10 seconds.")]
Uploaded = Annotated[
    Literal["uploaded"] | None, Query(description="Queue all uploaded jobs instead of an input in the body.")
]
_NOT_OPTIONS = ("delimiter", "filename")

OPTION_PARAMETERS = query_parameters(PredictOptions)
OPTIONS_BODY = {
    "required": False,
    "description": "The options as JSON; one that stands in the query as well is taken from here.",
    "content": {
        "application/json": {
            "schema": PredictOptions.model_json_schema() | {"required": []},
            "example": {"model": "flights", "format": "parquet", "passthrough": ["carrier", "flight"]},
        }
    },
}
FINISHED: dict[int | str, dict[str, Any]] = {200: {"model": JobBody, "description": "The job is finished already."}}


@router.post(
    "/v1/predict/{job_id}", status_code=202, response_model=JobBody, operation_id="predict",
    summary="Queue an uploaded input for a model", responses={**FINISHED, **PROBLEMS},
    openapi_extra={"parameters": OPTION_PARAMETERS, "requestBody": OPTIONS_BODY},
)  # fmt: skip
async def predict(
    job_id: OwnJob,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response:
    """Repeating the call never starts a second run; other options for the same job are a conflict (409).

    The beginning of the input is checked against the model's signature now, not in an hour.
    """
    given = {**request.query_params, **await json_object(request, service.runtime.settings)}
    key = bare_key(idempotency_key)

    async def work() -> Response:
        job = read_job(service, job_id)
        if "model" not in given and job.model is not None:
            given["model"] = job.model.reference
        options = parsed(PredictOptions, given)
        content = idempotency.fingerprint("predict", job_id, options.model_dump_json())
        if (answer := await replayed(service, caller, key, content)) is not None:
            return answer
        if job.model is not None and job.queued_at is not None and options.model in _names(job.model):
            model = job.model  # pinned: a version that came or went since does not make this another request
        else:
            model = resolve_model(service, options.model)
        asked = Asked(job.tenant, input_of(job), model, options)
        if job.state is JobState.UPLOADED:
            await check_input(service, caller, asked.input, model, asked.chosen)

        def commit() -> None:
            with service.runtime.database.write() as connection:
                _enqueue(connection, asked, _Key(caller.tenant, key, content))

        await run_in_threadpool(commit)
        return await _answer(request, service, background, job_id, preferred_wait(prefer))

    return await once(service, caller, key, work)


@router.post(
    "/v1/predict", status_code=202, response_model=JobBody | QueuedBody, operation_id="upload_and_predict",
    summary="Upload and predict in one call, or queue all uploaded inputs", responses={**FINISHED, **PROBLEMS},
    openapi_extra={"parameters": OPTION_PARAMETERS, "requestBody": INPUT_BODY["requestBody"] | {"required": False}},
)  # fmt: skip
async def upload_and_predict(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    background: BackgroundTasks,
    delimiter: Delimiter = None,
    filename: Filename = None,
    state: Uploaded = None,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response:
    """The body is the input. Nothing is stored unless it fits the model.

    With `state=uploaded` there is no input: all jobs in that state are queued, but for those that were uploaded for
    another model. One that does not fit stays uploaded, and the answer tells why.
    """
    # Of inputs that were uploaded before, it is too late to name a delimiter or a file: no options there.
    no_options = ("state",) if state is not None else _NOT_OPTIONS
    query = {name: value for name, value in request.query_params.items() if name not in no_options}
    key = bare_key(idempotency_key)
    if state is not None:
        given = parsed(PredictOptions, {**query, **await json_object(request, service.runtime.settings)})
        return await once(service, caller, key, lambda: predict_uploaded(service, caller, given, key))
    options = parsed(PredictOptions, query)

    async def work() -> Response:
        model = resolve_model(service, options.model)
        async with received_input(request, service, delimiter, filename) as received:
            new = received.input
            content = idempotency.fingerprint("upload-predict", str(request.query_params), new.sha256)
            if (answer := await replayed(service, caller, key, content)) is not None:
                return answer
            asked = Asked(caller.home, new, model, options)
            await check_input(service, caller, new, model, asked.chosen)

            def insert(connection: Connection) -> None:
                requests.create(connection, new, model, time.time(), caller.home)
                _enqueue(connection, asked, _Key(caller.tenant, key, content))

            await keep(service, received, insert)
        return await _answer(request, service, background, new.job_id, preferred_wait(prefer))

    return await once(service, caller, key, work)


@dataclass(frozen=True, slots=True)
class _Key:
    """The Idempotency-Key of a request, if it has one, and what the request is remembered by."""

    tenant: str
    key: str | None
    content: str

    def remember(self, connection: Connection, job_id: str, now: float) -> None:
        if self.key is not None:
            idempotency.remember(connection, self.key, self.content, job_id, 202, now, self.tenant)


def _names(model: ModelVersion) -> tuple[str, str]:
    return model.name, model.reference


def _enqueue(connection: Connection, asked: Asked, key: _Key) -> None:
    """Queues the job, or completes it by an equal one. Raises JobConflict when it was queued otherwise before."""
    now = time.time()
    if enqueue(connection, asked, now) is None:
        _require_same(queries.get(connection, asked.input.job_id), asked)
    key.remember(connection, asked.input.job_id, now)


def _require_same(job: Job, asked: Asked) -> None:
    again = "upload the input again to predict it anew"
    if job.request_digest is None or job.model is None:
        raise JobConflict(f"job {job.id} is {job.state} and was never queued: {again}")
    before = (job.request_digest, job.priority, job.run_after, job.metadata)
    if before != (asked.digest, asked.options.priority, asked.run_after, asked.options.metadata):
        raise JobConflict(f"job {job.id} is {job.state} for {job.model.reference} with other options: {again}")


async def _answer(
    request: Request, service: Service, background: BackgroundTasks, job_id: str, wait: float
) -> Response:
    headers = {}
    if wait:
        service.wake_worker()
        await wait_for(request, service, job_id, wait, finished)
        headers["preference-applied"] = f"wait={wait:g}"
    body = await read_body(service, job_id)
    if body.state is JobState.QUEUED:
        # The row is the record of the work; the background task is only the wake-up.
        background.add_task(service.wake)
    return job_response(body, 200 if body.state.finished else 202, headers)
