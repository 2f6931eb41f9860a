"""The endpoints of tenants and their secrets: created, changed, rotated and deleted, each with an audit entry."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import uuid_utils
from sqlalchemy import Connection, and_, bindparam, delete, func, insert, or_, select, update
from sqlalchemy.sql import ColumnElement

from batchserve import audit
from batchserve.access import EVERY_TENANT, Action, Caller
from batchserve.db.prepared import Prepared
from batchserve.db.tables import webhook_deliveries, webhook_endpoints, webhook_secrets
from batchserve.errors import Conflict, InvalidOptions, UnreadableRow, WebhookNotFound
from batchserve.webhooks.signing import new_secret
from batchserve.webhooks.terms import JOBS, DeliveryState, Endpoint, read_endpoint, read_secret

__all__ = [
    "LONGEST_OVERLAP", "change", "create", "delete_endpoint", "get", "list_all", "require_secret", "rotate",
    "secrets_of",
]  # fmt: skip

MOST_ENDPOINTS = 50
"""Endpoints of a tenant: each is one more delivery for every end of a job."""
MOST_SECRETS = 4
"""Valid secrets of an endpoint: each is a signature of every request."""
LONGEST_OVERLAP = 7 * 86400.0


def create(
    connection: Connection, tenant: str, url: str, filters: Sequence[str], description: str, now: float, by: Caller
) -> tuple[Endpoint, str]:
    """A new endpoint, and its secret. The URL was checked. Raises Conflict when the tenant has as many as it may."""
    count = select(func.count()).select_from(webhook_endpoints).where(webhook_endpoints.c.tenant == tenant)
    if (connection.scalar(count) or 0) >= MOST_ENDPOINTS:
        raise Conflict(f"the tenant {tenant} has {MOST_ENDPOINTS} webhooks already: delete one first")
    endpoint = Endpoint(str(uuid_utils.uuid7()), tenant, url, list(filters), description, enabled=True, created_at=now)
    names = Endpoint.__dataclass_fields__
    connection.execute(insert(webhook_endpoints).values({name: getattr(endpoint, name) for name in names}))
    secret = _add_secret(connection, tenant, endpoint.id, now)
    audit.note_webhook(connection, by, Action.CREATE, endpoint.id, tenant, now)
    return endpoint, secret


def get(connection: Connection, endpoint_id: str, tenant: str) -> Endpoint:
    """Raises WebhookNotFound, also for one of another tenant, and UnreadableRow."""
    query = select(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id)
    row = None if "\0" in endpoint_id else connection.execute(query).mappings().one_or_none()
    if row is None or tenant not in (row["tenant"], EVERY_TENANT):
        raise WebhookNotFound(f"no webhook {endpoint_id!r}")
    return read_endpoint(row)


def list_all(connection: Connection, tenant: str) -> list[Endpoint]:
    """The endpoints that a tenant sees, the oldest first; unreadable rows are skipped."""
    guards = [] if tenant == EVERY_TENANT else [webhook_endpoints.c.tenant == tenant]
    query = select(webhook_endpoints).where(*guards).order_by(webhook_endpoints.c.id)
    found = []
    for row in connection.execute(query).mappings().all():
        with suppress(UnreadableRow):
            found.append(read_endpoint(row))
    return found


def change(
    connection: Connection, endpoint_id: str, tenant: str, values: Mapping[str, Any], now: float, by: Caller
) -> Endpoint:
    """Changes columns of an endpoint, whose values were checked. One that is disabled gets no events, and what was on
    its way to it is given up; one that is enabled again begins anew. Raises WebhookNotFound.
    """
    endpoint = get(connection, endpoint_id, tenant)
    values = dict(values)
    if "enabled" in values and values["enabled"] != endpoint.enabled:
        values |= {"reason": None, "failing_since": None}
    changed = {name: value for name, value in values.items() if value != getattr(endpoint, name)}
    if changed:
        connection.execute(update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id).values(changed))
        audit.note_webhook(connection, by, Action.CHANGE, endpoint_id, endpoint.tenant, now)
    if changed.get("enabled") is False:
        give_up_all(connection, endpoint_id, now)
    return get(connection, endpoint_id, tenant)


def delete_endpoint(connection: Connection, endpoint_id: str, tenant: str, now: float, by: Caller) -> None:
    """Deletes an endpoint with its secrets and deliveries. Raises WebhookNotFound. An unreadable one is deleted."""
    try:
        its_tenant = get(connection, endpoint_id, tenant).tenant
    except UnreadableRow:
        its_tenant = tenant
    connection.execute(delete(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id))
    audit.note_webhook(connection, by, Action.DELETE, endpoint_id, its_tenant, now)


def disable(connection: Connection, endpoint_id: str, reason: str, now: float) -> None:
    """Disables an endpoint that wants no more requests."""
    values = {"enabled": False, "reason": reason}
    connection.execute(update(webhook_endpoints).where(webhook_endpoints.c.id == endpoint_id).values(values))
    give_up_all(connection, endpoint_id, now)


def give_up_all(connection: Connection, endpoint_id: str, now: float) -> None:
    """Ends all that is on its way to an endpoint."""
    pending = (
        webhook_deliveries.c.endpoint_id == endpoint_id,
        webhook_deliveries.c.state == DeliveryState.PENDING,
    )
    ended = {"state": DeliveryState.GIVEN_UP, "ended_at": now}
    connection.execute(update(webhook_deliveries).where(*pending).values(ended))


# --- secrets ---------------------------------------------------------------------------------------------------------


def rotate(
    connection: Connection, endpoint_id: str, tenant: str, overlap: float, now: float, by: Caller
) -> tuple[str, float | None]:
    """A new secret of an endpoint, or with JOBS of the addresses of the tenant's jobs; and until when those before it
    are valid, too (None: there was none). Raises WebhookNotFound.
    """
    owner = None if endpoint_id == JOBS else endpoint_id
    its_tenant = tenant if owner is None else get(connection, endpoint_id, tenant).tenant
    mine = _of_owner(its_tenant, owner)
    until = now + overlap
    later = or_(webhook_secrets.c.expires_at.is_(None), webhook_secrets.c.expires_at > until)
    replaced = connection.execute(update(webhook_secrets).where(*mine, later).values(expires_at=until)).rowcount
    newest = select(webhook_secrets.c.id).where(*mine).order_by(webhook_secrets.c.id.desc()).limit(MOST_SECRETS - 1)
    kept = connection.scalars(newest).all()
    of_no_use = or_(webhook_secrets.c.id.not_in(kept), webhook_secrets.c.expires_at <= now)
    connection.execute(delete(webhook_secrets).where(*mine, of_no_use))
    secret = _add_secret(connection, its_tenant, owner, now)
    audit.note_webhook(connection, by, Action.ROTATE, endpoint_id, its_tenant, now)
    return secret, until if replaced and overlap > 0 else None


def require_secret(connection: Connection, tenant: str) -> None:
    """Raises InvalidOptions when requests to the addresses of this tenant's jobs could not be signed."""
    if _HAS_SECRET.row(connection, {"its_tenant": tenant}) is None:
        raise InvalidOptions(
            f"webhook: the tenant {tenant} has no secret to sign requests with; create it by `batchserve webhooks "
            f"rotate {JOBS}` or POST /v1/webhooks/{JOBS}/rotate"
        )


