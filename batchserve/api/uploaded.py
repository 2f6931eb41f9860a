"""POST /v1/predict?state=uploaded: all inputs that wait for a predict are queued at once."""

import time
from contextlib import suppress
from dataclasses import dataclass, field

from fastapi import Response
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency, scoring
from batchserve.api.deps import Service, replayed, resolve_model
from batchserve.api.queueing import Asked, enqueue, input_of
from batchserve.api.schemas import PredictOptions, QueuedBody, RefusedJob
from batchserve.api.turns import Lane, Place
from batchserve.domain import Caller, JobState
from batchserve.errors import BatchserveError, JobNotFound, OutOfMemory, ScoringCrashed, ScoringTimeout
from batchserve.jobs import queries

__all__ = ["predict_uploaded"]

_TOGETHER = 100
"""Jobs that are checked in one call and queued in one transaction: others get their turn in between."""


@dataclass(slots=True)
class _Outcome:
    states: dict[str, JobState] = field(default_factory=dict)
    refused: list[RefusedJob] = field(default_factory=list)

    def body(self) -> QueuedBody:
        completed = sum(state is JobState.COMPLETED for state in self.states.values())
        return QueuedBody(
            queued=len(self.states) - completed, completed=completed, refused=self.refused, jobs=list(self.states)
        )


async def predict_uploaded(service: Service, caller: Caller, options: PredictOptions, key: str | None) -> Response:
    """Queues all uploaded jobs that the caller sees, but for those that were uploaded for another model.

    A job that does not fit stays uploaded and is told. Each job is queued by the verb that queues one; a part of them
    in each transaction, so that after a crash a repeated call goes on with those that are left.
    """
    content = idempotency.fingerprint("predict-uploaded", options.model_dump_json())
    if (answer := await replayed(service, caller, key, content)) is not None:
        return answer
    model = resolve_model(service, options.model)

    def find() -> list[str]:
        with service.runtime.database.read() as connection:
            return queries.uploaded_for(connection, model.name, caller.tenant)

    def read(job_ids: list[str]) -> list[Asked]:
        with service.runtime.database.read() as connection:
            found = queries.get_several(connection, job_ids)
        return [Asked(job.tenant, input_of(job), model, options) for job in found]

    job_ids, outcome = await run_in_threadpool(find), _Outcome()
    for start in range(0, len(job_ids), _TOGETHER):
        if asked := await run_in_threadpool(read, job_ids[start : start + _TOGETHER]):
            problems = await _check(service, caller, asked)
            await run_in_threadpool(_enqueue_fitting, service, asked, problems, outcome)
            service.wake_worker()
    body = await run_in_threadpool(lambda: outcome.body().model_dump_json())  # of thousands of jobs, maybe

    def remember(key: str) -> None:
        with service.runtime.database.write() as connection:
            idempotency.remember(connection, key, content, None, 202, time.time(), caller.tenant, answer=body)

    if key is not None:
        await run_in_threadpool(remember, key)
    return Response(body, 202, media_type="application/json")


def _enqueue_fitting(
    service: Service, asked: list[Asked], problems: list[BatchserveError | None], outcome: _Outcome
) -> None:
    now = time.time()
    states: dict[str, JobState] = {}
    with service.runtime.database.write() as connection:
        for one, problem in zip(asked, problems, strict=True):
            with suppress(JobNotFound):  # deleted meanwhile
                if problem is None and (state := enqueue(connection, one, now)) is not None:
                    states[one.input.job_id] = state
    outcome.states |= states
    outcome.refused += [
        RefusedJob.of(one.input.job_id, problem)
        for one, problem in zip(asked, problems, strict=True)
        if problem is not None
    ]


async def _check(service: Service, caller: Caller, asked: list[Asked]) -> list[BatchserveError | None]:
    """What is wrong with each input. Raises InvalidOptions when the options suit none, Unavailable, TooManyRequests."""
    try:
        with service.long_calls.place(caller.tenant, Lane.LONG) as place:
            async with service.long_call(place):
                return await _call(service, place, asked)
    except (ScoringCrashed, ScoringTimeout, OutOfMemory) as error:
        if len(asked) == 1:
            return [error]
        return [problem for one in asked for problem in await _check(service, caller, [one])]


async def _call(service: Service, place: Place, asked: list[Asked]) -> list[BatchserveError | None]:
    settings = service.runtime.settings
    inputs = [
        (scoring.Input(settings.storage, one.input.key, one.input.format, one.input.dialect), one.chosen)
        for one in asked
    ]
    return await service.call(place, scoring.check_inputs, inputs, asked[0].model, seconds=settings.online_timeout)
