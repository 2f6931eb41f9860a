"""Schedules: created, found, changed, paused and planned."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, RowMapping, delete, func, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.access import EVERY_TENANT
from batchserve.db.tables import schedules
from batchserve.errors import Conflict, InvalidOptions, ScheduleNotFound, UnreadableRow
from batchserve.recurring import Schedule

__all__ = [
    "MOST", "advance_if_unchanged", "create", "delete_one", "due", "find", "find_named", "get", "list_page",
    "next_moment", "number_of_run", "pause_if_active", "replace", "require_name", "resume_if_paused",
]  # fmt: skip

_TOLERANCE = 60.0
"""Seconds by which clocks are adjusted without notice."""
MOST = 1000
"""Schedules of a tenant."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_READ = [schedules.c[name] for name in Schedule.__dataclass_fields__]


def require_name(name: str) -> None:
    """Raises InvalidOptions."""
    if not _NAME.fullmatch(name):
        raise InvalidOptions(f"name: expected letters, digits, '.', '_' and '-' (at most 64), got {name[:100]!r}")
    if _ID.fullmatch(name.lower()):
        raise InvalidOptions(f"name: expected a name that does not look like an ID, got {name!r}")


def create(connection: Connection, schedule: Schedule) -> None:
    """Raises Conflict when its name is taken, or the tenant has as many as it may."""
    of_tenant = select(func.count()).select_from(schedules).where(schedules.c.tenant == schedule.tenant)
    if (connection.scalar(of_tenant) or 0) >= MOST:
        raise Conflict(f"the tenant {schedule.tenant} has {MOST} schedules, the most that it may have: delete one")
    with _unique(schedule.name):
        connection.execute(insert(schedules).values(_values(schedule)))


def replace(connection: Connection, schedule: Schedule) -> None:
    """Changes the definition of one that exists, and its next tick. Raises ScheduleNotFound and Conflict."""
    values = _values(schedule)
    with _unique(schedule.name):
        changed = connection.execute(update(schedules).where(schedules.c.id == values.pop("id")).values(values))
    if not changed.rowcount:
        raise ScheduleNotFound(f"no schedule {schedule.id!r}")


def get(connection: Connection, schedule_id: str) -> Schedule:
    """Raises ScheduleNotFound and UnreadableRow."""
    query = select(*_READ).where(schedules.c.id == schedule_id)
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        raise ScheduleNotFound(f"no schedule {schedule_id!r}")
    return rows.schedule(row)


def find(connection: Connection, reference: str, tenant: str, *, locked: bool = False) -> Schedule:
    """The schedule with this ID, or this name in the tenant. `locked`: until the transaction ends, nothing else changes
    it. Raises ScheduleNotFound, also for one of another tenant, UnreadableRow, and Conflict for a name that several
    tenants have, for a caller that sees all of them."""
    row = _find(connection, reference, tenant, locked=locked)
    if row is None:
        raise ScheduleNotFound(f"no schedule {reference[:100]!r}")
    return rows.schedule(row)


def find_named(connection: Connection, name: str, tenant: str) -> Schedule | None:
    """The schedule of exactly this tenant with this name. Raises UnreadableRow."""
    query = select(*_READ).where(schedules.c.tenant == tenant, schedules.c.name == name)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else rows.schedule(row)


def _find(connection: Connection, reference: str, tenant: str, *, locked: bool) -> RowMapping | None:
    if not reference.isascii() or "\0" in reference:
        return None
    is_it = schedules.c.id == reference if _ID.fullmatch(reference) else schedules.c.name == reference
    query = select(*_READ).where(is_it, *_guards(tenant))
    found = connection.execute(query.with_for_update() if locked else query).mappings().all()
    if len(found) > 1:
        having = ", ".join(f"{row['id']} of {row['tenant']}" for row in found[:10])
        raise Conflict(f"several tenants have a schedule {reference!r}: name it by its ID ({having})")
    return found[0] if found else None


def list_page(
    connection: Connection, tenant: str, *, after: str | None = None, limit: int = 50
) -> tuple[list[Schedule], str | None]:
    """The readable ones in the order of their creation, and the last ID if there are more. `after`: the last ID of the
    previous page."""
    beyond = [] if after is None else [schedules.c.id > after]
    query = select(*_READ).where(*_guards(tenant), *beyond).order_by(schedules.c.id).limit(limit + 1)
    found = connection.execute(query).mappings().all()
    return list(_readable(found[:limit])), found[limit - 1]["id"] if len(found) > limit else None


