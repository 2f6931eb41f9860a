"""Notifications between processes: jobs were queued, have ended or are to be cancelled; a key was revoked;
webhooks are to be sent.

They are sent in the transaction that does so, and received after its commit. SQLite has none, and those of a server are
lost while a receiver is not connected: so every receiver polls as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from sqlalchemy import Connection, bindparam, func, select

from batchserve.db.prepared import Prepared

__all__ = ["ALL", "CHANNEL", "Hear", "Notification", "Topic", "parsed", "send"]

CHANNEL = "batchserve"
_MOST_JOBS = 100
"""Jobs that a notification names. PostgreSQL limits it to 8,000 bytes."""


class Topic(StrEnum):
    QUEUED = "queued"
    ENDED = "ended"
    CANCEL = "cancel"
    REVOKED = "revoked"
    WEBHOOKS = "webhooks"
    UNKNOWN = "unknown"
    """Anything may have happened: notifications were lost."""


@dataclass(frozen=True, slots=True)
class Notification:
    topic: Topic
    job_ids: frozenset[str] = frozenset()
    """Empty: of any job."""


Hear = Callable[[Notification], None]
ALL = Notification(Topic.UNKNOWN)


def send(connection: Connection, topic: Topic, job_ids: Sequence[str] = ()) -> None:
    """Notifies all processes, once this transaction is committed. A no-op on SQLite."""
    if connection.dialect.name != "sqlite":
        named = job_ids if len(job_ids) <= _MOST_JOBS else ()
        _NOTIFY.send(connection, {"payload": " ".join((topic, *named))})


def parsed(payload: str) -> Notification:
    """A notification as it was sent. What another program has sent may mean anything."""
    topic, *job_ids = payload.split(" ")
    try:
        return Notification(Topic(topic), frozenset(job_ids))
    except ValueError:
        return ALL


_NOTIFY = Prepared(select(func.pg_notify(CHANNEL, bindparam("payload"))))
