"""What tenants with a quota use: their jobs are counted, their bytes and rows kept in an account.

A transaction that adds something charges it as its last step: it locks the account of the tenant, and is undone when a
limit is exceeded. So the limits are exact however many clients and processes there are, and no transaction waits for
anything else while it holds the lock. What removes bytes gives them back in its own transaction.

A tenant without a quota has no account, and nothing is charged. When a process reads that there is one, transactions
of others may still be on their way that do not know of it: the bytes and rows of a new account are counted anew from
the rows of jobs until all of those have ended, and kept from then on.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, and_, bindparam, case, func, insert, select, union_all, update
from sqlalchemy.sql import ColumnElement

from batchserve.access import EVERY_TENANT, Quota
from batchserve.db.connect import lock
from batchserve.db.prepared import Prepared
from batchserve.db.tables import accounts, direct_uploads, inputs, jobs
from batchserve.domain import Job, JobState, Result
from batchserve.errors import QuotaExceeded, StorageQuotaExceeded
from batchserve.quotas import limits
from batchserve.quotas.limits import Limits
from batchserve.storage import TARGETS, is_elsewhere

__all__ = [
    "SETTLES", "Added", "Usage", "added_by", "charge", "charge_if_limited", "count_bytes", "differing", "give_back",
    "locked", "recount", "require_room", "stored_bytes", "usage_of", "usages",
]  # fmt: skip

SETTLES = 120.0
"""Seconds after which a new account is kept: no transaction is on its way for so long."""
_DAY = 86400.0
_BEYOND = 1000
"""Most jobs beyond a limit that are counted."""
_RETRY_JOBS, _RETRY_BYTES = 5, 60
"""Seconds after which a refused request may be sent again: jobs end, and bytes are removed."""


@dataclass(frozen=True, slots=True)
class Added:
    """What a transaction adds for a tenant."""

    bytes: int = 0
    rows: int = 0
    again: int = 0
    """Rows of another job that are scored again."""
    queues: bool = False
    """Whether it queues a job."""


_NOTHING = Added()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a tenant uses, and its quota, if it has one."""

    tenant: str
    quota: Quota | None
    jobs: int
    bytes: int
    rows: int
    """Of this day."""
    day_ends: float
    """Seconds since the epoch."""


def added_by(job: Job, now: float, stored: int = 0) -> Added:
    """What a transaction at this time has added with a job, besides the `stored` bytes of its input. Nothing, if it has
    found the job as it is."""
    is_scored = job.state is JobState.COMPLETED and job.finished_at == now and job.reused_from is None
    if job.result is None or not is_scored:
        return Added(stored, queues=job.state is JobState.QUEUED and job.queued_at == now)
    return Added(stored + stored_bytes(job.result), job.rows_planned)


def stored_bytes(result: Result) -> int:
    """Of a result and its errors list; not of a result that is written elsewhere."""
    return result.errors_bytes + (0 if is_elsewhere(result.key) else result.bytes)


def charge_if_limited(known: Limits, connection: Connection, tenant: str, added: Added, now: float) -> None:
    """As `charge`, for a tenant with a quota. The last step of the transaction."""
    if added != _NOTHING and known.of_in(connection, tenant) is not None:
        charge(connection, tenant, added, now)


def charge(connection: Connection, tenant: str, added: Added, now: float, *, is_enforced: bool = True) -> None:
    """Adds to the account of a tenant what this transaction has added. The last step of the transaction.

    Raises QuotaExceeded and StorageQuotaExceeded, unless the limits are not enforced.
    """
    found = _opened(connection, tenant, now)
    if found is None:
        return
    quota, row = found
    kept = _kept(row, now)
    if kept is None:  # what is counted includes what was added
        stored, rows = count_bytes(connection, tenant), _count_rows(connection, tenant, now) + added.again
    else:
        stored, rows = kept[0] + added.bytes, kept[1] + added.rows + added.again
    if is_enforced:
        most = 0 if quota.jobs is None or not added.queues else quota.jobs + _BEYOND
        count = _count_jobs(connection, tenant, most) if most else 0
        used = count - added.queues, stored - added.bytes, rows - added.rows - added.again
        _require_within(quota, tenant, added, used, now)
    if kept is not None or abs(now - row["since"]) >= SETTLES:
        _UPDATE.send(connection, {"its_tenant": tenant, "bytes": stored, "day": _day(now), "day_rows": rows})


def require_room(connection: Connection, tenant: str, added: Added, now: float) -> None:
    """Raises as `charge` would, for what is about to be added; without a lock, so that it may be too late."""
    quota = limits.find_for(connection, tenant)
    if quota is not None:
        use = _usage(connection, tenant, quota, now)
        _require_within(quota, tenant, added, (use.jobs, use.bytes, use.rows), now)


