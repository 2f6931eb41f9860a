"""The deliveries of an event, written in its transaction: so none is lost, and none is of an end that did not happen.

Most jobs end where nobody asked for events. That is a column of the statement by which they end (`IS_HEARD`), exact for
each row: for those jobs, no further statement is executed.
"""

from collections.abc import Sequence
from typing import Any

import uuid_utils
from sqlalchemy import Boolean, Connection, bindparam, insert, literal_column, select

from batchserve.db import notifications
from batchserve.db.notifications import Topic
from batchserve.db.tables import jobs, models, webhook_deliveries, webhook_endpoints
from batchserve.webhooks import events
from batchserve.webhooks.addresses import target_of
from batchserve.webhooks.terms import DeliveryState

__all__ = ["IS_HEARD", "add", "delivery_values"]

# As text: SQLAlchemy would render the columns of a subquery without their tables here, because SQLite returns those.
IS_HEARD = literal_column(
    "EXISTS (SELECT 1 FROM webhook_endpoints WHERE webhook_endpoints.tenant = jobs.tenant "
    "AND webhook_endpoints.enabled)",
    Boolean(),
).label("is_heard")
"""Whether the tenant of a changed job has an enabled endpoint."""


def add(connection: Connection, job_ids: Sequence[str], state: str, now: float) -> None:
    """Adds the deliveries of jobs that have just ended in this state: for each endpoint of the tenant that asked for
    the event, and for the address on the job."""
    its_jobs = connection.execute(_ENDED, {"job_ids": list(job_ids)}).mappings().all()
    tenants = list({job["tenant"] for job in its_jobs})
    endpoints = connection.execute(_ENABLED, {"tenants": tenants}).mappings().all()
    added: list[dict[str, Any]] = []
    for job in its_jobs:
        kinds: list[tuple[str, str | None, str]] = [
            (kind, endpoint["id"], "")
            for endpoint in endpoints
            if endpoint["tenant"] == job["tenant"]
            for kind in events.wanted(endpoint["events"], state)
        ]
        if job["webhook"] is not None:
            kinds.append((f"job.{state}", None, job["webhook"]))
        for kind, endpoint_id, url in kinds:
            message_id = str(uuid_utils.uuid7())
            body = events.body_of(message_id, kind, dict(job), state, now)
            where = {"endpoint_id": endpoint_id, "url": url or None, "target": endpoint_id or target_of(url)}
            added.append({**delivery_values(message_id, job["tenant"], kind, body, now), **where, "job_id": job["id"]})
    if added:
        connection.execute(insert(webhook_deliveries), added)
        notifications.send(connection, Topic.WEBHOOKS)


def delivery_values(message_id: str, tenant: str, kind: str, body: str, now: float) -> dict[str, Any]:
    """The columns of a new delivery, besides those that say where to. It is due at once: its clock is none."""
    return {
        "id": message_id,
        "tenant": tenant,
        "event": kind,
        "body": body,
        "state": DeliveryState.PENDING,
        "due_at": 0.0,
        "due_clock": "",
        "created_at": now,
    }


_ENDED = (
    select(
        *(
            jobs.c[name]
            for name in (
                "id", "tenant", "webhook", "planned", "rows_planned", "rows_ok", "rows_failed", "error", "reused_from",
                "metadata",
            )
        ),
        models.c.name.label("model_name"),
        models.c.version.label("model_version"),
    )
    .select_from(jobs.outerjoin(models, jobs.c.model_id == models.c.id))
    .where(jobs.c.id.in_(bindparam("job_ids", expanding=True)))
    .order_by(jobs.c.id)
)  # fmt: skip
_ENABLED = select(webhook_endpoints.c.id, webhook_endpoints.c.tenant, webhook_endpoints.c.events).where(
    webhook_endpoints.c.tenant.in_(bindparam("tenants", expanding=True)), webhook_endpoints.c.enabled
)
