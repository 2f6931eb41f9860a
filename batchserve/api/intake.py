"""POST /v1/jobs: a job over inputs that are read where they are."""

from typing import Annotated

from fastapi import APIRouter, BackgroundTasks, Query, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency
from batchserve.access import Caller
from batchserve.api import examples
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import json_object
from batchserve.api.deps import (
    PROBLEMS,
    IdempotencyKey,
    OwnJob,
    ServiceDep,
    bare_key,
    parsed,
    preferred_wait,
    replayed,
)
from batchserve.api.predict import FINISHED, Prefer, answered
from batchserve.api.schemas.inputs import InputList, input_list
from batchserve.api.schemas.jobs import JobBody
from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.idempotency import KeyedRequest
from batchserve.intake import JobRequest, Prepared, prepare
from batchserve.jobs import queries
from batchserve.quotas.account import added_by, charge_if_limited
from batchserve.service import JobSnapshot, Service
from batchserve.submission import create

router = APIRouter(tags=["jobs"])

_REFERENCE = "#/components/schemas/{model}"
_schema = JobRequest.model_json_schema(ref_template=_REFERENCE)
SCHEMAS = {**_schema.pop("$defs"), "JobRequest": _schema}
"""Of the request, for the components of the document."""
_BODY = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {"$ref": _REFERENCE.format(model="JobRequest")},
            "example": examples.JOB_REQUEST,
        }
    },
}


@router.post(
    "/v1/jobs", status_code=202, response_model=JobBody, operation_id="create_job",
    summary="Queue a job over inputs that are read in place", responses={**FINISHED, **PROBLEMS},
    openapi_extra={"requestBody": _BODY},
)  # fmt: skip
async def create_job(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    background: BackgroundTasks,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,  # noqa: ARG001 - `preferred_wait` reads it
) -> Response:
    """The inputs are files of the server, or objects, within prefixes that an administrator allows. They are found now,
    each in its version, and read when the job runs; nothing is copied. The beginning of the first is checked now; all
    others are compared with it before anything is scored.
    """
    given = parsed(JobRequest, await json_object(request, service.runtime.settings))
    key = bare_key(idempotency_key)
    keyed = KeyedRequest(caller.tenant, key, idempotency.fingerprint("job", given.model_dump_json()))
    with service.only_one(caller.tenant, key):
        if (answer := await replayed(service, keyed)) is not None:
            return answer
        prepared = await _prepared(service, caller, given)

        def commit(connection: Connection) -> JobSnapshot:
            now = service.runtime.database.moment(connection).wall
            create(connection, prepared.submission, now, keyed)
            view = service.snapshot(connection, prepared.submission.job_id)
            charge_if_limited(service.limits, connection, caller.home, added_by(view.job, now), now)
            return view

        is_limited = await service.limits.of(caller.home) is not None
        view = await service.runtime.database.commit(commit, alone=is_limited)
        return await answered(request, service, background, view, None, preferred_wait(request))


async def _prepared(service: Service, caller: Caller, given: JobRequest) -> Prepared:
    settings, database = service.runtime.settings, service.runtime.database
    model = await service.resolve_model(given.model)
    now = await database.fetch(lambda connection: database.moment(connection).wall)
    prepared = await run_in_threadpool(prepare, settings, caller.home, model, given, now)
    try:
        await service.check(caller.tenant, prepared.checked)
    except (SchemaMismatch, InvalidInput) as error:
        raise type(error)(f"{prepared.first}: {error.detail}", errors=error.errors) from error
    return prepared


@router.head("/v1/jobs/{job_id}/inputs", include_in_schema=False)
@router.get(
    "/v1/jobs/{job_id}/inputs", response_model=InputList, responses=PROBLEMS,
    operation_id="list_inputs", summary="List the inputs of a job",
)  # fmt: skip
async def list_inputs(
    job_id: OwnJob,
    service: ServiceDep,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[int | None, Query(ge=0, le=2**31 - 1, description="`next` of the page before.")] = None,
) -> InputList:
    """In the order of their records in the result."""
    first = 0 if after is None else after + 1
    job, found = await service.runtime.database.fetch(
        lambda connection: (queries.get(connection, job_id), queries.inputs_of(connection, job_id, first, limit + 1))
    )
    return input_list(job, found, limit)
