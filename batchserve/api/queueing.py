"""What is asked of an input, and how its job enters the queue."""

import hashlib
from dataclasses import dataclass

import orjson
from pydantic import TypeAdapter
from sqlalchemy import Connection

from batchserve.api.schemas import PredictOptions
from batchserve.api.upload import default_format
from batchserve.domain import Job, JobState, ModelVersion, Options
from batchserve.jobs import queries, requests
from batchserve.jobs.requests import NewInput

__all__ = ["Asked", "enqueue", "input_of"]

_options = TypeAdapter(Options)


@dataclass(frozen=True, slots=True)
class Asked:
    """One prediction: of which input, by which model, how, and for whom."""

    tenant: str
    """Of the job, for an administrator of all."""
    input: NewInput
    model: ModelVersion
    options: PredictOptions

    @property
    def chosen(self) -> Options:
        """The options as the job keeps them."""
        options, passthrough, columns = self.options, self.options.passthrough, self.options.columns
        return Options(
            format=options.format or default_format(self.input.format, self.model),
            passthrough=tuple(passthrough) if isinstance(passthrough, list) else passthrough,
            columns=tuple(columns) if isinstance(columns, list) else columns,
            key=options.key,
            on_row_error=options.on_row_error,
            max_errors=options.max_errors,
            top_k=options.top_k,
            inputs=options.inputs,
        )

    @property
    def digest(self) -> str:
        """Equal for equal input bytes, read in the same way, model and options: such jobs have equal results."""
        read_as = [self.input.sha256, self.input.format, self.input.dialect.delimiter]
        what = [read_as, self.model.digest, _options.dump_python(self.chosen, mode="json")]
        return hashlib.sha256(orjson.dumps(what)).hexdigest()

    @property
    def run_after(self) -> float | None:
        return self.options.run_after.timestamp() if self.options.run_after else None


def input_of(job: Job) -> NewInput:
    return NewInput(
        job.id, job.input_key, job.input_bytes, job.input_sha256, job.input_format, job.dialect, job.input_filename
    )


def enqueue(connection: Connection, asked: Asked, now: float) -> JobState | None:
    """Queues an uploaded job, or completes it by an equal one; gives its state. None: it is not `uploaded` any more.

    Raises ModelNotFound when the model was deleted meanwhile.
    """
    options, job_id, digest = asked.options, asked.input.job_id, asked.digest
    equal = queries.find_equal(connection, digest, asked.tenant) if options.reuse else None
    queued = requests.enqueue_if_uploaded(
        connection,
        job_id,
        asked.model,
        asked.chosen,
        digest,
        metadata=options.metadata,
        priority=options.priority,
        run_after=asked.run_after,
        now=now,
    )
    if not queued:
        return None
    if equal is not None and requests.complete_as_equal_if_queued(connection, job_id, equal, now):
        return JobState.COMPLETED
    return JobState.QUEUED
