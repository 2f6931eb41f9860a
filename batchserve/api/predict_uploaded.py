"""POST /v1/jobs/predict: queues all uploaded inputs."""

from functools import partial

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency
from batchserve.access import Caller
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import json_object
from batchserve.api.deps import PROBLEMS, IdempotencyKey, ServiceDep, bare_key, predict_options, replayed
from batchserve.api.predict import OPTION_PARAMETERS, OPTIONS_BODY
from batchserve.api.schemas.jobs import QueuedBody, RefusedJob
from batchserve.idempotency import KeyedRequest
from batchserve.options import PredictOptions
from batchserve.service import Service
from batchserve.uploaded import Collected, queue_uploaded

router = APIRouter(tags=["predict"])


@router.post(
    "/v1/jobs/predict", status_code=202, response_model=QueuedBody, operation_id="predict_uploaded",
    summary="Queue all uploaded inputs for a model", responses=PROBLEMS,
    openapi_extra={"parameters": OPTION_PARAMETERS, "requestBody": OPTIONS_BODY},
)  # fmt: skip
async def predict_uploaded(
    request: Request, service: ServiceDep, caller: CallerDep, idempotency_key: IdempotencyKey = None
) -> Response:
    """All jobs in the state `uploaded` are queued, but for those that were uploaded for another model. One that does
    not fit stays uploaded, and the response gives the reason."""
    given = {**request.query_params, **await json_object(request, service.runtime.settings)}
    options, key = predict_options(service, given), bare_key(idempotency_key)
    with service.only_one(caller.tenant, key):
        return await _predict_all(service, caller, options, key)


async def _predict_all(service: Service, caller: Caller, options: PredictOptions, key: str | None) -> Response:
    """Queues all uploaded jobs that the caller sees, but for those that were uploaded for another model.

    A job that does not fit stays uploaded, and the response lists it. Jobs are queued in several transactions, so that
    after a crash a repeated call continues with the rest.
    """
    content = idempotency.fingerprint("predict-uploaded", options.model_dump_json())
    keyed, database = KeyedRequest(caller.tenant, key, content), service.runtime.database
    if (answer := await replayed(service, keyed)) is not None:
        return answer
    model = await service.resolve_model(options.model)
    check = partial(service.check_all, caller.tenant)
    collected = await queue_uploaded(
        database, caller.tenant, model, options.submission, check, wake=service.wake_worker
    )
    body = await run_in_threadpool(lambda: _body(collected).model_dump_json())  # possibly of thousands of jobs

    def remember() -> None:
        with database.write() as connection:
            keyed.remember(connection, None, 202, database.moment(connection).wall, body)

    if key is not None:
        await run_in_threadpool(remember)
    return Response(body, 202, media_type="application/json")


def _body(collected: Collected) -> QueuedBody:
    return QueuedBody(
        queued=len(collected.states) - collected.completed,
        completed=collected.completed,
        refused=[RefusedJob.of(job_id, problem) for job_id, problem in collected.refused.items()],
        jobs=list(collected.states),
    )