def pause_if_active(connection: Connection, schedule: Schedule, now: float) -> bool:
    active = (schedules.c.id == schedule.id, schedules.c.paused_at.is_(None))
    values = {"paused_at": now, "next_at": None, "planned_at": now, "changed_at": now}
    return connection.execute(update(schedules).where(*active).values(values)).rowcount > 0


def resume_if_paused(connection: Connection, schedule: Schedule, next_at: float | None, now: float) -> bool:
    """What was due in between is not caught up."""
    paused = (schedules.c.id == schedule.id, schedules.c.paused_at.is_not(None))
    values = {"paused_at": None, "next_at": next_at, "planned_at": now, "changed_at": now}
    return connection.execute(update(schedules).where(*paused).values(values)).rowcount > 0


def delete_one(connection: Connection, schedule: Schedule) -> None:
    """With its ticks; its jobs stay. Raises ScheduleNotFound when it was deleted meanwhile."""
    if not connection.execute(delete(schedules).where(schedules.c.id == schedule.id)).rowcount:
        raise ScheduleNotFound(f"no schedule {schedule.name!r}")


def number_of_run(connection: Connection, schedule: Schedule) -> int:
    """The number of a new run on request. Raises ScheduleNotFound when it was deleted meanwhile."""
    counted = update(schedules).where(schedules.c.id == schedule.id).values(runs=schedules.c.runs + 1)
    number = connection.scalar(counted.returning(schedules.c.runs))
    if number is None:
        raise ScheduleNotFound(f"no schedule {schedule.name!r}")
    return int(number)


# --- what the scheduler asks -----------------------------------------------------------------------------------------


def due(connection: Connection, now: float, most: int) -> list[Schedule]:
    """Active ones whose next tick has come, the oldest first. Also those that were planned at a later time: the clock
    was set back since, and their next tick may be years ahead."""
    has_come = or_(schedules.c.next_at <= now, schedules.c.planned_at > now + _TOLERANCE)
    query = select(*_READ).where(schedules.c.paused_at.is_(None), has_come).order_by(schedules.c.next_at).limit(most)
    return list(_readable(connection.execute(query).mappings().all()))


def advance_if_unchanged(connection: Connection, schedule: Schedule, next_at: float | None, now: float) -> bool:
    """Sets the next tick. False: it was changed, paused, deleted or planned by another process since it was read. Of
    two processes that plan it at the same time, the second waits for the first, and then finds it changed."""
    as_read = (
        schedules.c.id == schedule.id,
        _equals(schedules.c.next_at, schedule.next_at),
        schedules.c.planned_at == schedule.planned_at,
        schedules.c.changed_at == schedule.changed_at,
        schedules.c.paused_at.is_(None),
    )
    planned = update(schedules).where(*as_read).values(next_at=next_at, planned_at=now)
    return connection.execute(planned).rowcount > 0


def next_moment(connection: Connection) -> float | None:
    """When the next tick of all schedules comes."""
    found = connection.scalar(select(func.min(schedules.c.next_at)).where(schedules.c.paused_at.is_(None)))
    return float(found) if isinstance(found, int | float) else None  # a damaged row holds anything


def _equals(column: ColumnElement[Any], value: float | None) -> ColumnElement[bool]:
    return column.is_(None) if value is None else column == value


def _guards(tenant: str) -> list[ColumnElement[bool]]:
    return [] if tenant == EVERY_TENANT else [schedules.c.tenant == tenant]


def _readable(found: Sequence[RowMapping]) -> Iterator[Schedule]:
    for row in found:
        with suppress(UnreadableRow):
            yield rows.schedule(row)


def _values(schedule: Schedule) -> dict[str, Any]:
    return {name: getattr(schedule, name) for name in Schedule.__dataclass_fields__} | {
        "request": dict(schedule.request)
    }


@contextmanager
def _unique(name: str) -> Iterator[None]:
    """Raises Conflict for a name that is taken."""
    try:
        yield
    except IntegrityError as error:
        raise Conflict(f"a schedule {name!r} already exists: change it, or choose another name") from error
