"""Parts are put together into a result."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from batchserve.domain import CommittedChunk, Dialect, Result
from batchserve.formats import get_format
from batchserve.formats.protocol import Open, Part
from batchserve.scoring.inputs import storage_at
from batchserve.storage import Piece, ReadsAhead, Span, Storage, errors_key, errors_part_key, part_key, result_key

ERRORS_FORMAT = "jsonl"
_AHEAD = 6
"""Parts that are fetched before they are needed."""


@dataclass(frozen=True, slots=True)
class AssembleTask:
    storage: str
    job_id: str
    attempt: int
    format: str
    dialect: Dialect
    parts: tuple[Part, ...]
    errors: tuple[Part, ...]


def stored_parts(job_id: str, done: Iterable[CommittedChunk]) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of committed chunks (`plan.done_chunks`) and of their error lists, in order."""
    parts, errors = [], []
    for committed in done:
        first, attempt, records = committed.chunk.first_record, committed.attempt, committed.chunk.records
        parts.append(Part(part_key(job_id, first, attempt), committed.part_bytes, records))
        if committed.errors_bytes:
            errors.append(Part(errors_part_key(job_id, first, attempt), committed.errors_bytes, records))
    return tuple(parts), tuple(errors)


def assemble_result(task: AssembleTask) -> Result:
    """Concatenates the parts into the result object, and their error lists into another one."""
    store = storage_at(task.storage)
    key = result_key(task.job_id, task.attempt)
    stored = store.compose(key, assembled_pieces(store, task.format, task.dialect, task.parts))
    errors = errors_key(task.job_id, task.attempt) if task.errors else None
    size = store.compose(errors, _errors_pieces(store, task.errors)).bytes if errors else 0
    return Result(key, stored.bytes, stored.sha256, errors, size)


def assembled_pieces(store: Storage, format: str, dialect: Dialect, parts: Sequence[Part]) -> Iterator[Piece]:
    """The pieces of one file made of all parts. A part is a complete file: a single one is the result."""
    if len(parts) == 1:
        return iter([Span(parts[0].key, 0, parts[0].bytes)])
    return get_format(format, dialect).assemble(parts, _open_ahead(store, parts), sum(part.records for part in parts))


def _open_ahead(store: Storage, parts: Sequence[Part]) -> Open:
    """Opens parts, of which the next ones are fetched meanwhile where that takes requests. Formats open the first one
    alone, or all of them in order."""
    if not isinstance(store, ReadsAhead):
        return store.open
    reading, places, asked = store, {part.key: place for place, part in enumerate(parts)}, 0

    def open(key: str) -> BinaryIO:
        nonlocal asked
        until = places[key] + _AHEAD if places[key] else 0
        for part in parts[max(asked, places[key]) : until]:
            reading.read_ahead(part.key, part.bytes)
        asked = max(asked, until)
        return store.open(key)

    return open


def _errors_pieces(store: Storage, parts: Sequence[Part]) -> Iterator[Piece]:
    return get_format(ERRORS_FORMAT).assemble(parts, store.open, sum(part.records for part in parts))
