"""One chunk is read, scored and written as a part."""

from dataclasses import dataclass, replace
from functools import partial

from batchserve.domain import Chunk, ModelVersion, Options, ScoredChunk
from batchserve.formats import get_format
from batchserve.inference.answers import score
from batchserve.inference.matching import match_input, with_names
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input, header_of, storage_at
from batchserve.scoring.planning import moved
from batchserve.scoring.results import error_lines, result_of
from batchserve.scoring.sessions import keep_only, session_for
from batchserve.storage import Stored, errors_part_key, part_key


@dataclass(frozen=True, slots=True)
class ChunkTask:
    input: Input
    job_id: str
    attempt: int
    chunk: Chunk
    model: ModelVersion
    options: Options
    base: int = 0
    """Records in the job's previous inputs. A format counts only within its input."""


def warm_up() -> None:
    """Imports what scoring needs, so that the first chunk does not wait for it."""


@by_name
def score_chunk(task: ChunkTask) -> ScoredChunk:
    """Reads a chunk, scores it, writes its part. One result row for each record, in order, or an error for all.

    A record that cannot be scored becomes a row of nulls and an entry in the part's errors.
    """
    part = part_key(task.job_id, task.chunk.first_record, task.attempt)
    return score_into(task, part, errors_part_key(task.job_id, task.chunk.first_record, task.attempt))[0]


def score_into(task: ChunkTask, key: str, errors_key: str) -> tuple[ScoredChunk, Stored]:
    """Scores a chunk and writes its rows under one key, and its errors, if there are any, under the other."""
    store = storage_at(task.input.storage)
    named = replace(task.input, dialect=with_names(task.input.dialect, task.model, task.options))
    match = match_input(header_of(named), task.model, task.options)
    chunk = moved(task.chunk, -task.base)
    with store.open(named.key) as source:
        reading, passed = match.read(named.reader, source, chunk)
    session = session_for(task.input.storage, task.model)
    scored = score(session, match, reading, chunk.records, partial(keep_only, session))
    result_format = get_format(task.options.format, task.input.dialect)
    result = result_of(result_format, scored, passed, match)
    with store.create(key) as writer:
        writer.write(result_format.write(result))
        stored = writer.commit()
    errors_bytes = 0
    if scored.errors:
        with store.create(errors_key) as writer:
            keyed = passed if isinstance(passed, dict) else reading.records
            writer.write(error_lines(scored.errors, keyed, task.chunk.first_record, task.options.key))
            errors_bytes = writer.commit().bytes
    done = ScoredChunk(
        chunk=task.chunk,
        rows_failed=int(scored.failed.sum()),
        part_bytes=stored.bytes,
        part_sha256=stored.sha256,
        errors_bytes=errors_bytes,
        facts={"notes": list(match.notes), "model_seconds": scored.model_seconds},
    )
    return done, stored
