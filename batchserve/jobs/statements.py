"""Shared by these modules: the selection of complete jobs, rows as dataclasses, and guards in a WHERE.

Building a statement costs more than running it: the frequent ones are built once, in each module. Parameters with the
name of a column are its new value.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Float, RowMapping, and_, bindparam, literal, or_, select, update
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db.tables import inputs, jobs, models
from batchserve.domain import Job, JobState
from batchserve.errors import LeaseLost, UnreadableRow
from batchserve.registry import model_columns, model_from_row
from batchserve.storage import TARGETS, input_key, key_in_row, key_in_storage

ENDED = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)
INPUT_COLUMNS = tuple(
    inputs.c[name].label(f"input_{name}")
    for name in ("key", "bytes", "sha256", "format", "delimiter", "decimal", "filename", "owned", "version")
)
"""Columns of a job joined with its first input."""
WITH_FIRST_INPUT = jobs.outerjoin(inputs, and_(inputs.c.job_id == jobs.c.id, inputs.c.number == 0))
_OWNED = (
    "id", "tenant", "state", "result_key", "result_bytes", "errors_key", "errors_bytes", "attempt", "input_removed_at",
)  # fmt: skip
_UNREAD = ("model_id", "crashes", "lease_until", "lease_clock", "due_at")  # the model has an ID, too
JOBS = (
    select(*(column for column in jobs.c if column.name not in _UNREAD), *INPUT_COLUMNS, *model_columns)
    .select_from(WITH_FIRST_INPUT.outerjoin(models, jobs.c.model_id == models.c.id))
    .order_by(jobs.c.id.desc())
)
_FURTHER = (
    select(inputs.c.job_id, *INPUT_COLUMNS)
    .where(inputs.c.job_id.in_(bindparam("job_ids", expanding=True)), inputs.c.number > 0)
    .order_by(inputs.c.job_id, inputs.c.number)
)
JOBS_OF = JOBS.where(jobs.c.id.in_(bindparam("job_ids", expanding=True)))


@dataclass(frozen=True, slots=True)
class Owned:
    """The objects that a removed job referenced; `state`: before it was removed, or expired."""

    id: str
    tenant: str
    state: str
    inputs: tuple[str, ...]
    """The keys of its inputs that are not borrowed. Other jobs may reference them, too."""
    result_key: str | None
    errors_key: str | None
    attempt: int
    """Number of the last attempt. Each may have left a result."""
    sizes: Mapping[str, int]
    """The bytes of those of its inputs that were not removed before, and of its result with the errors list, by key."""


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
        raise LeaseLost(f"attempt {attempt} may not {verb} job {job_id}: it is not its current attempt")


def due(now: Any) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return jobs.c.state == JobState.QUEUED, or_(jobs.c.run_after.is_(None), jobs.c.run_after <= now)


def outside(moment: ColumnElement[Any], before: float, after: float) -> ColumnElement[bool]:
    """Never true when `before` is the epoch: then the retention is unlimited, whatever the date."""
    early, late = literal(before, Float()), literal(after, Float())  # may be infinite, unlike the times in rows
    return or_(moment < early, and_(moment > late, early > 0.0))


def job_from_row(row: rows.Row, further: Sequence[rows.Row] | None = None) -> Job:
    """`further`: its inputs after the first; None: it is read without them. Raises UnreadableRow. A job that has ended
    is shown without a model that cannot be read."""
    model = None
    if row["model_id"] is not None:
        try:
            model = model_from_row(row)
        except UnreadableRow:
            if row["state"] not in ENDED:
                raise
    return rows.job(row, model, further)


def readable(found: Sequence[rows.Row]) -> Iterator[Job]:
    """From fetched rows, because a row may be refused: an open cursor would keep its connection at an old snapshot of
    the database."""
    for row in found:
        with suppress(UnreadableRow):
            yield job_from_row(row)


def further_inputs(connection: Connection, found: Sequence[rows.Row]) -> dict[str, list[RowMapping]]:
    """The further inputs of each of these jobs. Few jobs have any; no statement is run for the others."""
    further: dict[str, list[RowMapping]] = {row["id"]: [] for row in found if row["inputs_total"] != 1}
    if further:
        for row in connection.execute(_FURTHER, {"job_ids": list(further)}).mappings().all():
            further[row["job_id"]].append(row)
    return further


def owned(connection: Connection, *guards: ColumnElement[bool]) -> list[Owned]:
    """From possibly damaged rows: results with foreign keys are left to the sweep, and the key of an upload is known.
    Locks the rows until this transaction ends, always in one order, to avoid deadlocks."""
    query = select(*(jobs.c[name] for name in _OWNED)).where(*guards)
    found = connection.execute(query.order_by(jobs.c.id).with_for_update()).mappings().all()
    keys: dict[str, list[str]] = {row["id"]: [] for row in found}
    sizes: dict[str, dict[str, int]] = {row["id"]: {} for row in found}
    kept = {row["id"] for row in found if row["input_removed_at"] is None and row["state"] != JobState.EXPIRED}
    its_inputs = select(inputs.c.job_id, inputs.c.key, inputs.c.bytes).where(inputs.c.job_id.in_(keys), inputs.c.owned)
    for job_id, key, size in connection.execute(its_inputs.order_by(inputs.c.job_id, inputs.c.number)).all():
        known = input_key(job_id)
        keys[job_id] += [key] if _is_under("inputs/", key) else [known, key_in_row(known)]
        if job_id in kept and isinstance(size, int):
            sizes[job_id][key] = size
    for row in found:
        if row["result_key"] is not None:
            is_here = not str(row["result_key"]).startswith(TARGETS)
            result = row["result_bytes"] if is_here else 0, row["errors_bytes"]
            sizes[row["id"]][row["result_key"]] = sum(size for size in result if isinstance(size, int))

    def named(row: RowMapping, name: str) -> str | None:
        return row[name] if _is_under("results/", row[name]) else None

    return [
        Owned(
            row["id"],
            str(row["tenant"]),
            str(row["state"]),
            tuple(keys[row["id"]]),
            named(row, "result_key"),
            named(row, "errors_key"),
            row["attempt"] if isinstance(row["attempt"], int) else 0,
            sizes[row["id"]],
        )
        for row in found
    ]


def _is_under(prefix: str, key: object) -> bool:
    return isinstance(key, str) and key_in_storage(key).startswith(prefix)
