"""Lists of jobs: which, in which order, one page after the other.

The IDs of a page come from an index in the order of the list, and its jobs are read by them: a page among many jobs
costs what it does among few, and only a search for words reads each job. No index has several states or models in one
order: the beginnings of each are read, and merged.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from sqlalchemy import Connection, Select, String, Text, and_, cast, func, or_, select, tuple_, union_all
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.access import DEFAULT_TENANT, EVERY_TENANT
from batchserve.db.tables import inputs, jobs, models
from batchserve.domain import Job, JobState
from batchserve.errors import InvalidOptions
from batchserve.jobs.statements import JOBS_OF, WITH_FIRST_INPUT, readable
from batchserve.values import OF_IDS

__all__ = ["ALL_JOBS", "NEWEST", "JobFilter", "JobOrder", "SortKey", "count", "cursor_of", "list_page"]

_BLOCK = 500
"""Jobs that are read by one statement."""
_FEW_VERSIONS = 20
"""Versions of a model up to this number are read one by one; the jobs of more are picked from those of each state."""
_MOST_PARTS = 100
"""Beginnings that are merged; SQLite takes at most 500. A list of all tenants that has more reads all jobs."""


class SortKey(StrEnum):
    """By which time a list is sorted."""

    CREATED = "created"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class JobOrder:
    """By the time at which they finished, a list has only jobs that have finished."""

    by: SortKey = SortKey.CREATED
    ascending: bool = False


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs of a list are wanted. Times: seconds since the epoch; `since` is included, `until` is not."""

    states: tuple[JobState, ...] = ()
    """Any of these; all when there is none."""
    model: str | None = None
    """`name` or `name@version`."""
    search: str | None = None
    """Part of an ID, file name or metadata value."""
    since: float | None = None
    """Of the creation, as `until`."""
    until: float | None = None
    finished_since: float | None = None
    """Only in a list by the time at which jobs finished, as `finished_until`."""
    finished_until: float | None = None


NEWEST = JobOrder()
ALL_JOBS = JobFilter()

_Part = list[ColumnElement[bool]]
"""Conditions on the first columns of an index that has the rest in the order of the list."""


def list_page(
    connection: Connection,
    tenant: str = DEFAULT_TENANT,
    wanted: JobFilter = ALL_JOBS,
    order: JobOrder = NEWEST,
    *,
    after: str | None = None,
    limit: int = 50,
) -> list[Job]:
    """The next jobs of a list, without unreadable ones. `after`: the cursor of the last job of the previous page.
    Raises InvalidOptions for one that is of no such list."""
    place = None if after is None else _place(after, order)
    parts = _parts(connection, tenant, wanted, order)
    page: list[Job] = []
    while len(page) < limit and parts:
        most = min(limit - len(page), _BLOCK)
        found = connection.execute(_keys(connection, parts, wanted, order, place, most)).all()
        page += _read(connection, [row.id for row in found])
        if len(found) < most:
            break
        place = tuple(found[-1])
    return page


def count(
    connection: Connection, tenant: str = DEFAULT_TENANT, wanted: JobFilter = ALL_JOBS, order: JobOrder = NEWEST
) -> int:
    """The jobs of the whole list, unreadable ones included."""
    guards = _guards(connection, wanted, order, None)
    counted = [
        select(func.count().label("jobs")).select_from(_source(wanted)).where(*part, *guards)
        for part in _parts(connection, tenant, wanted, order)
    ]
    return sum(connection.scalars(union_all(*counted))) if counted else 0


def cursor_of(job: Job, order: JobOrder = NEWEST) -> str:
    """The place of a job in a list, which remains when the job is deleted: `after` of the page behind it."""
    return job.id if order.by is SortKey.CREATED else f"{job.finished_at!r}_{job.id}"


def _place(cursor: str, order: JobOrder) -> tuple[Any, ...]:
    """The values of the columns by which the list is sorted."""
    moment, separator, job_id = cursor.rpartition("_")
    if order.by is SortKey.CREATED:
        if not separator and OF_IDS.fullmatch(job_id):
            return (job_id,)
    elif (seconds := _number(moment)) is not None:
        return seconds, job_id
    raise InvalidOptions(f"after: expected `next` of a page of the same list, got {cursor!r}")


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read(connection: Connection, ids: Sequence[str]) -> list[Job]:
    """The readable ones of these jobs, in this order."""
    found = connection.execute(JOBS_OF, {"job_ids": ids}).mappings().all() if ids else []
    by_id = {job.id: job for job in readable(found)}
    return [by_id[id] for id in ids if id in by_id]


def _keys(
    connection: Connection,
    parts: Sequence[_Part],
    wanted: JobFilter,
    order: JobOrder,
    place: tuple[Any, ...] | None,
    limit: int,
) -> Select[Any]:
    """The columns of the order, of the first jobs behind a place."""
    columns, guards = _columns(order), _guards(connection, wanted, order, place)
    beginnings = [
        select(*columns)
        .select_from(_source(wanted))
        .where(*part, *guards)
        .order_by(*_sorted(columns, order))
        .limit(limit)
        for part in parts
    ]
    if len(beginnings) == 1:
        return beginnings[0]
    merged = union_all(*(select(*one.subquery().c) for one in beginnings)).subquery()
    return select(*merged.c).order_by(*_sorted(list(merged.c), order)).limit(limit)


