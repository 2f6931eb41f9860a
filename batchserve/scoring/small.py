"""A small job is planned, scored and assembled in one call."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from batchserve.domain import ModelVersion, Options, Result, ScoredChunk
from batchserve.scoring.chunks import ChunkTask, Rows, score_rows, store_rows
from batchserve.scoring.faults import by_name
from batchserve.scoring.planning import Planned, PlanTask, plan_chunks
from batchserve.storage import errors_key, key_in_row, result_key


@dataclass(frozen=True, slots=True)
class SmallTask:
    plan: PlanTask
    job_id: str
    attempt: int
    model: ModelVersion
    options: Options
    inline_bytes: int
    """Bytes up to which the result comes back instead of being stored."""
    is_stored: bool = True
    """Whether a larger result is stored. Otherwise only the plan comes back."""


@dataclass(frozen=True)  # without slots: see `Chunk`
class Small:
    """A whole job done in one call: its single chunk, and its result."""

    planned: Planned
    scored: ScoredChunk
    result: Result
    contents: Mapping[str, bytes]
    """Of the result, where its keys are of rows in the database: to be added in the transaction of its end."""


@by_name
def score_small(task: SmallTask) -> Planned | Small:
    """Plans, scores and assembles an input of one chunk in one call. Returns the plan alone when it has more chunks, or
    when row errors end the job: then its part is needed."""
    planned = plan_chunks(task.plan)
    if not planned.complete or len(planned.chunks) != 1:
        return planned
    source, first = task.plan.input, task.plan.input if task.options.input_file else None
    rows = score_rows(
        ChunkTask(source, task.job_id, task.attempt, planned.chunks[0], task.model, task.options, first=first)
    )
    return ended(task, planned, rows)


def ended(task: SmallTask, planned: Planned, rows: Rows) -> Planned | Small:
    """The whole job by the rows of its single chunk; the plan alone where `score_small` returns it."""
    (chunk,), options = planned.chunks, task.options
    limited = options.on_row_error == "fail" or options.max_errors is not None
    if rows.failed and (limited or rows.failed == chunk.records):
        return planned
    key, errors = result_key(task.job_id, task.attempt), errors_key(task.job_id, task.attempt)
    contents = {}
    is_inline = len(rows.content) + len(rows.errors) <= task.inline_bytes
    if not is_inline and not task.is_stored:
        return planned
    if is_inline:
        key, errors = key_in_row(key), key_in_row(errors)
        contents = {key: rows.content} | ({errors: rows.errors} if rows.errors else {})
        sha256 = hashlib.sha256(rows.content).hexdigest()
    else:
        sha256 = store_rows(task.plan.input.storage, rows, key, errors)
    result = Result(key, len(rows.content), sha256, errors if rows.errors else None, len(rows.errors))
    return Small(planned, rows.scored(chunk, sha256), result, contents)
