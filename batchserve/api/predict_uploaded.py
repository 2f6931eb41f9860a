"""POST /v1/predict?state=uploaded: queues all uploaded inputs."""

from functools import partial

from fastapi import Response
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency
from batchserve.access import Caller
from batchserve.api.deps import replayed
from batchserve.api.schemas.jobs import QueuedBody, RefusedJob
from batchserve.idempotency import KeyedRequest
from batchserve.options import PredictOptions
from batchserve.service import Service
from batchserve.uploaded import Collected, queue_uploaded

__all__ = ["predict_uploaded"]


async def predict_uploaded(service: Service, caller: Caller, options: PredictOptions, key: str | None) -> Response:
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
