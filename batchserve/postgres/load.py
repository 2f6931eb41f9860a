"""The rows of a result go into a table exactly once.

Each chunk is copied, in a transaction of its own, into an unlogged staging table of its job. When all are there, one
transaction moves the rows into the table, and notes the job in a ledger: a job that is in it is done. Attempts at one
job take turns, by a lock of the session; and the transaction that moves the rows counts them for each chunk. So a
process may be killed at any point, and the server too, which empties an unlogged table after a crash: what is missing
is copied again.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
import psycopg
from psycopg import IsolationLevel, sql

from batchserve.domain import TableTarget
from batchserve.errors import LocationRefused, TableMismatch, Unavailable
from batchserve.postgres import Place
from batchserve.postgres.columns import Column, columns_of, identifiers, made_for, require_fit, texts_of
from batchserve.postgres.connection import connected

__all__ = ["Piece", "drop_staging", "load", "staged_jobs", "staging_of"]

LEDGER = "batchserve_jobs"
_STAGING = "batchserve_staging_"
_CHUNK = "batchserve_chunk"
_TURN = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
_END_TURN = "SELECT pg_advisory_unlock(hashtextextended(%s, 0))"
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"
_RELATION = """
    SELECT c.oid, c.relkind
    FROM pg_catalog.pg_namespace AS n LEFT JOIN pg_catalog.pg_class AS c ON c.relnamespace = n.oid AND c.relname = %s
    WHERE n.nspname = %s
"""
_DURABLE = "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off'"
_TABLES = ("r", "p")


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows of a chunk: `first` is the number of its first record."""

    first: int
    records: int


def load(
    place: Place,
    target: TableTarget,
    job_id: str,
    schema: Mapping[str, pl.DataType],
    pieces: Sequence[Piece],
    read: Callable[[Piece], pl.DataFrame],
) -> None:
    """Puts the rows of a job into its table, unless they are there already. `schema`: of all rows.

    Raises TableMismatch and LocationRefused, when no row is visible; Unavailable and InsufficientStorage, after which
    it is to be called again.
    """
    with connected(place, target.shown) as connection:
        connection.isolation_level, connection.read_only = IsolationLevel.READ_COMMITTED, False
        if connection.execute(_TURN, [_subject(job_id)]).fetchone() != (True,):
            raise Unavailable(f"{target.shown}: an earlier attempt at this job is not over yet")
        _Load(connection, target, job_id, schema, _home(connection, place)).run(pieces, read)


def _subject(job_id: str) -> str:
    """Of the lock by which attempts at a job take turns."""
    return f"batchserve job {job_id}"


def _home(connection: psycopg.Connection[Any], place: Place) -> str:
    """The schema of the ledger and of the staging tables, with the ledger."""
    (home,) = _one(connection.execute("SELECT current_schema()"))
    if home is None:
        raise LocationRefused(f"{place.name}: the search path of this database names no schema for the ledger of jobs")
    with connection.transaction():
        connection.execute(_LOCK, [LEDGER])
        connection.execute(
            sql.SQL(
                "CREATE TABLE IF NOT EXISTS {} (job_id text PRIMARY KEY, target text NOT NULL, mode text NOT NULL, "
                "rows bigint NOT NULL, committed_at timestamp with time zone NOT NULL DEFAULT now())"
            ).format(sql.Identifier(home, LEDGER))
        )
    return str(home)


