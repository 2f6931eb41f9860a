"""Connections to databases of others, and their errors by name."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from batchserve.errors import (
    BatchserveError,
    InsufficientStorage,
    InvalidOptions,
    LocationRefused,
    TableMismatch,
    Unavailable,
)
from batchserve.postgres import Place

__all__ = ["connected", "first_line", "passing"]

_CONNECT_TIMEOUT = 10
_SILENCE = 30_000
"""Milliseconds after which bytes that the server does not acknowledge end a connection."""
_LOCK_TIMEOUT = "30s"
"""After which a job waits, and tries again, while others hold a table."""
_SESSION = """
    SELECT set_config(wanted.name, wanted.value, false)
    FROM (VALUES
        ('TimeZone', 'UTC'), ('DateStyle', 'ISO, YMD'), ('extra_float_digits', '1'), ('bytea_output', 'hex'),
        ('lock_timeout', %s), ('idle_in_transaction_session_timeout', '120s')
    ) AS wanted (name, value)
"""
_REFUSED = re.compile(
    r"authentication failed|no pg_hba\.conf entry|no password supplied|does not exist|permission denied|"
    r"not permitted to log in|not currently accepting connections|certificate"
)
"""What a server says to those whom it does not let in; there is no code."""
_PASSING = ("08", "57P0", "53200", "53300", "55P03", "25006", "25P03", "25P04", "40001", "40P01")
"""Beginnings of codes: of a lost connection, a server that stops or starts, a lack of memory or connections, a lock
that others hold, a standby, a transaction ended for its silence, and one undone for the sake of another."""
_FULL = "53100"
_REFUSALS = ("28", "42501", "3D000", "3F000")
"""Of a user who may not, a database and a schema that do not exist."""


@contextmanager
def connected(place: Place, what: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection on which each statement is a transaction, unless one is begun. `what`: named in errors.

    Raises Unavailable when the server does not respond, InsufficientStorage when its disk is full, LocationRefused when
    it refuses, and TableMismatch for any other error of a statement.
    """
    with _failures_named(what), psycopg.connect(autocommit=True, **_arguments(place)) as connection:
        connection.execute(_SESSION, [_LOCK_TIMEOUT])
        with suppress(psycopg.errors.DataError, psycopg.errors.ProgrammingError):  # not every server has it
            connection.execute("SET client_connection_check_interval = '5s'")
        yield connection


def _arguments(place: Place) -> dict[str, Any]:
    try:
        given = conninfo_to_dict(place.address)
    except psycopg.ProgrammingError:  # its text may have the password
        raise InvalidOptions(
            f"the address of the database {place.name} is not valid: its administrator corrects BATCHSERVE_TABLES"
        ) from None
    usual = {
        "connect_timeout": _CONNECT_TIMEOUT,
        "tcp_user_timeout": _SILENCE,
        "keepalives_idle": 10,
        "keepalives_interval": 10,
        "keepalives_count": 3,
        "application_name": "batchserve",
    }
    return {**usual, **given, "client_encoding": "UTF8"}


@contextmanager
def _failures_named(what: str) -> Iterator[None]:
    try:
        yield
    except psycopg.Error as error:
        raise (passing(error, what) or TableMismatch(f"{what}: {_said(error)}")) from error


def passing(error: psycopg.Error, what: str) -> BatchserveError | None:
    """The error of a server that is out of reach, full, or refuses; None for a fault of a statement or its values."""
    state = error.sqlstate
    if state is None:
        if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
            return None
        said = first_line(error)
        if _REFUSED.search(str(error)):
            return LocationRefused(f"{what}: the database refuses the connection: {said}")
        return Unavailable(f"{what}: the database does not respond: {said}")
    if state == _FULL:
        return InsufficientStorage(f"{what}: the disk of the database is full")
    if state.startswith(_PASSING):
        return Unavailable(f"{what}: the database does not respond: {first_line(error)}")
    if state.startswith(_REFUSALS):
        return LocationRefused(f"{what}: the database refuses: {first_line(error)}")
    return None


def first_line(error: psycopg.Error) -> str:
    said = error.diag.message_primary or str(error)
    return next(iter(said.splitlines()), type(error).__name__)


def _said(error: psycopg.Error) -> str:
    """With the column, and what the server says in detail."""
    found = re.search(r'column ([^:"]+)(?::|$)', error.diag.context or "")
    column = error.diag.column_name or (found[1] if found else None)
    detail = f" ({error.diag.message_detail})" if error.diag.message_detail else ""
    return f"{f'column {column!r}: ' if column else ''}{first_line(error)}{detail}"
