"""POST /v1/predict: a job -> queued; the answer comes back at once."""

import hashlib
import time
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, BackgroundTasks, Header, Request, Response
from pydantic import TypeAdapter
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency, jobs
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
from batchserve.api.schemas import JobBody, PredictOptions
from batchserve.api.upload import INPUT_BODY, Delimiter, Filename, check_input, keep, received_input
from batchserve.domain import Caller, Job, JobState, ModelVersion, Options
from batchserve.errors import JobConflict
from batchserve.jobs import NewInput

router = APIRouter(tags=["predict"])

Prefer = Annotated[str | None, Header(description="`wait=10`: answer when the job is finished, or after 10 seconds.")]
_options = TypeAdapter(Options)

OPTION_PARAMETERS: list[dict[str, Any]] = [
    {
        "name": name,
        "in": "query",
        "required": False,
        "schema": {"type": "string"} if name in ("columns", "metadata", "passthrough") else schema,
        "description": schema.get("description", ""),
    }
    for name, schema in PredictOptions.model_json_schema()["properties"].items()
]
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
        new = _input_of(job)
        if job.model is not None and job.queued_at is not None and options.model in _names(job.model):
            model = job.model  # pinned: a version that came or went since does not make this another request
        else:
            model = resolve_model(service, options.model)
        chosen = _chosen(options, new.format, model)
        if job.state is JobState.UPLOADED:
            await check_input(service, new, model, chosen)
        asked = _Request(caller, job.tenant, new, model, options, chosen, key, content)
        await run_in_threadpool(_enqueue_uploaded, service, asked)
        return await _answer(service, background, job_id, preferred_wait(prefer))

    return await once(service, caller, key, work)


@router.post(
    "/v1/predict", status_code=202, response_model=JobBody, operation_id="upload_and_predict",
    summary="Upload and predict in one call", responses={**FINISHED, **PROBLEMS},
    openapi_extra={"parameters": OPTION_PARAMETERS, **INPUT_BODY},
)  # fmt: skip
async def upload_and_predict(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    background: BackgroundTasks,
    delimiter: Delimiter = None,
    filename: Filename = None,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response:
    """The body is the input. Nothing is stored unless it fits the model."""
    query = {name: value for name, value in request.query_params.items() if name not in ("delimiter", "filename")}
    options = parsed(PredictOptions, query)
    key = bare_key(idempotency_key)

    async def work() -> Response:
        model = resolve_model(service, options.model)
        async with received_input(request, service, delimiter, filename) as received:
            new = received.input
            content = idempotency.fingerprint("upload-predict", str(request.query_params), new.sha256)
            if (answer := await replayed(service, caller, key, content)) is not None:
                return answer
            chosen = _chosen(options, new.format, model)
            await check_input(service, new, model, chosen)
            asked = _Request(caller, caller.home, new, model, options, chosen, key, content)
            await keep(service, received, lambda connection: _enqueue(connection, asked, create=True))
        return await _answer(service, background, new.job_id, preferred_wait(prefer))

    return await once(service, caller, key, work)


@dataclass(frozen=True, slots=True)
class _Request:
    """What is asked of a job, with the Idempotency-Key under which it is remembered."""

    caller: Caller
    tenant: str
    """Of the job, for an administrator of all."""
    input: NewInput
    model: ModelVersion
    options: PredictOptions
    chosen: Options
    key: str | None
    content: str

    @property
    def digest(self) -> str:
        """Equal for equal input bytes, read in the same way, model and options: such jobs have equal results."""
        read_as = [self.input.sha256, self.input.format, self.input.dialect.delimiter]
        what = [read_as, self.model.digest, _options.dump_python(self.chosen, mode="json")]
        return hashlib.sha256(orjson.dumps(what)).hexdigest()

    @property
    def run_after(self) -> float | None:
        return self.options.run_after.timestamp() if self.options.run_after else None


def _chosen(options: PredictOptions, input_format: str, model: ModelVersion) -> Options:
    passthrough = options.passthrough
    columns = options.columns
    return Options(
        format=options.format or _default_format(input_format, model),
        passthrough=tuple(passthrough) if isinstance(passthrough, list) else passthrough,
        columns=tuple(columns) if isinstance(columns, list) else columns,
        key=options.key,
        on_row_error=options.on_row_error,
        max_errors=options.max_errors,
        top_k=options.top_k,
    )


def _default_format(input_format: str, model: ModelVersion) -> str:
    """The input's, but for labels that are text: an npy array can not hold them."""
    gives_text = any(tensor.dtype == "string" for tensor in model.signature.outputs)
    return "csv" if input_format == "npy" and gives_text else input_format


def _input_of(job: Job) -> NewInput:
    return NewInput(
        job.id, job.input_key, job.input_bytes, job.input_sha256, job.input_format, job.dialect, job.input_filename
    )


def _names(model: ModelVersion) -> tuple[str, str]:
    return model.name, model.reference


def _enqueue_uploaded(service: Service, asked: _Request) -> None:
    with service.runtime.database.write() as connection:
        _enqueue(connection, asked, create=False)


def _enqueue(connection: Connection, asked: _Request, *, create: bool) -> None:
    """Queues the job (with `create`, a new one), or finishes it by an equal one."""
    options, job_id, now = asked.options, asked.input.job_id, time.time()
    if create:
        jobs.create(connection, asked.input, asked.model, now, asked.tenant)
    equal = jobs.find_equal(connection, asked.digest, asked.tenant) if options.reuse else None
    queued = jobs.enqueue_if_uploaded(
        connection,
        job_id,
        asked.model,
        asked.chosen,
        asked.digest,
        metadata=options.metadata,
        priority=options.priority,
        run_after=asked.run_after,
        now=now,
    )
    if not queued:
        _require_same(jobs.get(connection, job_id), asked)
    elif equal is not None:
        jobs.complete_as_equal_if_queued(connection, job_id, equal, now)
    if asked.key is not None:
        idempotency.remember(connection, asked.key, asked.content, job_id, 202, now, asked.caller.tenant)


def _require_same(job: Job, asked: _Request) -> None:
    again = "upload the input again to predict it anew"
    if job.request_digest is None or job.model is None:
        raise JobConflict(f"job {job.id} is {job.state} and was never queued: {again}")
    before = (job.request_digest, job.priority, job.run_after, job.metadata)
    if before != (asked.digest, asked.options.priority, asked.run_after, asked.options.metadata):
        raise JobConflict(f"job {job.id} is {job.state} for {job.model.reference} with other options: {again}")


async def _answer(service: Service, background: BackgroundTasks, job_id: str, wait: float) -> Response:
    headers = {}
    if wait:
        service.wake_worker()
        await wait_for(service, job_id, wait, finished)
        headers["preference-applied"] = f"wait={wait:g}"
    body = read_body(service, job_id)
    if body.state is JobState.QUEUED:
        # The row is the record of the work; the background task is only the wake-up.
        background.add_task(service.wake)
    return job_response(body, 200 if body.state.finished else 202, headers)
