"""The objects that rows reference: a backup copies them, an inspection checks them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from sqlalchemy import RowMapping, and_, or_, select
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.db.connect import Database
from batchserve.db.tables import chunks, jobs, models
from batchserve.domain import UNREAD, JobState
from batchserve.jobs.statements import INPUT_COLUMNS, WITH_FIRST_INPUT, further_inputs
from batchserve.storage import errors_part_key, is_elsewhere, is_in_row, model_key, part_key

UNFINISHED = (JobState.QUEUED, JobState.RUNNING)
STOPPED = (JobState.FAILED, JobState.CANCELLED)
_PAGE = 500


@dataclass(frozen=True, slots=True)
class NamedObject:
    """An object that a row references; None for what the row does not specify. `mend`: the repair when it is missing or
    damaged."""

    key: str
    bytes: int | None
    sha256: str | None
    owner: str
    mend: str


NamingRow = tuple[list[NamedObject], Callable[[], list[NamedObject]]]
"""The objects that a row references, and a way to read them again."""


_GOING_ON = and_(
    jobs.c.reused_from.is_(None),
    or_(
        jobs.c.state.in_(UNFINISHED + STOPPED),
        and_(jobs.c.state == JobState.COMPLETED, jobs.c.rows_failed > 0, jobs.c.input_removed_at.is_(None)),
    ),
)
"""Jobs whose parts serve a resume, a retry or a partial result."""


def named_objects(database: Database) -> Iterator[tuple[str, str | None]]:
    """The key of every referenced object of the storage, once for each, with its SHA-256 where the row has it."""
    for named, _ in objects_by_row(database):
        yield from ((expected.key, expected.sha256) for expected in named if not is_in_row(expected.key))


def objects_by_row(database: Database) -> Iterator[NamingRow]:
    registered = select(models).where(models.c.deleted_at.is_(None)).order_by(models.c.id)
    with database.read() as connection:
        found = connection.execute(registered).mappings().all()
    for row in filter(partial(rows.is_readable, rows.model), found):
        again = partial(_ask_model, database, row["id"])
        yield _of_model(row), again
    for row, _ in _jobs(database, _GOING_ON):
        again = partial(_ask_parts, database, row["id"])
        yield again(), again
    for row, further in _jobs(database):
        yield _of_job(row, further), partial(_ask_job, database, row["id"])


WHOLE = select(jobs, *INPUT_COLUMNS).select_from(WITH_FIRST_INPUT)
"""Jobs with the first of their inputs."""


def _jobs(database: Database, *guards: ColumnElement[bool]) -> Iterator[tuple[RowMapping, Sequence[RowMapping]]]:
    """The readable ones with their further inputs, the newest first, in short transactions: a long one would keep
    SQLite from checkpointing its log."""
    query = WHOLE.where(*guards).order_by(jobs.c.id.desc()).limit(_PAGE)
    page: list[RowMapping] = []
    while not page or len(page) == _PAGE:
        with database.read() as connection:
            after = [jobs.c.id < page[-1]["id"]] if page else []
            page = list(connection.execute(query.where(*after)).mappings())
            further = further_inputs(connection, page)
        for row in page:
            its_further = further.get(row["id"], ())
            if rows.is_readable(partial(_read, further=its_further), row):
                yield row, its_further
        if not page:
            return


def _ask_model(database: Database, model_id: int) -> list[NamedObject]:
    query = select(models).where(models.c.id == model_id, models.c.deleted_at.is_(None))
    with database.read() as connection:
        return [named for row in connection.execute(query).mappings() for named in _of_model(row)]


def _ask_job(database: Database, job_id: str) -> list[NamedObject]:
    with database.read() as connection:
        found = connection.execute(WHOLE.where(jobs.c.id == job_id)).mappings().all()
        further = further_inputs(connection, found)
    return [named for row in found for named in _of_job(row, further.get(job_id, ()))]


def _ask_parts(database: Database, job_id: str) -> list[NamedObject]:
    """All parts of an unfinished or stopped job; of a completed one those that a retry of its failed records reuses.
    Jobs that share a result, or were done in one call, have none.
    """
    is_done = and_(chunks.c.job_id == jobs.c.id, chunks.c.attempt.is_not(None))
    query = select(chunks, jobs.c.state).join(jobs, is_done).where(jobs.c.id == job_id, _GOING_ON)
    with database.read() as connection:
        done = connection.execute(query.order_by(chunks.c.first_record)).mappings().all()
    readable = (row for row in done if rows.is_readable(rows.committed_chunk, row))
    return [named for row in readable for named in _of_chunk(row)]


def _of_model(row: RowMapping) -> list[NamedObject]:
    name, key = f"{row['name']}@{row['version']}", model_key(row["digest"])
    mend = f"remove the object if it is there, then: batchserve models add --name {row['name']} FILE"
    return [NamedObject(key, None, row["artifact_sha256"], f"model {name}", mend)]


def _of_chunk(row: RowMapping) -> list[NamedObject]:
    key = (row["job_id"], row["first_record"], row["attempt"])
    owner = f"job {row['job_id']}"
    mend = _job_mend(row["job_id"], row["state"])
    part = NamedObject(part_key(*key), row["part_bytes"], row["part_sha256"], owner, mend)
    if row["state"] == JobState.COMPLETED:
        return [] if row["rows_failed"] else [part]
    errors = NamedObject(errors_part_key(*key), row["errors_bytes"], None, owner, part.mend)
    return [part, errors] if row["errors_bytes"] else [part]


def _of_job(row: RowMapping, further: Sequence[RowMapping]) -> list[NamedObject]:
    state, owner, mend = row["state"], f"job {row['id']}", _job_mend(row["id"], row["state"])
    if state == JobState.EXPIRED:
        return []
    named = []
    if row["input_removed_at"] is None:
        named += [
            NamedObject(stored["input_key"], stored["input_bytes"], stored["input_sha256"], owner, mend)
            for stored in (row, *further)
            if stored["input_owned"] and not stored["input_key"].startswith(UNREAD)
        ]
    if state == JobState.COMPLETED and row["result_key"] is not None and not is_elsewhere(row["result_key"]):
        named.append(NamedObject(row["result_key"], row["result_bytes"], row["result_sha256"], owner, mend))
    if state == JobState.COMPLETED and row["errors_key"] is not None:
        named.append(NamedObject(row["errors_key"], row["errors_bytes"], None, owner, mend))
    return named


def _job_mend(job_id: str, state: str) -> str:
    first = f"batchserve jobs cancel {job_id}; " if state in UNFINISHED else ""
    return f"restore it from a backup, or: {first}batchserve jobs rm {job_id}, and predict the file again"


def _read(row: rows.Row, further: Sequence[rows.Row] = ()) -> object:
    return rows.job(row, None, further)
