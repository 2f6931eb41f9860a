"""POST /v1/predict: queues a job and responds immediately."""

from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Header, Request, Response
from sqlalchemy import Connection

from batchserve import idempotency
from batchserve.access import Caller
from batchserve.api.auth import CallerDep, caller_of
from batchserve.api.bodies import json_object
from batchserve.api.deps import (
    PROBLEMS,
    IdempotencyKey,
    OwnJob,
    ServiceDep,
    bare_key,
    body_of,
    finished,
    has_long_key,
    job_response,
    own_job,
    predict_options,
    preferred_wait,
    read_body,
    replayed,
    served,
    wait_for,
)
from batchserve.api.plain import plain
from batchserve.api.schemas.jobs import JobBody
from batchserve.api.schemas.options import query_parameters
from batchserve.api.upload import (
    INPUT_BODY,
    Filename,
    InputHints,
    Read,
    keep,
    received_input,
    require_quota,
)
from batchserve.domain import Job, JobState, ModelVersion, ReadOptions
from batchserve.errors import BatchserveError, InvalidOptions
from batchserve.idempotency import KeyedRequest
from batchserve.jobs import requests
from batchserve.options import PredictOptions
from batchserve.quotas.account import added_by, charge_if_limited
from batchserve.service import JobSnapshot, Service
from batchserve.submission import Scored, Submission, complete_once, enqueue, enqueue_once, wanted_columns

router = APIRouter(tags=["predict"])

Prefer = Annotated[str | None, Header(description="`wait=10`: respond when the job is finished, or after 10 seconds.")]
_NOT_OPTIONS = (*ReadOptions.__dataclass_fields__, "filename")

OPTION_PARAMETERS = query_parameters(PredictOptions)
OPTIONS_BODY = {
    "required": False,
    "description": "The options as JSON; they take precedence over those in the query.",
    "content": {
        "application/json": {
            "schema": PredictOptions.model_json_schema() | {"required": []},
            "example": {"model": "flights", "format": "parquet", "passthrough": ["carrier", "flight"]},
        }
    },
}
FINISHED: dict[int | str, dict[str, Any]] = {200: {"model": JobBody, "description": "The job is finished already."}}


async def _predict(request: Request) -> Response | None:
    if has_long_key(request):
        return None
    job_id, background = await own_job(request.path_params["job_id"], request), BackgroundTasks()
    key = request.headers.get("idempotency-key")
    response = await predict(job_id, request, served(request), caller_of(request), background, key)
    response.background = background
    return response


@router.post(
    "/v1/predict/{job_id}", status_code=202, response_model=JobBody, operation_id="predict",
    summary="Queue an uploaded input for a model", responses={**FINISHED, **PROBLEMS},
    openapi_extra={"parameters": OPTION_PARAMETERS, "requestBody": OPTIONS_BODY},
)  # fmt: skip
@plain(_predict)
async def predict(
    job_id: OwnJob,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,  # noqa: ARG001 - `preferred_wait` reads it
) -> Response:
    """Repeating the call gives the same job and never starts a second run; with another model or other options it
    gives a new job on the same input.

    The beginning of the input is checked against the model's signature now, not in an hour.
    """
    given = {**request.query_params, **await json_object(request, service.runtime.settings)}
    key, wait = bare_key(idempotency_key), preferred_wait(request)
    return await predict_stored(job_id, given, request, service, caller, background, key, wait)


async def predict_stored(
    job_id: str,
    given: dict[str, Any],
    request: Request,
    service: Service,
    caller: Caller,
    background: BackgroundTasks,
    key: str | None = None,
    wait: float = 0.0,
) -> Response:
    """Predicts the stored input of a job under the options that are `given`. The response waits for the end of the job
    for at most `wait` seconds. Raises RequestValidationError for unknown or invalid options, and as `predict` does."""
    database = service.runtime.database
    with service.only_one(caller.tenant, key):
        new = service.just_uploaded.take(job_id)
        if new is not None and key is None:
            done = await _predict_unread(service, caller, new, given)
            if done is not None:
                return await answered(request, service, background, *done, wait)
        job, inputs = await service.read_job_to_check(job_id, new)
        if "model" not in given and job.model is not None:
            given = {**given, "model": job.model.reference}
        options = predict_options(service, given)
        content = idempotency.fingerprint("predict", job_id, options.model_dump_json())
        keyed = KeyedRequest(caller.tenant, key, content)
        if (answer := await replayed(service, keyed)) is not None:
            return answer
        if job.model is not None and job.queued_at is not None and options.model in _names(job.model):
            model = job.model  # pinned: versions added or removed since do not make this a different request
        else:
            model = await service.resolve_model(options.model)
        submitted = options.submission(job.tenant, job_id, inputs, model)
        scored = None
        if job.state is JobState.UPLOADED:
            scored = await service.check_or_score(caller.tenant, submitted)
        elif job.input_removed_at is None and not submitted.is_of(job):
            requests.require_read(job)
            await service.check(caller.tenant, submitted)

        def commit(connection: Connection) -> JobSnapshot:
            now = database.moment(connection).wall
            view = _submit(service, connection, submitted, job, keyed, scored, now)
            charge_if_limited(service.limits, connection, job.tenant, added_by(view.job, now), now)
            return view

        view = await database.commit(commit, alone=await service.limits.of(job.tenant) is not None)
        return await answered(request, service, background, view, scored, wait)