class _Load:
    """The rows of one job on their way into a table."""

    def __init__(
        self,
        connection: psycopg.Connection[Any],
        target: TableTarget,
        job_id: str,
        schema: Mapping[str, pl.DataType],
        home: str,
    ) -> None:
        self._connection, self._target, self._job_id, self._schema = connection, target, job_id, schema
        self._ledger, self._staging = sql.Identifier(home, LEDGER), sql.Identifier(home, staging_of(job_id))
        self._home = home
        self._table = sql.Identifier(target.schema, target.table)
        self._chunk = _CHUNK
        while self._chunk in schema:
            self._chunk += "_"

    def run(self, pieces: Sequence[Piece], read: Callable[[Piece], pl.DataFrame]) -> None:
        done = sql.SQL("SELECT 1 FROM {} WHERE job_id = %s").format(self._ledger)
        if self._connection.execute(done, [self._job_id]).fetchone() is not None:
            return
        columns = self._columns()
        self._make_staging(columns)
        staged = self._staged()
        if not staged.keys() <= {piece.first for piece in pieces}:
            self._connection.execute(sql.SQL("TRUNCATE {}").format(self._staging))
            staged = {}
        for piece in pieces:
            if staged.get(piece.first) != piece.records:
                texts = texts_of(read(piece), columns, self._target.shown)
                self._copy(piece, texts, columns, is_replaced=piece.first in staged)
        self._publish(columns, pieces)

    # --- the table ---

    def _columns(self) -> list[Column]:
        """Those that the rows fill: of the table, or of the one that is to be made."""
        table = self._oid()
        if table is None:
            return made_for(self._schema, self._target.shown)
        return require_fit(columns_of(self._connection, table), self._schema, self._target.shown)

    def _oid(self) -> int | None:
        """None: there is no table of this name. Raises LocationRefused and TableMismatch."""
        target = self._target
        found = self._connection.execute(_RELATION, [target.table, target.schema]).fetchone()
        if found is None:
            raise LocationRefused(f"{target.shown}: there is no schema {target.schema!r}")
        if found[0] is not None and found[1] not in _TABLES:
            raise TableMismatch(f"{target.shown} is not a table")
        return None if found[0] is None else int(found[0])

    # --- staging ---

    def _make_staging(self, columns: Sequence[Column]) -> None:
        """An empty one replaces that of an earlier attempt if the columns of the table have changed since."""
        wanted = [(self._chunk, "bigint"), *((column.name, column.type) for column in columns)]
        with self._connection.transaction():
            found = self._connection.execute(_RELATION, [staging_of(self._job_id), self._home]).fetchone()
            if found is not None and found[0] is not None:
                there = [(column.name, column.type) for column in columns_of(self._connection, found[0])]
                if there == wanted:
                    return
                self._connection.execute(sql.SQL("DROP TABLE {}").format(self._staging))
            fields = sql.SQL(", ").join(
                sql.SQL("{} {}").format(sql.Identifier(name), sql.SQL(kind)) for name, kind in wanted
            )
            self._connection.execute(sql.SQL("CREATE UNLOGGED TABLE {} ({})").format(self._staging, fields))

    def _staged(self) -> dict[int, int]:
        """The number of rows by the first record of their chunk."""
        chunk = sql.Identifier(self._chunk)
        counted = sql.SQL("SELECT {}, count(*) FROM {} GROUP BY 1").format(chunk, self._staging)
        return {int(first): int(rows) for first, rows in self._connection.execute(counted).fetchall()}

    def _copy(self, piece: Piece, texts: pl.DataFrame, columns: Sequence[Column], *, is_replaced: bool) -> None:
        """`is_replaced`: whether some of the chunk is there, of an attempt whose lock was lost."""
        chunk = sql.Identifier(self._chunk)
        numbered = texts.with_columns(pl.lit(piece.first, pl.Int64).alias(self._chunk))
        rows = numbered.select(self._chunk, *texts.columns)
        content = io.BytesIO()
        rows.write_csv(content, include_header=False, quote_style="non_numeric")
        into = sql.SQL("COPY {} ({}, {}) FROM STDIN (FORMAT csv)").format(self._staging, chunk, identifiers(columns))
        with self._connection.transaction():
            if is_replaced:
                removal = sql.SQL("DELETE FROM {} WHERE {} = %s").format(self._staging, chunk)
                self._connection.execute(removal, [piece.first])
            with self._connection.cursor() as cursor:
                with cursor.copy(into) as copy:
                    copy.write(content.getbuffer())
                if cursor.rowcount != piece.records:
                    raise Unavailable(f"{self._target.shown}: copied {cursor.rowcount} of {piece.records} rows")

    # --- the end ---

    def _publish(self, columns: Sequence[Column], pieces: Sequence[Piece]) -> None:
        """All rows become visible, in the transaction that notes the job."""
        connection, target, records = self._connection, self._target, sum(piece.records for piece in pieces)
        names = identifiers(columns)
        with connection.transaction():
            connection.execute(_DURABLE)
            note = sql.SQL("INSERT INTO {} (job_id, target, mode, rows) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING")
            values = [self._job_id, f"{target.schema}.{target.table}", target.mode, records]
            if not connection.execute(note.format(self._ledger), values).rowcount:
                return  # by an attempt whose lock was lost
            self._hold_table(columns)
            connection.execute(sql.SQL("LOCK TABLE {} IN ACCESS EXCLUSIVE MODE").format(self._staging))
            expected = {piece.first: piece.records for piece in pieces if piece.records}
            if self._staged() != expected:
                raise Unavailable(f"{target.shown}: rows were lost before they were visible: they are copied again")
            if target.mode == "replace":
                connection.execute(sql.SQL("DELETE FROM {}").format(self._table))
            insert = sql.SQL("INSERT INTO {} ({}) SELECT {} FROM {}").format(self._table, names, names, self._staging)
            inserted = connection.execute(insert).rowcount
            if inserted != records:
                raise TableMismatch(
                    f"{target.shown} took {inserted} of {records} rows: a trigger or a rule left some out"
                )
            connection.execute(sql.SQL("DROP TABLE {}").format(self._staging))

    def _hold_table(self, columns: Sequence[Column]) -> None:
        """Makes the table if there is none, and keeps its columns as they are until the end of the transaction; a
        replacement waits for other writers, and is not seen in part by the next one."""
        self._connection.execute(_LOCK, [f"batchserve table {self._target.schema}.{self._target.table}"])
        if self._oid() is None:
            fields = sql.SQL(", ").join(
                sql.SQL("{} {}").format(sql.Identifier(column.name), sql.SQL(column.type)) for column in columns
            )
            self._connection.execute(sql.SQL("CREATE TABLE {} ({})").format(self._table, fields))
        mode = "SHARE ROW EXCLUSIVE" if self._target.mode == "replace" else "ROW EXCLUSIVE"
        self._connection.execute(sql.SQL("LOCK TABLE {} IN {} MODE").format(self._table, sql.SQL(mode)))
        if [(column.name, column.type) for column in self._columns()] != [(c.name, c.type) for c in columns]:
            raise Unavailable(f"{self._target.shown} was changed while rows were copied: they are copied again")


