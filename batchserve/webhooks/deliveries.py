"""Deliveries: claimed by one process at a time, ended by what came of their attempts, listed, and sent again.

A claim puts a delivery off by a lease, under a new number of its attempts: when the process dies, it is due again. Its
ID stays, so that a receiver recognizes what it has had before.
"""

import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import uuid_utils
from sqlalchemy import Connection, and_, delete, insert, or_, select, update
from sqlalchemy.sql import ColumnElement

from batchserve.access import EVERY_TENANT
from batchserve.db import notifications
from batchserve.db.connect import Moment
from batchserve.db.notifications import Topic
from batchserve.db.tables import webhook_attempts, webhook_deliveries, webhook_endpoints
from batchserve.errors import Conflict, UnreadableRow, WebhookNotFound
from batchserve.webhooks import endpoints, events
from batchserve.webhooks.outbox import delivery_values
from batchserve.webhooks.room import Room
from batchserve.webhooks.terms import GONE, JOBS, Attempt, Delivery, DeliveryState, read_attempt, read_delivery

__all__ = [
    "PAUSES", "Claimed", "Outcome", "add_test", "attempts_of", "claim", "find_due", "forget_before",
    "get", "list_page", "put_back", "record", "send_again", "wait_of",
]  # fmt: skip

PAUSES = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 28800.0)
"""Seconds between an attempt that has failed and the next, together a day. After the last one it is given up."""
_JITTER = 0.2
"""The largest part by which a pause is longer or shorter, so that what has failed together is not tried together."""
_CANDIDATES = 64
_MOST_ATTEMPTS = 50
"""The latest attempts of a delivery that are kept."""
_GONE_STATUS = 410
_LONGEST_ERROR = 255

_chance = random.Random()  # noqa: S311 - separate from the global generator, whose state others use
_own = webhook_deliveries.c


