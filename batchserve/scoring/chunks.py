"""One chunk is read, scored and written as a part."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from batchserve.domain import Chunk, ModelVersion, Options, ScoredChunk
from batchserve.formats import get_format
from batchserve.inference.answers import score
from batchserve.inference.matching import match_input, with_names
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input, header_of, storage_at
from batchserve.scoring.planning import moved
from batchserve.scoring.results import error_lines, result_of
from batchserve.scoring.sessions import keep_only, session_for
from batchserve.storage import errors_part_key, part_key


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


@dataclass(frozen=True, slots=True)
class Rows:
    """A scored chunk as it is written: its result rows, and its entries of the errors list."""

    content: bytes
    errors: bytes
    """Empty when no record failed."""
    failed: int
    facts: Mapping[str, Any]
    """See `facts.merge_facts`."""

    def scored(self, chunk: Chunk, sha256: str) -> ScoredChunk:
        """`sha256`: of the content."""
        return ScoredChunk(chunk, self.failed, len(self.content), sha256, len(self.errors), self.facts)


@by_name
def score_chunk(task: ChunkTask) -> ScoredChunk:
    """Reads a chunk, scores it, writes its part. One result row for each record, in order, or an error for all.

    A record that cannot be scored becomes a row of nulls and an entry in the part's errors.
    """
    rows, first = score_rows(task), task.chunk.first_record
    part = part_key(task.job_id, first, task.attempt)
    sha256 = store_rows(task.input.storage, rows, part, errors_part_key(task.job_id, first, task.attempt))
    return rows.scored(task.chunk, sha256)


def score_rows(task: ChunkTask) -> Rows:
    """Scores a chunk, and writes its rows into memory."""
    named = replace(task.input, dialect=with_names(task.input.dialect, task.model, task.options))
    match = match_input(header_of(named), task.model, task.options)
    chunk = moved(task.chunk, -task.base)
    with named.open() as source:
        reading, passed = match.read(named.reader, source, chunk)
    session = session_for(task.input.storage, task.model)
    scored = score(session, match, reading, chunk.records, partial(keep_only, session))
    format = get_format(task.options.format, task.input.dialect)
    content = format.write(result_of(format, scored, passed, match))
    keyed = passed if isinstance(passed, dict) else reading.records
    errors = error_lines(scored.errors, keyed, task.chunk.first_record, task.options.key) if scored.errors else b""
    facts = {"notes": list(match.notes), "model_seconds": scored.model_seconds}
    return Rows(content, errors, int(scored.failed.sum()), facts)


def store_rows(storage: str, rows: Rows, key: str, errors_key: str) -> str:
    """Stores rows under one key, and their errors, if there are any, under the other. Returns the SHA-256 of the
    rows."""
    store = storage_at(storage)
    with store.create(key) as writer:
        writer.write(rows.content)
        stored = writer.commit()
    if rows.errors:
        with store.create(errors_key) as writer:
            writer.write(rows.errors)
            writer.commit()
    return stored.sha256
