"""The audit log: who cancelled, retried, deleted, registered, revoked or set what. An entry is written in the
transaction of what it records, so that neither is without the other.
"""

from contextlib import suppress
from dataclasses import dataclass

from sqlalchemy import Connection, delete, insert, or_, select
from sqlalchemy.sql import ColumnElement

from batchserve import rows
from batchserve.access import EVERY_TENANT, Action, ApiKey, AuditEntry, Caller, Kind
from batchserve.db.tables import audit
from batchserve.errors import UnreadableRow

__all__ = [
    "AuditFilter", "forget_before", "list_page", "note_job", "note_key", "note_model", "note_quota", "note_schedule",
    "note_webhook",
]  # fmt: skip


def note_job(connection: Connection, by: Caller, action: Action, job_id: str, tenant: str, now: float) -> None:
    """`tenant`: of the job, whoever acts on it."""
    _note(connection, by, action, "job", job_id, tenant, now)


def note_model(connection: Connection, by: Caller, action: Action, reference: str, now: float) -> None:
    """`reference`: `name@version`. Models are of all tenants, and so are their entries."""
    _note(connection, by, action, "model", reference, EVERY_TENANT, now)


def note_key(connection: Connection, by: Caller, action: Action, key: ApiKey, now: float) -> None:
    """`by`: of the page; commands need no key."""
    _note(connection, by, action, "key", key.name, key.tenant, now)


def note_schedule(connection: Connection, by: Caller, action: Action, name: str, tenant: str, now: float) -> None:
    """`tenant`: of the schedule, whoever acts on it."""
    _note(connection, by, action, "schedule", name, tenant, now)


def note_webhook(connection: Connection, by: Caller, action: Action, endpoint_id: str, tenant: str, now: float) -> None:
    """`tenant`: of the webhook, whoever acts on it."""
    _note(connection, by, action, "webhook", endpoint_id, tenant, now)


def note_quota(connection: Connection, by: Caller, action: Action, tenant: str, now: float) -> None:
    """`tenant`: of the quota; a tenant reads of its own, and of that for all others."""
    _note(connection, by, action, "quota", tenant, tenant, now)


@dataclass(frozen=True, slots=True)
class AuditFilter:
    """Which entries of a list are wanted. Times: seconds since the epoch; `since` is included, `until` is not."""

    actions: tuple[Action, ...] = ()
    """Any of these; all when there is none."""
    kind: Kind | None = None
    subject: str | None = None
    key: str | None = None
    since: float | None = None
    until: float | None = None


ALL_ENTRIES = AuditFilter()


def list_page(
    connection: Connection,
    tenant: str = EVERY_TENANT,
    wanted: AuditFilter = ALL_ENTRIES,
    *,
    after: int | None = None,
    limit: int = 50,
) -> list[AuditEntry]:
    """Newest first: entries about a tenant and about what all tenants share; without unreadable ones. `after`: the last
    ID of the previous page."""
    of_tenant = [] if tenant == EVERY_TENANT else [audit.c.tenant.in_((tenant, EVERY_TENANT))]
    guards = [*of_tenant, *_guards(wanted)]
    page: list[AuditEntry] = []
    while len(page) < limit:
        beyond = [] if after is None else [audit.c.id < after]
        query = select(audit).where(*guards, *beyond).order_by(audit.c.id.desc()).limit(limit)
        found = connection.execute(query).mappings().all()
        for row in found:
            with suppress(UnreadableRow):
                page.append(rows.audit_entry(row))
        if len(found) < limit:
            break
        after = found[-1]["id"]
    return page[:limit]


def _guards(wanted: AuditFilter) -> list[ColumnElement[bool]]:
    texts = {"kind": wanted.kind, "subject": wanted.subject, "key": wanted.key}
    guards: list[ColumnElement[bool]] = [audit.c[name] == text for name, text in texts.items() if text is not None]
    if wanted.actions:
        guards.append(audit.c.action.in_(wanted.actions))
    if wanted.since is not None:
        guards.append(audit.c.at >= wanted.since)
    if wanted.until is not None:
        guards.append(audit.c.at < wanted.until)
    return guards


def forget_before(connection: Connection, before: float, most: int, after: float) -> int:
    """Deletes the entries before a moment, or `after` another, of the `most` oldest; returns how many. IDs increase
    with time, so no index by time is needed."""
    # What another worker deletes at this moment is skipped, in place of a wait for each other.
    oldest = select(audit.c.id).order_by(audit.c.id).limit(most).with_for_update(skip_locked=True)
    found = connection.scalars(oldest).all()
    outside = or_(audit.c.at < before, audit.c.at > after)
    return connection.execute(delete(audit).where(audit.c.id.in_(found), outside)).rowcount


def _note(
    connection: Connection, by: Caller, action: Action, kind: Kind, subject: str, tenant: str, now: float
) -> None:
    values = {"at": now, "tenant": tenant, "key": by.key, "action": action, "kind": kind, "subject": subject}
    connection.execute(insert(audit).values(values))
