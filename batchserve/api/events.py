"""Server-sent events about a job."""

import hashlib
from dataclasses import dataclass

from fastapi.sse import ServerSentEvent

from batchserve.api.schemas.jobs import JobBody, job_body
from batchserve.domain import Attempt, Job

__all__ = ["JobEvents", "job_events", "tag_of"]


@dataclass(frozen=True, slots=True)
class JobEvents:
    """A job in the form of both events, serialized once for all followers."""

    tag: str
    state: str
    finished: bool
    as_state: ServerSentEvent
    as_progress: ServerSentEvent


def job_events(job: Job, attempts: list[Attempt], queue_position: int | None, now: float) -> JobEvents:
    body = job_body(job, attempts, queue_position, now)
    tag, data = tag_of(body), body.model_dump_json()
    as_state, as_progress = (ServerSentEvent(raw_data=data, event=event, id=tag) for event in ("state", "progress"))
    return JobEvents(tag, body.state.value, body.state.finished, as_state, as_progress)


def tag_of(body: JobBody) -> str:
    """Changes with everything shown of the job but its speed, which always changes."""
    shown = body.model_dump_json(exclude={"rows_per_s", "eta_s"})
    return f"{body.state.value}-{hashlib.sha256(shown.encode()).hexdigest()[:16]}"
