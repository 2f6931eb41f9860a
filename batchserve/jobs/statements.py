"""What several of these modules need: the selection of whole jobs, rows as dataclasses, and guards in a WHERE.

Building a statement costs more than running it: those of every job and every poll are built once, in each module.
Parameters with the name of a column are its new value.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Float, RowMapping, and_, bindparam, literal, or_, select, update
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db.tables import jobs, models
from batchserve.domain import Job, JobState
from batchserve.errors import LeaseLost, UnreadableRow
from batchserve.registry import model_columns, model_from_row
from batchserve.storage import input_key as input_key_of

ENDED = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)
_JOB_FIELDS = frozenset(Job.__dataclass_fields__) - {"model"}
JOBS = (
    select(*(column for column in jobs.c if column.name in _JOB_FIELDS), *model_columns)
    .select_from(jobs.outerjoin(models, jobs.c.model_id == models.c.id))
    .order_by(jobs.c.id.desc())
)
JOBS_OF = JOBS.where(jobs.c.id.in_(bindparam("job_ids", expanding=True)))


@dataclass(frozen=True, slots=True)
class Owned:
    """The bytes that a job leaves, as its row names them; `state`: before it was removed, or expired."""

    id: str
    state: str
    input_key: str
    result_key: str | None
    errors_key: str | None
    attempt: int
    """The last one. Each may have left a result."""


OWNED = select(*(jobs.c[name] for name in Owned.__dataclass_fields__))


def changed(connection: Connection, statement: Any, values: Mapping[str, Any] | None = None) -> bool:
    return bool(connection.execute(statement, values).rowcount)


def require_mine(
    connection: Connection,
    job_id: str,
    attempt: int,
    values: Mapping[str, Any],
    verb: str,
    *guards: ColumnElement[bool],
) -> None:
    mine = (jobs.c.id == job_id, jobs.c.state == JobState.RUNNING, jobs.c.attempt == attempt)
    if not changed(connection, update(jobs).where(*mine, *guards).values(**values)):
        raise LeaseLost(f"attempt {attempt} may not {verb} job {job_id}: it is not the job's attempt any more")


def due(now: Any) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return jobs.c.state == JobState.QUEUED, or_(jobs.c.run_after.is_(None), jobs.c.run_after <= now)


def outside(moment: ColumnElement[Any], before: float, after: float) -> ColumnElement[bool]:
    """Never when `before` is that of the epoch: then nothing is over, however it is dated."""
    early, late = literal(before, Float()), literal(after, Float())  # may be infinite, as no time in a row is
    return or_(moment < early, and_(moment > late, early > 0.0))


def job_from_row(row: RowMapping) -> Job:
    """Raises UnreadableRow. A job that has ended is shown without a model that cannot be read."""
    model = None
    if row["model_id"] is not None:
        try:
            model = model_from_row(row)
        except UnreadableRow:
            if row["state"] not in ENDED:
                raise
    return rows.job(row, model)


def readable(found: Sequence[RowMapping]) -> Iterator[Job]:
    """Of rows that are fetched already, as all are that may be refused: a cursor that is left in the middle would keep
    its connection at an old state of the database."""
    for row in found:
        with suppress(UnreadableRow):
            yield job_from_row(row)


def owned(row: RowMapping) -> Owned:
    """Of a row that may be damaged: keys that are none of ours are left to the sweep."""
    keys = {
        name: row[name] if isinstance(row[name], str) and row[name].startswith("results/") else None
        for name in ("result_key", "errors_key")
    }
    attempt = row["attempt"] if isinstance(row["attempt"], int) else 0
    return Owned(row["id"], str(row["state"]), input_key_of(row["id"]), **keys, attempt=attempt)
