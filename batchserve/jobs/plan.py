"""The chunks of a job: planned once, each committed once.

Writes of an attempt are idempotent: one is repeated when it is unknown whether its commit has happened.
"""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, case, delete, func, insert, select, update
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db.prepared import Prepared
from batchserve.db.tables import chunks, jobs
from batchserve.domain import Chunk, CommittedChunk, JobState, ScoredChunk
from batchserve.errors import LeaseLost, presentable
from batchserve.jobs.statements import changed, require_mine


def add_chunks_if_mine(
    connection: Connection, job_id: str, attempt: int, planned: Sequence[Chunk], complete: bool
) -> bool:
    """Appends to the plan. Ranges of stored chunks never change, so that a resumed job has the same chunks. False when
    they were stored before, and nothing has changed."""
    values = {
        "rows_planned": jobs.c.rows_planned + sum(chunk.records for chunk in planned),
        "chunks_total": jobs.c.chunks_total + len(planned),
        "planned": complete,
    }
    behind = [jobs.c.rows_planned == planned[0].first_record] if planned else []
    try:
        require_mine(connection, job_id, attempt, values, "plan", *behind)
    except LeaseLost:
        if planned and _is_mine(connection, job_id, attempt, jobs.c.rows_planned == _end(planned[-1])):
            return False
        raise
    ADD_CHUNKS.send(connection, *(chunk_values(job_id, chunk) for chunk in planned))
    return True


def last_chunk(connection: Connection, job_id: str) -> Chunk | None:
    query = select(chunks).where(chunks.c.job_id == job_id).order_by(chunks.c.first_record.desc()).limit(1)
    row = connection.execute(query).mappings().one_or_none()
    return rows.chunk(row) if row else None


def chunk_before(connection: Connection, job_id: str, first_record: int) -> Chunk | None:
    query = select(chunks).where(chunks.c.job_id == job_id, chunks.c.first_record < first_record)
    row = connection.execute(query.order_by(chunks.c.first_record.desc()).limit(1)).mappings().one_or_none()
    return rows.chunk(row) if row else None


def first_records(connection: Connection, job_id: str) -> dict[int, int]:
    """The number of the first planned record of each input."""
    query = select(chunks.c.input, func.min(chunks.c.first_record)).where(chunks.c.job_id == job_id)
    return {row[0]: row[1] for row in connection.execute(query.group_by(chunks.c.input))}


def pending_chunks(connection: Connection, job_id: str) -> list[Chunk]:
    """The planned chunks that no attempt has committed, in order."""
    query = select(chunks).where(chunks.c.job_id == job_id, chunks.c.attempt.is_(None))
    return [rows.chunk(row) for row in connection.execute(query.order_by(chunks.c.first_record)).mappings().all()]


def done_chunks(connection: Connection, job_id: str) -> list[CommittedChunk]:
    """The committed chunks in order."""
    query = select(chunks).where(chunks.c.job_id == job_id, chunks.c.attempt.is_not(None))
    done = connection.execute(query.order_by(chunks.c.first_record)).mappings().all()
    return [rows.committed_chunk(row) for row in done]


def commit_chunk_if_mine(
    connection: Connection, job_id: str, attempt: int, scored: ScoredChunk, progress: float
) -> None:
    """Commits a part, exactly once. Progress never decreases."""
    done = changed(
        connection,
        update(chunks)
        .where(*_of(job_id, scored.chunk), chunks.c.attempt.is_(None))
        .values(part_values(scored, attempt)),
    )
    if not done:
        same = (chunks.c[name] == value for name, value in part_values(scored, attempt).items() if name != "facts")
        if connection.scalar(select(chunks.c.attempt).where(*_of(job_id, scored.chunk), *same)) is not None:
            return
        raise _lost(job_id, scored.chunk)
    require_mine(
        connection,
        job_id,
        attempt,
        {
            "rows_ok": jobs.c.rows_ok + scored.chunk.records - scored.rows_failed,
            "rows_failed": jobs.c.rows_failed + scored.rows_failed,
            "chunks_done": jobs.c.chunks_done + 1,
            "crashes": 0,
            "progress": case((jobs.c.progress < progress, progress), else_=jobs.c.progress),
        },
        "commit a chunk of",
    )


def count_crash_if_mine(connection: Connection, job_id: str, attempt: int, first_record: int) -> int:
    """Counts a crash of the process that scored this chunk; returns how many there were."""
    require_mine(connection, job_id, attempt, {"worker": jobs.c.worker}, "count a crash of")
    crashes: int = connection.execute(
        update(chunks)
        .where(chunks.c.job_id == job_id, chunks.c.first_record == first_record)
        .values(crashes=chunks.c.crashes + 1)
        .returning(chunks.c.crashes)
    ).scalar_one()
    return crashes


def split_chunk_if_mine(connection: Connection, job_id: str, attempt: int, whole: Chunk, halves: list[Chunk]) -> None:
    """Replaces a crashed chunk by its halves, which keep its crash count."""
    guards = (*_of(job_id, whole), chunks.c.attempt.is_(None))
    crashes = connection.execute(delete(chunks).where(*guards).returning(chunks.c.crashes)).scalar_one_or_none()
    if crashes is None:
        if connection.scalar(select(chunks.c.records).where(*_of(job_id, halves[0]))) is not None:
            return
        raise _lost(job_id, whole)
    require_mine(connection, job_id, attempt, {"chunks_total": jobs.c.chunks_total + len(halves) - 1}, "split")
    connection.execute(insert(chunks), [{**chunk_values(job_id, half), "crashes": crashes} for half in halves])


def _of(job_id: str, chunk: Chunk) -> tuple[ColumnElement[bool], ...]:
    return chunks.c.job_id == job_id, chunks.c.first_record == chunk.first_record, chunks.c.records == chunk.records


def _is_mine(connection: Connection, job_id: str, attempt: int, guard: ColumnElement[bool]) -> bool:
    mine = (jobs.c.id == job_id, jobs.c.state == JobState.RUNNING, jobs.c.attempt == attempt)
    return connection.scalar(select(jobs.c.id).where(*mine, guard)) is not None


def _end(chunk: Chunk) -> int:
    return chunk.first_record + chunk.records


def _lost(job_id: str, chunk: Chunk) -> LeaseLost:
    return LeaseLost(f"chunk at record {chunk.first_record} of job {job_id} was committed by another attempt")


def chunk_values(job_id: str, chunk: Chunk) -> dict[str, Any]:
    return {
        "job_id": job_id,
        "first_record": chunk.first_record,
        "records": chunk.records,
        "start": chunk.start,
        "stop": chunk.stop,
        "input": chunk.input,
        "inputs": chunk.inputs,
    }


def part_values(scored: ScoredChunk, attempt: int) -> dict[str, Any]:
    return {
        "attempt": attempt,
        "part_bytes": scored.part_bytes,
        "part_sha256": scored.part_sha256,
        "rows_failed": scored.rows_failed,
        "errors_bytes": scored.errors_bytes,
        "facts": presentable(scored.facts),
    }


ADD_CHUNKS = Prepared(insert(chunks))
