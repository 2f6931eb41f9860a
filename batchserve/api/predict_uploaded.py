"""POST /v1/predict?state=uploaded: queues all uploaded inputs."""

from dataclasses import dataclass, field

from fastapi import Response
from starlette.concurrency import run_in_threadpool

from batchserve import idempotency
from batchserve.access import Caller
from batchserve.api.deps import replayed
from batchserve.api.schemas.jobs import QueuedBody, RefusedJob
from batchserve.domain import JobState
from batchserve.errors import BatchserveError
from batchserve.idempotency import KeyedRequest
from batchserve.jobs import contents, queries
from batchserve.options import PredictOptions
from batchserve.service import Service
from batchserve.submission import Submission, enqueue_all

__all__ = ["predict_uploaded"]

_TOGETHER = 100
"""Jobs checked in one call and queued in one transaction; other requests run in between."""


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

    A job that does not fit stays uploaded, and the response lists it. Jobs are queued in several transactions, so that
    after a crash a repeated call continues with the rest.
    """
    content = idempotency.fingerprint("predict-uploaded", options.model_dump_json())
    keyed = KeyedRequest(caller.tenant, key, content)
    if (answer := await replayed(service, keyed)) is not None:
        return answer
    model = await service.resolve_model(options.model)

    def find() -> list[str]:
        with service.runtime.database.read() as connection:
            return queries.uploaded_for(connection, model.name, caller.tenant)

    def read(job_ids: list[str]) -> list[Submission]:
        with service.runtime.database.read() as connection:
            found = queries.get_several(connection, job_ids)
            its_inputs = [tuple(contents.with_content(connection, one) for one in job.inputs) for job in found]
        return [
            options.submission(job.tenant, job.id, inputs, model) for job, inputs in zip(found, its_inputs, strict=True)
        ]

    job_ids, outcome = await run_in_threadpool(find), _Outcome()
    for start in range(0, len(job_ids), _TOGETHER):
        if submissions := await run_in_threadpool(read, job_ids[start : start + _TOGETHER]):
            problems = await service.check_all(caller.tenant, submissions)
            await run_in_threadpool(_enqueue_fitting, service, submissions, problems, outcome)
            service.wake_worker()
    body = await run_in_threadpool(lambda: outcome.body().model_dump_json())  # possibly of thousands of jobs

    def remember() -> None:
        with service.runtime.database.write() as connection:
            keyed.remember(connection, None, 202, service.runtime.database.moment(connection).wall, body)

    if key is not None:
        await run_in_threadpool(remember)
    return Response(body, 202, media_type="application/json")


def _enqueue_fitting(
    service: Service, submissions: list[Submission], problems: list[BatchserveError | None], outcome: _Outcome
) -> None:
    fitting = []
    for submission, problem in zip(submissions, problems, strict=True):
        if problem is None:
            fitting.append(submission)
        else:
            outcome.refused.append(RefusedJob.of(submission.job_id, problem))
    with service.runtime.database.write() as connection:
        states = enqueue_all(connection, fitting, service.runtime.database.moment(connection).wall)
    outcome.states |= states
