"""An SQLite database that was moved elsewhere: it is read as before, and refuses what would change it."""

from collections.abc import Sequence

from sqlalchemy import Connection, Table, make_url, text

from batchserve.db.connect import Database
from batchserve.errors import InvalidOptions

__all__ = ["close", "reopen", "require_open"]

_NAME = "batchserve_moved"


def close(connection: Connection, tables: Sequence[Table]) -> None:
    """Refuses every further write to these tables, by this process and by all others. May be repeated."""
    for name, on in _triggers(tables):
        refusal = "BEGIN SELECT RAISE(ABORT, 'this installation was moved to other addresses'); END"
        connection.execute(text(f"CREATE TRIGGER IF NOT EXISTS {name} BEFORE {on} {refusal}"))


def reopen(connection: Connection, tables: Sequence[Table]) -> None:
    for name, _ in _triggers(tables):
        connection.execute(text(f"DROP TRIGGER IF EXISTS {name}"))


def require_open(database: Database) -> None:
    """Raises InvalidOptions for a database that is closed."""
    url = make_url(database.url)
    if url.get_backend_name() != "sqlite":
        return
    known = text("SELECT count(*) FROM sqlite_master WHERE name LIKE :name").bindparams(name=f"{_NAME}%")
    with database.read() as connection:
        found = connection.scalar(known)
    if found:
        raise InvalidOptions(
            f"the database {url.database} was moved by `batchserve migrate-to`: set BATCHSERVE_DATABASE and "
            "BATCHSERVE_STORAGE to its new addresses"
        )


def _triggers(tables: Sequence[Table]) -> list[tuple[str, str]]:
    """The name of each, and what it is about."""
    return [
        (f"{_NAME}_{table.name}_{operation.lower()}", f"{operation} ON {table.name}")
        for table in tables
        for operation in ("INSERT", "UPDATE", "DELETE")
    ]