def _parts(connection: Connection, tenant: str, wanted: JobFilter, order: JobOrder) -> list[_Part]:
    """Parts that have no job in common; none for an empty list."""
    states = list(dict.fromkeys(wanted.states))
    if order.by is SortKey.FINISHED:
        states = [state for state in states or JobState if state.finished]
    if order.by is SortKey.FINISHED and not states:
        return []
    parts: list[_Part] = [[jobs.c.state == state] for state in states] or [[]]
    if wanted.model is not None:
        versions = list(connection.scalars(_versions(wanted.model)))
        if not versions:
            return []
        if not states and len(versions) <= _FEW_VERSIONS:
            parts = [[jobs.c.model_id == version] for version in versions]
        else:
            # As a sum, which no index has: SQLite would take that of the versions, and sort all their jobs.
            of_model = (jobs.c.model_id + 0).in_(versions)
            parts = [[jobs.c.state == state, of_model] for state in states or JobState]
    if tenant != EVERY_TENANT:
        return [[jobs.c.tenant == tenant, *part] for part in parts]
    if parts == [[]]:
        return parts  # in the order of the primary key
    tenants = list(_tenants(connection))
    if len(tenants) * len(parts) > _MOST_PARTS:
        return [[or_(*(and_(*part) for part in parts))]]
    return [[jobs.c.tenant == one, *part] for one in tenants for part in parts]


def _versions(reference: str) -> Select[Any]:
    """The row IDs of `name` or `name@version`, deleted versions included."""
    name, _, version = reference.partition("@")
    found = select(models.c.id).where(models.c.name == name)
    return found.where(cast(models.c.version, String) == version) if version else found


def _tenants(connection: Connection) -> Iterator[str]:
    """The tenants with jobs, by a look-up in an index for each; too many are not counted."""
    last: str | None = ""
    for _ in range(_MOST_PARTS + 1):
        last = connection.scalar(select(func.min(jobs.c.tenant)).where(jobs.c.tenant > last))
        if last is None:
            return
        yield last


def _source(wanted: JobFilter) -> Any:
    return WITH_FIRST_INPUT if wanted.search else jobs


def _guards(
    connection: Connection, wanted: JobFilter, order: JobOrder, place: tuple[Any, ...] | None
) -> list[ColumnElement[bool]]:
    """What the jobs of each part must be besides, behind a place. Of each column there is one bound in each direction:
    SQLite would begin its search at any of several."""
    ids = _of_created(wanted, order, place if order.by is SortKey.CREATED else None)
    times = [] if order.by is SortKey.CREATED else _of_finished(wanted, order, place)
    return [*ids, *times, *([_contains(connection, wanted.search)] if wanted.search else [])]


def _of_created(wanted: JobFilter, order: JobOrder, place: tuple[Any, ...] | None) -> list[ColumnElement[bool]]:
    """IDs begin with the time of the creation."""
    lowest = "" if wanted.since is None else _first_id(wanted.since)
    ends = [] if wanted.until is None else [_first_id(wanted.until)]
    guards: list[ColumnElement[bool]] = []
    if place is not None and not order.ascending:
        ends.append(place[0])
    if place is not None and order.ascending and place[0] >= lowest:
        guards.append(jobs.c.id > place[0])
    elif lowest:
        guards.append(jobs.c.id >= lowest)
    return [*guards, *([jobs.c.id < min(ends)] if ends else [])]


def _of_finished(wanted: JobFilter, order: JobOrder, place: tuple[Any, ...] | None) -> list[ColumnElement[bool]]:
    """A damaged time would be before or behind all others."""
    moment, key = jobs.c.finished_at, tuple_(jobs.c.finished_at, jobs.c.id)
    since = rows.EARLIEST if wanted.finished_since is None else max(rows.EARLIEST, wanted.finished_since)
    until = rows.LATEST if wanted.finished_until is None else min(rows.LATEST, wanted.finished_until)
    if place is None:
        return [moment >= since, moment < until]
    if order.ascending:
        return [key > place if place[0] >= since else moment >= since, moment < until]
    return [moment >= since, key < place if place[0] < until else moment < until]


def _contains(connection: Connection, search: str) -> ColumnElement[bool]:
    """Whether a job has this text, in upper or lower case."""
    texts: list[ColumnElement[Any]] = [inputs.c.filename, cast(jobs.c.metadata, Text)]
    if OF_IDS.fullmatch(search):
        texts.append(jobs.c.id)
    if connection.dialect.name == "sqlite":  # whose LIKE takes no notice of the case
        return or_(*(text.contains(search, autoescape=True) for text in texts))
    return or_(*(text.icontains(search, autoescape=True) for text in texts))


def _columns(order: JobOrder) -> list[ColumnElement[Any]]:
    return [jobs.c.id] if order.by is SortKey.CREATED else [jobs.c.finished_at, jobs.c.id]


def _sorted(columns: Sequence[ColumnElement[Any]], order: JobOrder) -> list[ColumnElement[Any]]:
    return [column.asc() if order.ascending else column.desc() for column in columns]


def _first_id(since: float) -> str:
    """The smallest ID of that time (RFC 9562, 5.7): its milliseconds in 48 bits."""
    milliseconds = int(since * 1000 + 0.001)  # as the float of a whole number of them may be just below it
    digits = f"{min(max(0, milliseconds), 2**48 - 1):012x}"
    return f"{digits[:8]}-{digits[8:]}"
