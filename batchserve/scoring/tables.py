"""Results go into tables of databases of others, and the rows of queries become inputs."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import accumulate
from typing import IO, BinaryIO

import polars as pl

from batchserve.domain import StoredInput, TableTarget
from batchserve.errors import PayloadTooLarge, SchemaMismatch
from batchserve.formats import get_format
from batchserve.formats.protocol import Part
from batchserve.postgres import Place
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import storage_at
from batchserve.storage import Composed, Span, Storage, Stored, scratch_folder
from batchserve.storage.disk import full_disk_named

__all__ = ["FORMAT", "QueryTask", "read_query", "write_table"]

FORMAT = "parquet"
"""Of the rows of a query, and of the parts of a result that goes into a table: it has types."""


@dataclass(frozen=True, slots=True)
class QueryTask:
    storage: str
    key: str
    """Under which the rows are stored."""
    place: Place
    text: str
    seconds: float
    most_bytes: int


@by_name
def read_query(task: QueryTask) -> StoredInput:
    """Reads the rows of a query once, and stores them as an input. Raises QueryRefused, LocationRefused, and
    PayloadTooLarge for more bytes than an input may have."""
    from batchserve.postgres.query import rows_of_query  # psycopg is an extra

    store, format = storage_at(task.storage), get_format(FORMAT)
    with full_disk_named(), tempfile.TemporaryFile(dir=scratch_folder(store)) as spool:
        parts: list[Part] = []
        size = 0

        def keep(frame: pl.DataFrame) -> None:
            nonlocal size
            content = format.write(frame)
            parts.append(Part(f"{size}-{size + len(content)}", len(content), frame.height))
            spool.write(content)
            size += len(content)
            if size > task.most_bytes:
                raise PayloadTooLarge(f"the rows of the query have more than {task.most_bytes} bytes")

        with rows_of_query(task.place, task.text, task.seconds) as rows:
            for frame in rows.frames:
                keep(frame)
            if not parts:
                keep(pl.DataFrame(schema=rows.schema))
        stored = _assembled(store, task.key, parts, spool)
    return StoredInput(task.key, FORMAT, bytes=stored.bytes, sha256=stored.sha256)


def _assembled(store: Storage, key: str, parts: Sequence[Part], spool: IO[bytes]) -> Stored:
    """One object of all parts, each of which is named after its place in the spool."""

    def content(place: str) -> bytes:
        start, stop = map(int, place.split("-"))
        spool.seek(start)
        return spool.read(stop - start)

    def open(key: str) -> BinaryIO:
        return BytesIO(content(key))

    with store.create(key) as writer:
        if len(parts) == 1:
            writer.write(content(parts[0].key))
        else:
            for piece in get_format(FORMAT).assemble(parts, open, sum(part.records for part in parts)):
                writer.write(content(piece.key)[piece.start : piece.stop] if isinstance(piece, Span) else piece)
        return writer.commit()


@by_name
def write_table(store: Storage, place: Place, target: TableTarget, job_id: str, parts: Sequence[Part]) -> Composed:
    """Puts the rows of all parts into a table, exactly once however often it is called for a job. Raises as
    `postgres.load.load` does."""
    from batchserve.postgres.load import Piece, load  # psycopg is an extra

    firsts = accumulate((part.records for part in parts), initial=0)
    pieces = [Piece(first, part.records) for first, part in zip(firsts, parts, strict=False)]
    keys = {piece.first: part.key for piece, part in zip(pieces, parts, strict=True)}
    with store.open(parts[0].key) as source:
        schema = dict(pl.read_parquet_schema(source))

    def read(piece: Piece) -> pl.DataFrame:
        with store.open(keys[piece.first]) as source:
            frame = pl.read_parquet(BytesIO(source.read()))
        if dict(frame.schema) != schema:
            raise SchemaMismatch(
                f"the rows from record {piece.first} on have other columns or types than the first ones"
            )
        return frame

    load(place, target, job_id, schema, pieces, read)
    return Composed(sum(part.bytes for part in parts), None)
