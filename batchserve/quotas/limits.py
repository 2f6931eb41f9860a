"""The limits of tenants, and a cache of them.

Most services have none, and a small job takes a few round trips to the database: so each process reads the whole table
once a second, and otherwise asks its memory. A changed limit is in force everywhere within that second.
"""

import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress

from sqlalchemy import Connection, delete, insert, select

from batchserve import audit, rows
from batchserve.access import EVERY_TENANT, Action, Caller, Quota
from batchserve.db.cache import ALWAYS, VersionedCache
from batchserve.db.connect import Database, lock
from batchserve.db.prepared import Prepared
from batchserve.db.tables import accounts, quotas
from batchserve.errors import InvalidOptions, NotFound, QuotaExceeded, UnreadableRow

__all__ = ["FRESH", "LIMITS", "Limits", "find", "find_for", "list_all", "remove", "set_limits"]

FRESH = 1.0
"""Seconds for which a process uses what it has read."""
LIMITS = ("jobs", "bytes", "rows_per_day", "requests_per_second")
_LARGEST = 2**53
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}|\*")


# --- the table -------------------------------------------------------------------------------------------------------


def list_all(connection: Connection) -> list[Quota]:
    """By tenant; unreadable ones are skipped."""
    found = []
    for row in _ALL.rows(connection, {}):
        with suppress(UnreadableRow):
            found.append(rows.quota(row))
    return found


def find(connection: Connection, tenant: str) -> Quota:
    """Of exactly this tenant, or of `EVERY_TENANT`. Raises NotFound."""
    for quota in list_all(connection):
        if quota.tenant == tenant:
            return quota
    raise NotFound(f"there is no quota of the tenant {tenant[:100]!r}")


def find_for(connection: Connection, tenant: str) -> Quota | None:
    """The quota that limits a tenant: its own, or that of `EVERY_TENANT`."""
    return _of(_by_tenant(connection), tenant)


def set_limits(connection: Connection, quota: Quota, now: float, by: Caller) -> None:
    """Replaces the limits of a tenant. Raises InvalidOptions."""
    _require_valid(quota)
    lock(connection, "quotas")
    before = _by_tenant(connection)
    if _of(before, quota.tenant) is None:  # nothing was added to what there may be of an earlier quota
        is_its = accounts.c.tenant == quota.tenant
        connection.execute(
            delete(accounts).where(accounts.c.tenant.not_in(before) if quota.tenant == EVERY_TENANT else is_its)
        )
    connection.execute(delete(quotas).where(quotas.c.tenant == quota.tenant))
    values = {name: getattr(quota, name) for name in LIMITS}
    connection.execute(insert(quotas).values(tenant=quota.tenant, changed_at=now, **values))
    audit.note_quota(connection, by, Action.SET, quota.tenant, now)


def remove(connection: Connection, tenant: str, now: float, by: Caller) -> None:
    """Removes the limits of a tenant, which has those of `EVERY_TENANT` again, if there are any. Raises NotFound."""
    lock(connection, "quotas")
    if not connection.execute(delete(quotas).where(quotas.c.tenant == tenant)).rowcount:
        raise NotFound(f"there is no quota of the tenant {tenant[:100]!r}")
    limited = set(connection.scalars(select(quotas.c.tenant)))
    if EVERY_TENANT not in limited:  # from now on nothing is added to the accounts of the others
        connection.execute(delete(accounts).where(accounts.c.tenant.not_in(limited)))
    audit.note_quota(connection, by, Action.DELETE, tenant, now)


def _require_valid(quota: Quota) -> None:
    if not _TENANT.fullmatch(quota.tenant):
        raise InvalidOptions(
            "a tenant has letters, digits, '.', '_', '@' and '-' (at most 64), or is * for all others, got "
            f"{quota.tenant[:100]!r}"
        )
    given = {name: value for name in LIMITS if (value := getattr(quota, name)) is not None}
    if not given:
        raise InvalidOptions(f"a quota has at least one limit: {', '.join(LIMITS)}")
    for name, value in given.items():
        lowest = 0.01 if name == "requests_per_second" else 0
        if not (math.isfinite(value) and lowest <= value <= _LARGEST):
            raise InvalidOptions(f"{name}: expected a number from {lowest} to {_LARGEST}, got {value}")


def _by_tenant(connection: Connection) -> dict[str, Quota]:
    return {quota.tenant: quota for quota in list_all(connection)}


def _of(found: Mapping[str, Quota], tenant: str) -> Quota | None:
    return found.get(tenant) or found.get(EVERY_TENANT)


_ALL = Prepared(select(quotas).order_by(quotas.c.tenant))


# --- the cache -------------------------------------------------------------------------------------------------------


class Limits:
    """The limits as they are cached in a process, and its counts of requests. Thread-safe but for `admit`."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._cache: VersionedCache[str, dict[str, Quota]] = VersionedCache(1, FRESH)
        self._buckets: dict[str, tuple[float, float]] = {}
        """Of each tenant, the requests that it may send at once, and when that was so."""

    async def of(self, tenant: str) -> Quota | None:
        """Raises Unavailable."""
        found = self._cache.get(_ALL_TENANTS, ALWAYS)
        if found is None:
            found = await self._database.fetch_one(_by_tenant)
            self._cache.put(_ALL_TENANTS, ALWAYS, found)
        return _of(found, tenant) if found else None

    def of_in(self, connection: Connection, tenant: str) -> Quota | None:
        """The same within a transaction."""
        found = self._cache.get(_ALL_TENANTS, ALWAYS)
        if found is None:
            found = _by_tenant(connection)
            self._cache.put(_ALL_TENANTS, ALWAYS, found)
        return _of(found, tenant) if found else None

    def forget(self) -> None:
        """After a change by this process: it is in force here at once."""
        self._cache.take(_ALL_TENANTS)

    async def admit(self, tenant: str) -> None:
        """Counts a request. Raises QuotaExceeded for one too many; it may burst by those of a second. Administrators of
        all tenants are not limited."""
        quota = await self.of(tenant) if tenant != EVERY_TENANT else None
        if quota is None or quota.requests_per_second is None:
            return
        rate, now = quota.requests_per_second, time.monotonic()
        most = max(1.0, rate)
        left, since = self._buckets.get(tenant, (most, now))
        left = min(most, left + rate * (now - since))
        if left < 1.0:
            raise QuotaExceeded(
                f"the quota of the tenant {tenant} allows {rate:g} requests a second: send this one again later",
                quota="requests_per_second",
                limit=rate,
                retry_after=max(1, math.ceil((1.0 - left) / rate)),
            )
        self._buckets[tenant] = left - 1.0, now


_ALL_TENANTS = ""
