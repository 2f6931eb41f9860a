"""API keys: who may send requests, and for which tenant. The database knows a key only by its SHA-256.

A key is `bs_`, 256 random bits and a CRC-32 of both, in base 62. The checksum tells a key that was cut or mistyped, or
that lies in a file where it should not be, without asking the database; it protects nothing.

A key is looked up by its digest. How long that takes may tell how far two digests agree; but who does not know a key
cannot choose the digest of a guess, so this leads to no key, and nothing else needs to be compared in constant time.
"""

import hashlib
import re
import secrets
import string
import zlib
from contextlib import suppress

from sqlalchemy import Connection, bindparam, insert, select, update

from batchserve import rows
from batchserve.db.connect import lock
from batchserve.db.tables import keys
from batchserve.domain import EVERY_TENANT, ApiKey, Scope
from batchserve.errors import Conflict, InvalidOptions, NotFound, UnreadableRow

_PREFIX = "bs_"
_DIGITS = string.digits + string.ascii_uppercase + string.ascii_lowercase
_RANDOM, _CHECKSUM = 43, 6  # digits: 62**43 > 2**256, 62**6 > 2**32
_SHOWN = len(_PREFIX) + 6
_WELL_FORMED = re.compile(rf"{_PREFIX}[0-9A-Za-z]{{{_RANDOM + _CHECKSUM}}}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


def generate() -> str:
    """A new key, which nobody can guess."""
    body = _PREFIX + _base62(secrets.randbits(256), _RANDOM)
    return body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Whether this may be a key at all: its parts are there, and its checksum is right."""
    return _WELL_FORMED.fullmatch(key) is not None and _checksum(key[:-_CHECKSUM]) == key[-_CHECKSUM:]


def create(connection: Connection, name: str, scope: Scope, tenant: str, now: float) -> tuple[ApiKey, str]:
    """A new key, and its text, which is nowhere else. Raises InvalidOptions, and Conflict when the name is taken."""
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
    if connection.scalar(select(keys.c.id).where(keys.c.name == name, keys.c.revoked_at.is_(None))) is not None:
        raise Conflict(f"a key {name!r} already exists: revoke it first, or choose another name")
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
    return made, text


def find(connection: Connection, text: str) -> ApiKey | None:
    """The key with this text, unless it was revoked. One that cannot be read opens nothing."""
    row = connection.execute(_OF_DIGEST, {"of_digest": _digest(text)}).mappings().one_or_none()
    try:
        return rows.key(row) if row is not None else None
    except UnreadableRow:
        return None


def list_all(connection: Connection) -> list[ApiKey]:
    """In the order of their making, those that were revoked included, but for those that cannot be read."""
    found = []
    for row in connection.execute(_KEYS.order_by(keys.c.id)).mappings().all():
        with suppress(UnreadableRow):
            found.append(rows.key(row))
    return found


def revoke(connection: Connection, reference: str, now: float) -> ApiKey:
    """Ends a key, by ID or name, for good and at once. Raises NotFound when no key that is valid goes by that."""
    by_id = keys.c.id == int(reference) if reference.isdecimal() and len(reference) < 10 else keys.c.name == reference
    ended = connection.execute(
        update(keys).where(by_id, keys.c.revoked_at.is_(None)).values(revoked_at=now).returning(*keys.c)
    )
    row = ended.mappings().one_or_none()
    if row is None:
        raise NotFound(f"there is no valid key {reference!r}: `batchserve keys list` shows all")
    return rows.key(row)


def exist(connection: Connection) -> bool:
    """Whether there was ever a key. Then every request needs one: to revoke the last one opens nothing."""
    return connection.scalar(_ANY) is not None


def has_admin(connection: Connection) -> bool:
    """Whether some valid key is an administrator's."""
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
# Asked for each request, or nearly so: built once.
_KEYS = select(*(column for column in keys.c if column.name in _FIELDS))
_OF_DIGEST = _KEYS.where(keys.c.digest == bindparam("of_digest"), keys.c.revoked_at.is_(None))
_ANY = select(keys.c.id).limit(1)