async def _predict_unread(
    service: Service, caller: Caller, job: Job, given: dict[str, Any]
) -> tuple[JobSnapshot, Scored | None] | None:
    """Predicts a small job as it was just created here, without reading it first: its state is a guard of what is
    written. None, with nothing written, for a job that has changed since and for any refusal, which may not be true of
    it as it is now."""
    if "model" not in given:
        if job.model is None:
            return None
        given = {**given, "model": job.model.reference}
    options, database = predict_options(service, given), service.runtime.database
    try:
        model = await service.resolve_model(options.model)
        submitted = options.submission(job.tenant, job.id, job.inputs, model)
        scored = await service.check_or_score(caller.tenant, submitted)
    except BatchserveError:
        return None

    def commit(connection: Connection) -> JobSnapshot | None:
        now = database.moment(connection).wall
        view: JobSnapshot | None = None
        if scored is not None and (done := complete_once(connection, submitted, job, scored, now)) is not None:
            view = service.shown(done[0], [done[1]], now)
        elif enqueue(connection, submitted, now) is not None:
            view = service.snapshot(connection, job.id)
        if view is not None:
            charge_if_limited(service.limits, connection, job.tenant, added_by(view.job, now), now)
        return view

    view = await database.commit(commit, alone=await service.limits.of(job.tenant) is not None)
    return None if view is None else (view, scored)


async def _upload_and_predict(request: Request) -> Response | None:
    if "state" in request.query_params:
        raise InvalidOptions(
            "state: all uploaded inputs are queued by POST /v1/jobs/predict; here the body is the input"
        )
    if has_long_key(request) or not request.query_params.keys().isdisjoint(_NOT_OPTIONS):
        return None
    key = request.headers.get("idempotency-key")
    background = BackgroundTasks()
    response = await upload_and_predict(
        request,
        served(request),
        caller_of(request),
        background,
        ReadOptions(),
        idempotency_key=key,
    )
    response.background = background
    return response


@router.post(
    "/v1/predict", status_code=202, response_model=JobBody, operation_id="upload_and_predict",
    summary="Upload and predict in one call", responses={**FINISHED, **PROBLEMS},
    openapi_extra={"parameters": OPTION_PARAMETERS, **INPUT_BODY},
)  # fmt: skip
@plain(_upload_and_predict)
async def upload_and_predict(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    background: BackgroundTasks,
    read: Read,
    filename: Filename = None,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,  # noqa: ARG001 - `preferred_wait` reads it
) -> Response:
    """The body is the input. Nothing is stored unless it fits the model."""
    query = {name: value for name, value in request.query_params.items() if name not in _NOT_OPTIONS}
    key = bare_key(idempotency_key)
    options = predict_options(service, query)
    await require_quota(request, service, caller, key, queues=True)
    with service.only_one(caller.tenant, key):
        model = await service.resolve_model(options.model)
        hints = InputHints(caller.tenant, read, wanted_columns(model, options.columns))
        async with received_input(request, service, hints, filename) as received:
            content = idempotency.fingerprint("upload-predict", str(request.query_params), received.sha256)
            keyed = KeyedRequest(caller.tenant, key, content)
            if (answer := await replayed(service, keyed)) is not None:
                return answer
            submitted = options.submission(caller.home, received.job_id, (received.input,), model)
            scored = await service.check_or_score(caller.tenant, submitted)

            def insert(connection: Connection) -> JobSnapshot:
                now = service.runtime.database.moment(connection).wall
                uploaded_by = submitted.asked_by.traceparent
                job = requests.create(
                    connection, received.job_id, submitted.inputs, model, now, caller.home, uploaded_by
                )
                view = _submit(service, connection, submitted, job, keyed, scored, now)
                added = added_by(view.job, now, received.input.bytes or 0)
                charge_if_limited(service.limits, connection, caller.home, added, now)
                return view

            view = await keep(service, caller, received, insert)
        return await answered(request, service, background, view, scored, preferred_wait(request))


def _submit(
    service: Service,
    connection: Connection,
    submitted: Submission,
    job: Job,
    keyed: KeyedRequest,
    scored: Scored | None,
    now: float,
) -> JobSnapshot:
    """Completes or queues a job. `job`: as it was read, or created."""
    if scored is not None:
        done = complete_once(connection, submitted, job, scored, now, keyed)
        if done is not None:
            ended, attempt = done
            return service.shown(ended, [attempt], now)
    return service.snapshot(connection, enqueue_once(connection, submitted, now, keyed))


def _names(model: ModelVersion) -> tuple[str, str]:
    return model.name, model.reference


async def answered(
    request: Request,
    service: Service,
    background: BackgroundTasks,
    view: JobSnapshot,
    scored: Scored | None,
    wait: float,
) -> Response:
    """202 to a request that does not wait, also for a job that was scored at once: clients poll as for any other.

    `view`: of the job as it was committed.
    """
    job_id, body = view.job.id, await body_of(service, view)
    if scored is not None and body.state is JobState.COMPLETED and body.reused_from is None:
        service.tell_completed(job_id, body.rows.ok, body.rows.failed)
    if wait and not body.state.finished:
        service.wake_worker()
        await wait_for(request, service, job_id, wait, finished)
        body = await read_body(service, job_id)
    headers = {"preference-applied": f"wait={wait:g}"} if wait else {}
    if body.state is JobState.QUEUED:
        # The row records the work; the background task only wakes the worker.
        background.add_task(service.wake)
    is_expected = bool(wait) or scored is None or body.reused_from is not None
    return job_response(body, 200 if body.state.finished and is_expected else 202, headers)