@dataclass(frozen=True, slots=True)
class Claimed:
    """A delivery that this process is to attempt."""

    id: str
    tenant: str
    endpoint_id: str | None
    target: str
    url: str
    event: str
    body: str
    attempt: int
    at: float
    """When it was claimed, in seconds since the epoch."""
    is_slow: bool
    """Whether an attempt at it, or at another delivery to its endpoint, has failed."""
    secrets: Sequence[str] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an attempt."""

    seconds: float
    status: int | None = None
    response: str = ""
    error: str | None = None

    @property
    def is_delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


# --- attempts --------------------------------------------------------------------------------------------------------


def find_due(connection: Connection, now: Moment, room: Room) -> bool:
    """Whether `claim` would probably find a delivery. Cheaper than an empty claim, and waits for no lock."""
    return connection.scalar(_due(select(_own.id), now, room).limit(1)) is not None


def claim(connection: Connection, now: Moment, lease: float, room: Room) -> list[Claimed]:
    """Those of the due deliveries for which there is room. No other process claims them for `lease` seconds."""
    columns = (_own.id, _own.tenant, _own.endpoint_id, _own.target, _own.event, _own.body, _own.attempts)
    query = _due(select(*columns, _own.url, webhook_endpoints.c.url.label("of_endpoint"), _IS_SLOW), now, room)
    query = query.order_by(_own.due_at, _own.id).limit(_CANDIDATES)
    # What another process claims at this moment is skipped, in place of a wait for each other.
    found = connection.execute(query.with_for_update(of=webhook_deliveries, skip_locked=True)).mappings().all()
    chosen = [row for row in found if room.take(row["target"], row["tenant"], is_slow=bool(row["is_slow"]))]
    if not chosen:
        return []
    put_off = {"attempts": _own.attempts + 1, "due_at": now.steady + lease, "due_clock": now.clock}
    ids = [row["id"] for row in chosen]
    connection.execute(update(webhook_deliveries).where(_own.id.in_(ids)).values(put_off))
    owners = [(row["tenant"], row["endpoint_id"]) for row in chosen]
    secrets = endpoints.secrets_of(connection, owners, now.wall)
    return [
        Claimed(
            row["id"], row["tenant"], row["endpoint_id"], row["target"], row["url"] or row["of_endpoint"] or "",
            row["event"], row["body"], row["attempts"] + 1, now.wall, bool(row["is_slow"]), secrets[owner],
        )
        for row, owner in zip(chosen, owners, strict=True)
    ]  # fmt: skip


def record(connection: Connection, claimed: Claimed, outcome: Outcome, now: Moment) -> DeliveryState | None:
    """Ends an attempt: the delivery is delivered, tried again later, or given up. Returns its state; None when it was
    deleted meanwhile. 410 disables the endpoint.

    A success counts whenever it is known; a failure only of the latest attempt.
    """
    query = select(_own.state, _own.attempts, _own.attempts_before).where(_own.id == claimed.id).with_for_update()
    row = connection.execute(query).mappings().one_or_none()
    if row is None:
        return None
    _add_attempt(connection, claimed, outcome, now)
    tried = claimed.attempt - row["attempts_before"]
    if tried <= 0:  # it was sent again since
        return DeliveryState(row["state"])
    if outcome.is_delivered:
        _end(connection, claimed.id, DeliveryState.DELIVERED, now.wall)
        _note_health(connection, claimed.endpoint_id, None)
        return DeliveryState.DELIVERED
    _note_health(connection, claimed.endpoint_id, now.wall)
    if outcome.status == _GONE_STATUS and claimed.endpoint_id is not None:
        endpoints.disable(connection, claimed.endpoint_id, GONE, now.wall)
    if row["state"] != DeliveryState.PENDING or claimed.attempt != row["attempts"]:
        return DeliveryState(row["state"])
    if outcome.status == _GONE_STATUS or tried > len(PAUSES):
        _end(connection, claimed.id, DeliveryState.GIVEN_UP, now.wall)
        return DeliveryState.GIVEN_UP
    pause = PAUSES[tried - 1] * _chance.uniform(1 - _JITTER, 1 + _JITTER)
    due = {"due_at": now.steady + pause, "due_clock": now.clock}
    connection.execute(update(webhook_deliveries).where(_own.id == claimed.id).values(due))
    return DeliveryState.PENDING


def put_back(connection: Connection, claimed: Claimed) -> None:
    """Makes a delivery due at once, for any process: this one stops before it knows what came of its attempt."""
    mine = (_own.id == claimed.id, _own.state == DeliveryState.PENDING, _own.attempts == claimed.attempt)
    connection.execute(update(webhook_deliveries).where(*mine).values({"due_at": 0.0, "due_clock": ""}))


def _add_attempt(connection: Connection, claimed: Claimed, outcome: Outcome, now: Moment) -> None:
    row = {
        "delivery_id": claimed.id,
        "number": claimed.attempt,
        "at": now.wall - outcome.seconds,
        "seconds": outcome.seconds,
        "status": outcome.status,
        "response": outcome.response,
        "error": None if outcome.error is None else outcome.error[:_LONGEST_ERROR],
    }
    connection.execute(insert(webhook_attempts).values(row))
    if claimed.attempt > _MOST_ATTEMPTS:
        old = (
            webhook_attempts.c.delivery_id == claimed.id,
            webhook_attempts.c.number <= claimed.attempt - _MOST_ATTEMPTS,
        )
        connection.execute(delete(webhook_attempts).where(*old))


def _note_health(connection: Connection, endpoint_id: str | None, failing_since: float | None) -> None:
    """Rarely writes: only the first failure, and the first success after it."""
    own = webhook_endpoints.c
    is_news = own.failing_since.is_(None) if failing_since is not None else own.failing_since.is_not(None)
    if endpoint_id is not None:
        changed = update(webhook_endpoints).where(own.id == endpoint_id, is_news).values(failing_since=failing_since)
        connection.execute(changed)


def _end(connection: Connection, delivery_id: str, state: DeliveryState, now: float) -> None:
    connection.execute(update(webhook_deliveries).where(_own.id == delivery_id).values(state=state, ended_at=now))


_IS_SLOW = or_(_own.attempts > _own.attempts_before, webhook_endpoints.c.failing_since.is_not(None)).label("is_slow")


def _due(query: Any, now: Moment, room: Room) -> Any:
    of_endpoint = webhook_deliveries.outerjoin(webhook_endpoints, webhook_endpoints.c.id == _own.endpoint_id)
    # Three ranges of the index: with `!=`, each pending delivery would be read.
    other_clocks = or_(_own.due_clock < now.clock, _own.due_clock > now.clock)
    guards: list[ColumnElement[bool]] = [
        _own.state == DeliveryState.PENDING,
        or_(and_(_own.due_clock == now.clock, _own.due_at <= now.steady), other_clocks),
    ]
    if room.full_targets:
        guards.append(_own.target.not_in(room.full_targets))
    if room.full_tenants:
        guards.append(_own.tenant.not_in(room.full_tenants))
    if room.is_slow_full:
        guards += [_own.attempts <= _own.attempts_before, webhook_endpoints.c.failing_since.is_(None)]
    return query.select_from(of_endpoint).where(*guards)


# --- what clients see and do -----------------------------------------------------------------------------------------


def list_page(
    connection: Connection,
    endpoint_id: str,
    tenant: str,
    *,
    state: DeliveryState | None = None,
    after: str | None = None,
    limit: int = 50,
) -> list[Delivery]:
    """Newest first, without unreadable ones: of an endpoint that the tenant sees, or with JOBS of the addresses of its
    jobs. `after`: the last ID of the previous page."""
    guards = [_of(endpoint_id), *([] if tenant == EVERY_TENANT else [_own.tenant == tenant])]
    if state is not None:
        guards.append(_own.state == state)
    page: list[Delivery] = []
    while len(page) < limit:
        beyond = [] if after is None else [_own.id < after]
        query = select(webhook_deliveries).where(*guards, *beyond).order_by(_own.id.desc()).limit(limit)
        found = connection.execute(query).mappings().all()
        for row in found:
            with suppress(UnreadableRow):
                page.append(read_delivery(row))
        if len(found) < limit:
            break
        after = found[-1]["id"]
    return page[:limit]


def get(connection: Connection, endpoint_id: str, delivery_id: str, tenant: str) -> Delivery:
    """Raises WebhookNotFound, also for one of another tenant, and UnreadableRow."""
    row = None
    if "\0" not in delivery_id and "\0" not in endpoint_id:
        query = select(webhook_deliveries).where(_own.id == delivery_id, _of(endpoint_id))
        row = connection.execute(query).mappings().one_or_none()
    if row is None or tenant not in (row["tenant"], EVERY_TENANT):
        raise WebhookNotFound(f"no delivery {delivery_id!r} of the webhook {endpoint_id!r}")
    return read_delivery(row)


def attempts_of(connection: Connection, delivery_id: str) -> list[Attempt]:
    """In order, without unreadable ones."""
    query = select(webhook_attempts).where(webhook_attempts.c.delivery_id == delivery_id)
    found = []
    for row in connection.execute(query.order_by(webhook_attempts.c.number)).mappings().all():
        with suppress(UnreadableRow):
            found.append(read_attempt(row))
    return found


def wait_of(delivery: Delivery, now: Moment) -> float | None:
    """Seconds until the next attempt; None when none will follow by itself."""
    if delivery.state is not DeliveryState.PENDING:
        return None
    return max(0.0, delivery.due_at - now.steady) if delivery.due_clock == now.clock else 0.0


def send_again(connection: Connection, endpoint_id: str, delivery_id: str, tenant: str) -> Delivery:
    """-> pending, under the same ID, with as many attempts as at first. One that is pending is due at once, also
    while an attempt is on its way.

    Raises WebhookNotFound, and Conflict for an endpoint that is disabled.
    """
    delivery = get(connection, endpoint_id, delivery_id, tenant)
    if delivery.endpoint_id is not None:
        _require_enabled(connection, delivery.endpoint_id, tenant)
    values: dict[str, Any] = {"due_at": 0.0, "due_clock": ""}
    if delivery.state is not DeliveryState.PENDING:
        values |= {"state": DeliveryState.PENDING, "attempts_before": _own.attempts, "ended_at": None}
    connection.execute(update(webhook_deliveries).where(_own.id == delivery_id).values(values))
    notifications.send(connection, Topic.WEBHOOKS)
    return get(connection, endpoint_id, delivery_id, tenant)


def add_test(connection: Connection, endpoint_id: str, tenant: str, now: float) -> Delivery:
    """A delivery of a test event, whatever the endpoint asks for. Raises WebhookNotFound, and Conflict for an endpoint
    that is disabled."""
    its_tenant = _require_enabled(connection, endpoint_id, tenant)
    message_id = str(uuid_utils.uuid7())
    values = delivery_values(
        message_id, its_tenant, events.TEST, events.body_of_test(endpoint_id, its_tenant, now), now
    )
    connection.execute(insert(webhook_deliveries).values(**values, endpoint_id=endpoint_id, target=endpoint_id))
    notifications.send(connection, Topic.WEBHOOKS)
    return get(connection, endpoint_id, message_id, tenant)


def forget_before(connection: Connection, before: float, most: int, after: float) -> int:
    """Deletes up to `most` deliveries that ended before a moment, or `after` another, with their attempts; returns how
    many."""
    outside = or_(_own.ended_at < before, _own.ended_at > after)
    # What another worker deletes at this moment is skipped, in place of a wait for each other.
    query = select(_own.id).where(outside).order_by(_own.id).limit(most).with_for_update(skip_locked=True)
    found = connection.scalars(query).all()
    return connection.execute(delete(webhook_deliveries).where(_own.id.in_(found))).rowcount


def _require_enabled(connection: Connection, endpoint_id: str, tenant: str) -> str:
    """The tenant of an endpoint."""
    endpoint = endpoints.get(connection, endpoint_id, tenant)
    if not endpoint.enabled:
        raise Conflict(f"the webhook {endpoint_id} is disabled: enable it first")
    return endpoint.tenant


def _of(endpoint_id: str) -> ColumnElement[bool]:
    return _own.endpoint_id.is_(None) if endpoint_id == JOBS else _own.endpoint_id == endpoint_id