def locked(connection: Connection, tenants: Collection[str]) -> set[str]:
    """Those of these tenants that have an account, which is locked until this transaction ends."""
    query = select(accounts.c.tenant).where(accounts.c.tenant.in_(tenants)).order_by(accounts.c.tenant)
    return set(connection.scalars(query.with_for_update()))


def give_back(connection: Connection, freed: Mapping[str, int]) -> None:
    """Subtracts bytes that are no longer stored from the accounts of tenants, which are `locked`."""
    for tenant, count in freed.items():
        if count:
            connection.execute(
                update(accounts).where(accounts.c.tenant == tenant).values(bytes=accounts.c.bytes - count)
            )


def recount(connection: Connection, tenant: str) -> int | None:
    """Counts the bytes of an account anew, and returns them. None: there is no account."""
    if not locked(connection, [tenant]):
        return None
    stored = count_bytes(connection, tenant)
    kept = and_(accounts.c.tenant == tenant, accounts.c.bytes.is_not(None))
    connection.execute(update(accounts).where(kept).values(bytes=stored))
    return stored


# --- what is used ----------------------------------------------------------------------------------------------------


def usage_of(connection: Connection, tenant: str, now: float) -> Usage:
    return _usage(connection, tenant, limits.find_for(connection, tenant), now)


def usages(connection: Connection, now: float) -> list[Usage]:
    """Of each tenant that has a quota of its own, or has used something under that of `EVERY_TENANT`."""
    quotas = {quota.tenant: quota for quota in limits.list_all(connection)}
    tenants = (set(connection.scalars(select(accounts.c.tenant))) | set(quotas)) - {EVERY_TENANT}
    return [
        _usage(connection, tenant, quotas.get(tenant) or quotas.get(EVERY_TENANT), now) for tenant in sorted(tenants)
    ]


def differing(connection: Connection) -> list[tuple[str, int, int]]:
    """The accounts that differ from what is stored: tenant, bytes of the account, and bytes that are stored. In one
    snapshot, both are of the same moment."""
    found = connection.execute(select(accounts.c.tenant, accounts.c.bytes).order_by(accounts.c.tenant)).all()
    counted = [(tenant, kept, count_bytes(connection, tenant)) for tenant, kept in found if kept is not None]
    return [(tenant, kept, stored) for tenant, kept, stored in counted if kept != stored]


def count_bytes(connection: Connection, tenant: str) -> int:
    """The bytes of a tenant that are stored, each object once: inputs that are not borrowed, results with their errors
    lists, and what it has announced to send to the object store itself."""
    return int(_BYTES.scalar(connection, {"its_tenant": tenant}) or 0)


def _usage(connection: Connection, tenant: str, quota: Quota | None, now: float) -> Usage:
    row = _ACCOUNT.row(connection, {"its_tenant": tenant})
    kept = None if row is None else _kept(row, now)
    if kept is None:
        kept = count_bytes(connection, tenant), _count_rows(connection, tenant, now)
    return Usage(tenant, quota, _count_jobs(connection, tenant, _ALL_JOBS), *kept, _DAY * (_day(now) + 1))


def _count_jobs(connection: Connection, tenant: str, most: int) -> int:
    return int(_JOBS.scalar(connection, {"its_tenant": tenant, "most": most}))


def _count_rows(connection: Connection, tenant: str, now: float) -> int:
    """The rows that the jobs of a tenant that are still known, and began today, have planned."""
    return int(_ROWS.scalar(connection, {"its_tenant": tenant, "midnight": _DAY * _day(now)}) or 0)


