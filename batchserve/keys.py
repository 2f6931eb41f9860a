"""API keys: authentication, and the tenant of a request. The database knows a key only by its SHA-256.

A key is `bs_`, 256 random bits and a CRC-32 of both, in base 62. The checksum detects a truncated or mistyped key, or
one leaked into a file, without a query; it is not a protection.

A key is looked up by its digest. Its timing may reveal how far two digests agree; but an attacker cannot choose the
digest of a guess, so this leads to no key, and nothing else needs a comparison in constant time.
"""

import hashlib
import re
import secrets
import string
import zlib
from collections.abc import Hashable
from contextlib import suppress

from sqlalchemy import Connection, bindparam, insert, select, update

from batchserve import audit, rows
from batchserve.access import EVERY_TENANT, Action, ApiKey, Caller, Scope
from batchserve.db import notifications
from batchserve.db.connect import Database, lock
from batchserve.db.notifications import Topic
from batchserve.db.prepared import Prepared
from batchserve.db.tables import keys
from batchserve.db.watcher import Probe
from batchserve.errors import Conflict, InvalidOptions, NotFound, UnreadableRow

COMMAND = Caller()
"""A command on the server's host, which needs no key."""
_PREFIX = "bs_"
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM, _CHECKSUM = 43, 6  # digits: 62**43 > 2**256, 62**6 > 2**32
_SHOWN = len(_PREFIX) + 6
_WELL_FORMED = re.compile(rf"{_PREFIX}[0-9A-Za-z]{{{_RANDOM + _CHECKSUM}}}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def generate() -> str:
    """A new, unguessable key."""
    body = _PREFIX + _base62(secrets.randbits(256), _RANDOM)
    return body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Whether a text is well-formed as a key, with the right checksum."""
    return _WELL_FORMED.fullmatch(key) is not None and _checksum(key[:-_CHECKSUM]) == key[-_CHECKSUM:]


def create(
    connection: Connection, name: str, scope: Scope, tenant: str, now: float, by: Caller = COMMAND
) -> tuple[ApiKey, str]:
    """A new key, and its text, which is not stored. `by`: for the audit log, and for what it may know of other keys.

    Raises InvalidOptions, and Conflict when the name is taken.
    """
    for what, text in (("name", name), ("tenant", tenant)):
        if not (_NAME.fullmatch(text) or (what == "tenant" and text == EVERY_TENANT)):
            raise InvalidOptions(
                f"a {what} has letters, digits, '.', '_', '@' and '-' (at most 64), got {text[:100]!r}"
            )
    if name.isdecimal():
        raise InvalidOptions(f"a name must not be a number, which would be read as an id, got {name!r}")
    if tenant == EVERY_TENANT and scope is not Scope.ADMIN:
        raise InvalidOptions(f"only an admin key may see every tenant ({EVERY_TENANT}): name the tenant of {name!r}")
    lock(connection, "keys")
    owner = connection.scalar(select(keys.c.tenant).where(keys.c.name == name, keys.c.revoked_at.is_(None)))
    if owner is not None and by.administers(owner):
        raise Conflict(f"a key {name!r} already exists: revoke it first, or choose another name")
    if owner is not None:  # a name belongs to one key of all tenants: more cannot be told of another's
        raise Conflict(f"the name {name!r} is not free: choose another one")
    text = generate()
    row = {
        "name": name,
        "tenant": tenant,
        "scope": scope,
        "digest": _digest(text),
        "prefix": text[:_SHOWN],
        "created_at": now,
    }
    connection.execute(insert(keys), row)
    made = find(connection, text)
    assert made is not None
    audit.note_key(connection, by, Action.CREATE, made, now)
    return made, text


def find(connection: Connection, text: str) -> ApiKey | None:
    """The key with this text, unless it was revoked. An unreadable row grants nothing."""
    row = _OF_DIGEST.row(connection, {"of_digest": _digest(text)})
    try:
        return rows.key(row) if row is not None else None
    except UnreadableRow:
        return None


async def state_of(database: Database, text: str) -> Hashable | None:
    """What changes when this key is revoked, or the first of all keys is created: a probe, see `Database.probe`."""
    return await database.probe(_STATE, of_digest=_digest(text))


def list_all(connection: Connection) -> list[ApiKey]:
    """All keys in the order of their creation, revoked ones included; unreadable rows are skipped."""
    found = []
    for row in connection.execute(_KEYS.order_by(keys.c.id)).mappings().all():
        with suppress(UnreadableRow):
            found.append(rows.key(row))
    return found


def revoke(connection: Connection, reference: str, now: float, by: Caller = COMMAND) -> ApiKey:
    """Revokes a key, by ID or name, permanently and immediately. `by`: for the audit log.

    Raises NotFound when no valid key matches.
    """
    by_id = keys.c.id == int(reference) if reference.isdecimal() and len(reference) < 10 else keys.c.name == reference
    ended = connection.execute(
        update(keys).where(by_id, keys.c.revoked_at.is_(None)).values(revoked_at=now).returning(*keys.c)
    )
    row = ended.mappings().one_or_none()
    if row is None:
        raise no_key(reference)
    key = rows.key(row)
    audit.note_key(connection, by, Action.REVOKE, key, now)
    notifications.send(connection, Topic.REVOKED)
    return key


def no_key(reference: str) -> NotFound:
    return NotFound(f"there is no valid key {reference!r}: `batchserve keys list` shows all")


def exist(connection: Connection) -> bool:
    """Whether a key was ever created. Then every request needs one, even after the last is revoked."""
    return _EXISTS.row(connection, {}) is not None


def has_admin(connection: Connection) -> bool:
    """Whether there is a valid admin key."""
    return connection.scalar(_ANY.where(keys.c.scope == Scope.ADMIN, keys.c.revoked_at.is_(None))) is not None


def _digest(text: str) -> str:
    # One round: a key has 256 random bits, so that guessing is out of reach however fast the hash is.
    return hashlib.sha256(text.encode()).hexdigest()


def _checksum(body: str) -> str:
    return _base62(zlib.crc32(body.encode()), _CHECKSUM)


def _base62(number: int, length: int) -> str:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, 62)
        digits.append(_DIGITS[digit])
    return "".join(reversed(digits))


_FIELDS = frozenset(ApiKey.__dataclass_fields__)
# Executed for nearly every request: built once.
_KEYS = select(*(column for column in keys.c if column.name in _FIELDS))
_OF_DIGEST = Prepared(_KEYS.where(keys.c.digest == bindparam("of_digest"), keys.c.revoked_at.is_(None)))
_ANY = select(keys.c.id).limit(1)
_EXISTS = Prepared(_ANY)
_VALID = select(keys.c.id).where(keys.c.digest == bindparam("of_digest"), keys.c.revoked_at.is_(None))
_STATE = Probe(select(_ANY.scalar_subquery(), _VALID.scalar_subquery()))