def secrets_of(
    connection: Connection, owners: Sequence[tuple[str, str | None]], now: float
) -> dict[tuple[str, str | None], list[str]]:
    """The valid secrets of each of these tenants and endpoints, the newest first; without unreadable ones."""
    endpoints = {endpoint_id for _, endpoint_id in owners if endpoint_id is not None}
    tenants = {tenant for tenant, endpoint_id in owners if endpoint_id is None}
    of_owners = or_(
        webhook_secrets.c.endpoint_id.in_(endpoints),
        and_(webhook_secrets.c.endpoint_id.is_(None), webhook_secrets.c.tenant.in_(tenants)),
    )
    valid = or_(webhook_secrets.c.expires_at.is_(None), webhook_secrets.c.expires_at > now)
    query = select(webhook_secrets).where(of_owners, valid).order_by(webhook_secrets.c.id.desc())
    found: dict[tuple[str, str | None], list[str]] = {owner: [] for owner in owners}
    for row in connection.execute(query).mappings().all():
        with suppress(UnreadableRow):
            secret = read_secret(row)
            found.setdefault((secret.tenant, secret.endpoint_id), []).append(secret.secret)
    return found


def _add_secret(connection: Connection, tenant: str, endpoint_id: str | None, now: float) -> str:
    secret = new_secret()
    values = {"tenant": tenant, "endpoint_id": endpoint_id, "secret": secret, "created_at": now}
    connection.execute(insert(webhook_secrets).values(values))
    return secret


def _of_owner(tenant: str, endpoint_id: str | None) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    own = webhook_secrets.c.endpoint_id
    return webhook_secrets.c.tenant == tenant, own.is_(None) if endpoint_id is None else own == endpoint_id


_HAS_SECRET = Prepared(
    select(webhook_secrets.c.id)
    .where(webhook_secrets.c.tenant == bindparam("its_tenant"), webhook_secrets.c.endpoint_id.is_(None))
    .limit(1)
)
