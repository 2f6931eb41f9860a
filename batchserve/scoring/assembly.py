"""Parts are put together into a result."""

import io
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

from batchserve.domain import AttemptTarget, CommittedChunk, Dialect, Result, TableTarget, Target
from batchserve.formats import get_format
from batchserve.formats.protocol import Open, Part
from batchserve.postgres import Place
from batchserve.scoring.blank import is_blank
from batchserve.scoring.chunks import ChunkTask, score_rows
from batchserve.scoring.inputs import storage_at
from batchserve.scoring.leftovers import remove_leftovers
from batchserve.scoring.planning import WHOLE, whole
from batchserve.scoring.tables import write_table
from batchserve.scoring.targets import AT_ONCE, write_object, write_partitions
from batchserve.storage import (
    Composed,
    Piece,
    ReadsAhead,
    Span,
    Storage,
    Writer,
    errors_key,
    errors_part_key,
    part_key,
    result_key,
    target_key,
)

ERRORS_FORMAT = "jsonl"
_BLOCK = 8 * 2**20
_MIN_COPY_RATE = 20e6
"""Bytes of parts that every disk should copy, hash and sync in a second."""
_MIN_TABLE_RATE = 0.5e6
"""Bytes of parts that every database should take in a second."""
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
    target: Target | None = None
    """Where its owner wants the result; None: in the storage."""
    outputs: tuple["Output", ...] = ()
    """Its results, if it has several, or a target."""
    table: TableTarget | None = None
    """The table that its rows go to, in place of an object."""
    place: Place | None = None
    """The database of the table."""

    @property
    def most_seconds(self) -> float:
        """How long it may take to copy the parts."""
        return sum(part.bytes for part in self.parts) / (_MIN_COPY_RATE if self.table is None else _MIN_TABLE_RATE)


@dataclass(frozen=True, slots=True)
class Output:
    """One result of several, or in a target."""

    name: str
    """Its address, or its name in an archive."""
    parts: tuple[Part, ...]
    """() for an input without records."""
    empty: ChunkTask | None = None
    """Of such an input, to be scored for the columns of its result."""


def stored_parts(job_id: str, done: Iterable[CommittedChunk]) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of committed chunks (`plan.done_chunks`) and of their error lists, in order."""
    parts, errors = [], []
    for committed in done:
        first, attempt, records = committed.chunk.first_record, committed.attempt, committed.chunk.records
        parts.append(Part(part_key(job_id, first, attempt), committed.part_bytes, records))
        if committed.errors_bytes:
            errors.append(Part(errors_part_key(job_id, first, attempt), committed.errors_bytes, records))
    return tuple(parts), tuple(errors)


def outputs_of(names: Sequence[str], done: Sequence[CommittedChunk], parts: Sequence[Part]) -> tuple[Output, ...]:
    """The result of each input. `names`: in the order of the inputs; `parts`: of the committed chunks."""
    of_input: dict[int, list[Part]] = {}
    for committed, part in zip(done, parts, strict=True):
        of_input.setdefault(committed.chunk.input, []).append(part)
    return tuple(Output(name, tuple(of_input.get(number, ()))) for number, name in enumerate(names))


def assemble_result(task: AssembleTask) -> Result:
    """Concatenates the parts into the result object, and their error lists into another one."""
    store = storage_at(task.storage)
    if task.table is not None and task.place is not None:
        key = target_key(task.job_id, task.attempt)
        stored = write_table(store, task.place, task.table, task.job_id, task.parts)
    elif task.target is None and task.outputs:
        key = result_key(task.job_id, task.attempt)
        stored = write_archive(store, key, task)
    elif task.target is None:
        key = result_key(task.job_id, task.attempt)
        stored = store.compose(key, assembled_pieces(store, task.format, task.dialect, task.parts))
    else:
        key = target_key(task.job_id, task.attempt)
        stored = write_outputs(store, task)
    errors = errors_key(task.job_id, task.attempt) if task.errors else None
    size = store.compose(errors, _errors_pieces(store, task.errors)).bytes if errors else 0
    return Result(key, stored.bytes, stored.sha256, errors, size)


def write_outputs(store: Storage, task: AssembleTask) -> Composed:
    """Writes all results of a job into its target, each whole. Raises TargetExists and LocationRefused."""
    assert task.target is not None
    asked = task.target
    target = AttemptTarget(asked.url, asked.root, asked.overwrite, asked.partition_by, task.job_id, task.attempt)
    remove_leftovers(target, [output.name for output in task.outputs])
    if target.partition_by is not None:
        return write_partitions(store, target, target.partition_by, task.parts)
    write = partial(_write_output, store, task, target)
    with ThreadPoolExecutor(AT_ONCE) as threads:
        written = list(threads.map(write, task.outputs))
    digest = written[0].sha256 if len(written) == 1 else None
    return Composed(sum(one.bytes for one in written), digest)


def _write_output(store: Storage, task: AssembleTask, target: Target, output: Output) -> Composed:
    return write_object(target, output.name, _content(store, task, output))


def write_archive(store: Storage, key: str, task: AssembleTask) -> Composed:
    """Stores a ZIP of all results, which are not compressed: equal results give equal bytes."""
    with store.create(key) as writer:
        with zipfile.ZipFile(_Appended(writer), "w") as archive:
            for output in task.outputs:
                entry = zipfile.ZipInfo(output.name)
                with archive.open(entry, "w", force_zip64=True) as file:
                    for block in _content(store, task, output):
                        file.write(block)
        return writer.commit()


class _Appended(io.RawIOBase):
    """A writer as a file that takes bytes and knows no positions."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._writer.write(bytes(data))
        return len(data)


def _content(store: Storage, task: AssembleTask, output: Output) -> Iterator[bytes]:
    """The bytes of one result."""
    if output.parts:
        pieces = assembled_pieces(store, task.format, task.dialect, output.parts)
    else:
        pieces = iter([_without_records(store, task, output.empty)])
    return _blocks(store, pieces)


def _blocks(store: Storage, pieces: Iterable[Piece]) -> Iterator[bytes]:
    for piece in pieces:
        if isinstance(piece, Span):
            for start in range(piece.start, piece.stop, _BLOCK):
                yield store.read(piece.key, start, min(start + _BLOCK, piece.stop))
        else:
            yield piece


def _without_records(store: Storage, task: AssembleTask, empty: ChunkTask | None) -> bytes:
    """A result with no record and the columns that the input has. One that has none either, such as a file of no bytes,
    gets those of another."""
    if empty is not None and not is_blank(empty.input):
        return score_rows(replace(empty, chunk=whole(empty.input))).content
    format = get_format(task.format, task.dialect)
    part = min(task.parts, key=lambda part: part.bytes)
    with store.open(part.key) as source:
        chunk = next(format.plan(source, None, WHOLE))
        records = format.read(source, chunk, {}).records
    if isinstance(records, dict):
        return format.write({name: array[:0] for name, array in records.items()})
    return format.write(records.clear())


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
