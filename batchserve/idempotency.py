"""Idempotency-Key: the same POST sent twice does its work once, also across a crash between commit and answer.

The key is remembered in the transaction of the work itself. A second request with the key and the same content gets the
job of the first; with other content it is refused. Keys are per tenant.
"""

import hashlib
import math
from dataclasses import dataclass

from sqlalchemy import Connection, Float, bindparam, delete, insert, literal, or_, select, tuple_
from sqlalchemy.exc import IntegrityError

from batchserve import rows
from batchserve.access import DEFAULT_TENANT
from batchserve.db.prepared import Prepared
from batchserve.db.tables import idempotency_keys as keys
from batchserve.errors import IdempotencyInProgress, IdempotencyMismatch


@dataclass(frozen=True, slots=True)
class Remembered:
    """The status of the first response and its job; or the response itself, if it was about several jobs."""

    job_id: str | None
    status: int
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class KeyedRequest:
    """A tenant's request and its idempotency key; without a key, it is not remembered."""

    tenant: str
    key: str | None
    content: str
    """Its fingerprint."""

    def recall(self, connection: Connection) -> Remembered | None:
        """Its earlier response. Raises as `recall` does."""
        return None if self.key is None else recall(connection, self.key, self.content, self.tenant)

    def remember(
        self, connection: Connection, job_id: str | None, status: int, now: float, answer: str | None = None
    ) -> None:
        """Raises as `remember` does."""
        if self.key is not None:
            remember(connection, self.key, self.content, job_id, status, now, self.tenant, answer)


def fingerprint(*content: str) -> str:
    """Identifies equal requests: method, path, query and the digest of the body."""
    return hashlib.sha256("\0".join(content).encode()).hexdigest()


def recall(connection: Connection, key: str, content: str, tenant: str = DEFAULT_TENANT) -> Remembered | None:
    """The response to this key. Raises IdempotencyMismatch when its content was different, and UnreadableRow."""
    row = _OF_KEY.row(connection, {"its_tenant": tenant, "its_key": key})
    if row is None:
        return None
    if row["fingerprint"] != content:
        raise IdempotencyMismatch(
            f"the Idempotency-Key {key!r} was used for another request"
            + (f" (job {row['job_id']}): send a new key" if row["job_id"] else ": send a new key")
        )
    return Remembered(**rows.remembered(row))


def remember(
    connection: Connection,
    key: str,
    content: str,
    job_id: str | None,
    status: int,
    now: float,
    tenant: str = DEFAULT_TENANT,
    answer: str | None = None,
) -> None:
    """Raises IdempotencyInProgress when another process has just answered this key."""
    row = {"key": key, "fingerprint": content, "job_id": job_id, "status": status, "created_at": now}
    row |= {"tenant": tenant, "answer": answer}
    try:
        _REMEMBER.run(connection, row)
    except IntegrityError as error:
        raise IdempotencyInProgress(
            f"a request with the Idempotency-Key {key!r} has just been answered: send it again", retry_after=1
        ) from error


def is_known(connection: Connection, key: str, tenant: str) -> bool:
    """Whether a request with this key was answered, whatever its content."""
    return _OF_KEY.row(connection, {"its_tenant": tenant, "its_key": key}) is not None


def forget_older(connection: Connection, before: float, after: float = math.inf) -> int:
    """Removes keys that were remembered before a moment, or `after` another; returns their number."""
    early, late = literal(before, Float()), literal(after, Float())  # may be infinite, unlike the times in rows
    old = or_(keys.c.created_at < early, keys.c.created_at > late)
    if connection.dialect.name == "sqlite":
        return connection.execute(delete(keys).where(old)).rowcount
    # What another worker removes at this moment is skipped, in place of a wait for each other.
    found = select(keys.c.tenant, keys.c.key).where(old).with_for_update(skip_locked=True).cte("found")
    both = tuple_(keys.c.tenant, keys.c.key)
    return connection.execute(delete(keys).where(both.in_(select(found.c.tenant, found.c.key)))).rowcount


_OF_KEY = Prepared(select(keys).where(keys.c.tenant == bindparam("its_tenant"), keys.c.key == bindparam("its_key")))
_REMEMBER = Prepared(insert(keys))