def _one(cursor: psycopg.Cursor[Any]) -> tuple[Any, ...]:
    row = cursor.fetchone()
    assert row is not None
    return tuple(row)


# --- leftovers -------------------------------------------------------------------------------------------------------


def staging_of(job_id: str) -> str:
    return f"{_STAGING}{job_id.replace('-', '')}"


def staged_jobs(place: Place) -> list[str]:
    """The jobs that have a staging table."""
    query = """
        SELECT relname FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
        WHERE n.nspname = current_schema() AND c.relkind = 'r' AND starts_with(c.relname, %s) ORDER BY relname
    """
    with connected(place, place.name) as connection:
        names = [str(name) for (name,) in connection.execute(query, [_STAGING]).fetchall()]
    ids = (name.removeprefix(_STAGING) for name in names)
    return [f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}" for h in ids if len(h) == 32]


def drop_staging(place: Place, jobs: Sequence[str]) -> int:
    """Removes the staging tables of jobs that have ended, but for one with an attempt under way; returns how many."""
    dropped = 0
    with connected(place, place.name) as connection:
        (home,) = _one(connection.execute("SELECT current_schema()"))
        for job_id in jobs:
            if connection.execute(_TURN, [_subject(job_id)]).fetchone() == (True,):
                name = sql.Identifier(str(home), staging_of(job_id))
                connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(name))
                connection.execute(_END_TURN, [_subject(job_id)])
                dropped += 1
    return dropped