def _day(now: float) -> int:
    return int(now // _DAY)


# --- the account -----------------------------------------------------------------------------------------------------


def _opened(connection: Connection, tenant: str, now: float) -> tuple[Quota, Mapping[Any, Any]] | None:
    """The quota and the account of a tenant, locked, and made if there is none. None without a quota."""
    quota = limits.find_for(connection, tenant)
    if quota is None:
        return None
    row = _LOCK.row(connection, {"its_tenant": tenant})
    if row is not None:
        return quota, row
    lock(connection, "quotas")  # rare: only then may another transaction be the first one, or remove the quota
    quota = limits.find_for(connection, tenant)
    if quota is None:
        return None
    row = _LOCK.row(connection, {"its_tenant": tenant})
    if row is None:
        row = {"tenant": tenant, "since": now, "bytes": None, "day": _day(now), "day_rows": None}
        connection.execute(insert(accounts).values(row))
    return quota, row


def _kept(row: Mapping[Any, Any], now: float) -> tuple[int, int] | None:
    """The bytes and rows of an account; None while it is new."""
    stored, rows = row["bytes"], row["day_rows"]
    if not isinstance(stored, int) or not isinstance(rows, int):
        return None
    return stored, rows if row["day"] == _day(now) else 0


def _require_within(quota: Quota, tenant: str, added: Added, used: tuple[int, int, int], now: float) -> None:
    """`used`: jobs, bytes and rows, without what is added. Raises QuotaExceeded and StorageQuotaExceeded."""
    (jobs_used, stored, rows), new = used, added.rows + added.again
    if quota.bytes is not None and _is_too_much(added.bytes, added.queues, stored, quota.bytes):
        for_result = "" if added.bytes else ", and a result needs space"
        raise StorageQuotaExceeded(
            f"the quota of the tenant {tenant} allows {quota.bytes:,} bytes, of which {max(0, stored):,} are stored"
            f"{f'; these are {added.bytes:,}' if added.bytes else for_result}: delete jobs",
            quota="bytes", limit=quota.bytes, used=stored, retry_after=_RETRY_BYTES,
        )  # fmt: skip
    if quota.jobs is not None and added.queues and jobs_used >= quota.jobs:
        raise QuotaExceeded(
            f"the quota of the tenant {tenant} allows {quota.jobs:,} queued and running jobs, of which there are "
            f"{jobs_used:,}: wait for the end of one",
            quota="jobs", limit=quota.jobs, used=jobs_used, retry_after=_RETRY_JOBS,
        )  # fmt: skip
    if quota.rows_per_day is not None and _is_too_much(new, added.queues, rows, quota.rows_per_day):
        raise QuotaExceeded(
            f"the quota of the tenant {tenant} allows {quota.rows_per_day:,} rows a day, of which {rows:,} are used"
            f"{f'; these are {new:,}' if new else ''}: the next day begins at midnight UTC",
            quota="rows_per_day", limit=quota.rows_per_day, used=rows,
            retry_after=max(1, int(_DAY * (_day(now) + 1) - now) + 1),
        )  # fmt: skip


def _is_too_much(added: int, queues: bool, used: int, limit: int) -> bool:
    """A queued job needs some, of which the amount is not known yet."""
    return used + added > limit if added > 0 else queues and used >= limit


_ALL_JOBS = 2**31
_IS_ITS = accounts.c.tenant == bindparam("its_tenant")
_ACCOUNT = Prepared(select(accounts).where(_IS_ITS))
_LOCK = Prepared(select(accounts).where(_IS_ITS).with_for_update())
_UPDATE = Prepared(update(accounts).where(_IS_ITS))
_OF_TENANT = jobs.c.tenant == bindparam("its_tenant")


def _in_state(state: JobState) -> Any:
    """Up to `most` jobs, by the index of the queue alone."""
    found = select(jobs.c.tenant).where(jobs.c.state == state, _OF_TENANT).limit(bindparam("most")).subquery()
    return select(found.c.tenant)


_UNDER_WAY = union_all(_in_state(JobState.QUEUED), _in_state(JobState.RUNNING)).subquery()
_JOBS = Prepared(select(func.count().label("jobs")).select_from(_UNDER_WAY))
_ROWS = Prepared(
    select(func.sum(jobs.c.rows_planned).label("rows")).where(
        _OF_TENANT,
        jobs.c.started_at >= bindparam("midnight"),
        jobs.c.reused_from.is_(None),
        jobs.c.request_digest.is_not(None),  # but for those of a retry of failed records
    )
)


def _sum(column: ColumnElement[Any]) -> ColumnElement[Any]:
    """The sum of a column of a subquery; 0 without rows."""
    return func.coalesce(select(func.sum(column)).scalar_subquery(), 0)


_INPUTS = (
    select(func.max(inputs.c.bytes).label("bytes"))
    .select_from(inputs.join(jobs, jobs.c.id == inputs.c.job_id))
    .where(_OF_TENANT, inputs.c.owned, jobs.c.input_removed_at.is_(None), jobs.c.state != JobState.EXPIRED)
    .group_by(inputs.c.key)
    .subquery()
)
_IS_ELSEWHERE = func.substr(jobs.c.result_key, 1, len(TARGETS)) == TARGETS
_RESULT_BYTES = case((_IS_ELSEWHERE, 0), else_=func.coalesce(jobs.c.result_bytes, 0))
_RESULTS = (
    select(func.max(_RESULT_BYTES + func.coalesce(jobs.c.errors_bytes, 0)).label("bytes"))
    .where(_OF_TENANT, jobs.c.result_key.is_not(None))
    .group_by(jobs.c.result_key)
    .subquery()
)
_SENT = select(direct_uploads.c.bytes).where(direct_uploads.c.tenant == bindparam("its_tenant")).subquery()
_BYTES = Prepared(select((_sum(_INPUTS.c.bytes) + _sum(_RESULTS.c.bytes) + _sum(_SENT.c.bytes)).label("bytes")))
