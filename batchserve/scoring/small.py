"""A small job is planned, scored and assembled in one call."""

from dataclasses import dataclass

from batchserve.domain import ModelVersion, Options, Result, ScoredChunk
from batchserve.scoring.chunks import ChunkTask, score_into
from batchserve.scoring.faults import by_name
from batchserve.scoring.planning import Planned, PlanTask, plan_chunks
from batchserve.storage import errors_key, result_key


@dataclass(frozen=True, slots=True)
class Small:
    """A whole job done in one call: its single chunk, and its result."""

    planned: Planned
    scored: ScoredChunk
    result: Result


@by_name
def score_small(task: PlanTask, job_id: str, attempt: int, model: ModelVersion, options: Options) -> Planned | Small:
    """Plans, scores and assembles an input of one chunk in one call. Returns the plan alone when it has more chunks, or
    when row errors end the job: then its part is needed."""
    planned = plan_chunks(task)
    if not planned.complete or len(planned.chunks) != 1:
        return planned
    chunk_task = ChunkTask(task.input, job_id, attempt, planned.chunks[0], model, options)
    key, errors = result_key(job_id, attempt), errors_key(job_id, attempt)
    scored, stored = score_into(chunk_task, key, errors)
    limited = options.on_row_error == "fail" or options.max_errors is not None
    if scored.rows_failed and (limited or scored.rows_failed == scored.chunk.records):
        return planned
    listed = errors if scored.errors_bytes else None
    return Small(planned, scored, Result(key, stored.bytes, stored.sha256, listed, scored.errors_bytes))
