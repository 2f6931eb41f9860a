"""Statements to PostgreSQL that travel together: those whose results nobody needs wait for the next one.

A round trip costs more than most statements, above all in a process with busy threads, each of which waits for the
interpreter's lock after it. The pipeline of psycopg sends every statement by itself, and saves little of that: so these
are given to libpq, whose pipeline sends all at once. Each is prepared on its first use.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import psycopg
from psycopg import abc, adapt, errors, pq, waiting
from psycopg.abc import Buffer, PQGen
from psycopg.adapt import PyFormat
from psycopg.generators import fetch_many
from psycopg.pq.abc import PGresult

__all__ = ["Answer", "Pipeline"]

Row = tuple[Any, ...]

BYTEA = psycopg.postgres.types["bytea"].oid


@dataclass(slots=True)
class _Known:
    """A statement of this connection."""

    transformer: abc.Transformer
    names: dict[tuple[int, ...], bytes] = field(default_factory=dict)
    """Those under which it was prepared, by the types of its parameters."""
    has_loaders: bool = False


@dataclass(frozen=True, slots=True)
class _Bound:
    """A statement with its values, ready to be sent."""

    statement: str
    known: _Known
    values: Sequence[Buffer | None]
    types: tuple[int, ...]
    formats: Sequence[pq.Format]


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of a statement."""

    result: PGresult
    _known: _Known

    @property
    def changed(self) -> int:
        """The number of changed rows, or of those found."""
        return self.result.command_tuples or 0

    def codes(self) -> list[int]:
        """The types of the columns."""
        return [self.result.ftype(number) for number in range(self.result.nfields)]

    def rows(self) -> list[Row]:
        transformer = self._known.transformer
        transformer.set_pgresult(self.result, set_loaders=not self._known.has_loaders)
        self._known.has_loaders = True
        try:
            return transformer.load_rows(0, self.result.ntuples, tuple)
        finally:
            transformer.set_pgresult(None, set_loaders=False)


class Pipeline:
    """The statements of a connection. It is used by one thread at a time."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection, self._libpq = connection, connection.pgconn
        self._waiting: list[_Bound] = []
        self._known: dict[str, _Known] = {}
        self._prepared = 0

    def put(self, statement: str, values: Sequence[Any] = ()) -> None:
        """Sends a statement, whose parameters are numbered, together with the next one that is `run`. That raises its
        errors, but for those of the values."""
        known = self._known.get(statement)
        if known is None:
            known = self._known[statement] = _Known(adapt.Transformer(self._connection))
        are_bytes = [isinstance(value, bytes) for value in values]
        formats = [PyFormat.BINARY if is_bytes else PyFormat.TEXT for is_bytes in are_bytes]
        bound = known.transformer.dump_sequence(values, formats)
        # The server knows the types of the others. Those of psycopg differ by the size of a number.
        types = tuple(BYTEA if is_bytes else 0 for is_bytes in are_bytes)
        self._waiting.append(_Bound(statement, known, bound, types, known.transformer.formats or ()))

    def run(self, statement: str, values: Sequence[Any] = ()) -> Answer:
        """Sends all that waits, and this statement. Raises psycopg.Error for the first that fails: those after it are
        not executed."""
        self.put(statement, values)
        return self._send()

    def settle(self) -> None:
        """Sends what waits."""
        if self._waiting:
            self._send()

    def drop(self) -> None:
        """Forgets what waits."""
        self._waiting.clear()

    @property
    def waiting(self) -> bool:
        """Whether a statement waits."""
        return bool(self._waiting)

    def _send(self) -> Answer:
        sent, self._waiting = self._waiting, []
        steps: list[_Named | None] = []
        """For each answer, the statement that is prepared by it."""
        self._libpq.enter_pipeline_mode()
        try:
            for bound in sent:
                name = self._name(bound, steps)
                self._libpq.send_query_prepared(name, bound.values, bound.formats)
                steps.append(None)
            self._libpq.pipeline_sync()
            results = self._connection.wait(self._exchange(len(steps) + 1))
            if self._libpq.status == pq.ConnStatus.OK:
                self._libpq.exit_pipeline_mode()
        except BaseException:
            self._libpq.finish()  # what it still answers could be taken for the answer to something else
            raise
        self._require_done(steps, results)
        return Answer(results[-2], sent[-1].known)

    def _name(self, bound: _Bound, steps: list["_Named | None"]) -> bytes:
        """Of the prepared statement. A new one is sent to be prepared."""
        name = bound.known.names.get(bound.types)
        if name is not None:
            return name
        for step in steps:
            if step is not None and (step.bound.statement, step.bound.types) == (bound.statement, bound.types):
                return step.name
        self._prepared += 1
        name = f"batchserve_{self._prepared}".encode()
        self._libpq.send_prepare(name, bound.statement.encode(), bound.types)
        steps.append(_Named(bound, name))
        return name

    def _exchange(self, answers: int) -> PQGen[list[PGresult]]:
        while self._libpq.flush():
            ready = yield waiting.Wait.RW
            if ready & waiting.Ready.R:  # a server that waits to send reads nothing
                self._libpq.consume_input()
        found: list[PGresult] = []
        for _ in range(answers):
            results = yield from fetch_many(self._libpq)
            found += results
            if not results or self._libpq.status != pq.ConnStatus.OK:
                break
        return found

    def _require_done(self, steps: Iterable["_Named | None"], results: Iterable[PGresult]) -> None:
        """Raises psycopg.Error for a statement that has failed."""
        for step, result in zip_longest((*steps, None), results):
            if result is None:
                self._libpq.finish()
                raise psycopg.OperationalError("the connection was lost")
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise errors.error_from_result(result, encoding=self._connection.info.encoding)
            if step is not None:
                step.bound.known.names[step.bound.types] = step.name


@dataclass(frozen=True, slots=True)
class _Named:
    """A statement and the name under which it is prepared."""

    bound: _Bound
    name: bytes
