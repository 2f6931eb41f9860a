"""One chunk is read, scored and written as a part."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import polars as pl

from batchserve.domain import Chunk, DType, ModelVersion, Options, ScoredChunk
from batchserve.errors import InvalidInput, SchemaMismatch
from batchserve.formats import get_format
from batchserve.formats.protocol import FilesReader, Reading
from batchserve.inference.answers import score
from batchserve.inference.matching import match_input, with_names
from batchserve.scoring.blank import is_blank
from batchserve.scoring.comparison import match_named
from batchserve.scoring.faults import PANICS, by_name, of_input
from batchserve.scoring.inputs import Input, header_of, storage_at
from batchserve.scoring.joining import Piece, Together, joined, of_files
from batchserve.scoring.passing import Kinds, fitted
from batchserve.scoring.planning import moved, whole
from batchserve.scoring.results import error_lines, result_of
from batchserve.scoring.sessions import keep_only, session_for
from batchserve.storage import errors_part_key, part_key


@dataclass(frozen=True, slots=True)
class ChunkTask:
    input: Input
    job_id: str
    attempt: int
    chunk: Chunk
    model: ModelVersion
    options: Options
    base: int = 0
    """Records in the job's previous inputs. A format counts only within its input."""
    further: tuple[Input, ...] = ()
    """The inputs after `input` that share the chunk, each whole."""
    first: Input | None = None
    """The first of several inputs of the job: its columns are those of the result, in its order."""
    records: tuple[int | None, ...] = ()
    """Of each input, if it is known to have the layout of the first."""
    kinds: Kinds = field(default_factory=dict)
    """The types in which columns pass through from all inputs of the job."""


def warm_up() -> None:
    """Imports what scoring needs, so that the first chunk does not wait for it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A scored chunk as it is written: its result rows, and its entries of the errors list."""

    content: bytes
    errors: bytes
    """Empty when no record failed."""
    failed: int
    facts: Mapping[str, Any]
    """See `facts.merge_facts`."""

    def scored(self, chunk: Chunk, sha256: str) -> ScoredChunk:
        """`sha256`: of the content."""
        return ScoredChunk(chunk, self.failed, len(self.content), sha256, len(self.errors), self.facts)


@by_name
def score_chunk(task: ChunkTask) -> ScoredChunk:
    """Reads a chunk, scores it, writes its part. One result row for each record, in order, or an error for all.

    A record that cannot be scored becomes a row of nulls and an entry in the part's errors.
    """
    rows, first = score_rows(task), task.chunk.first_record
    part = part_key(task.job_id, first, task.attempt)
    sha256 = store_rows(task.input.storage, rows, part, errors_part_key(task.job_id, first, task.attempt))
    return rows.scored(task.chunk, sha256)


def score_rows(task: ChunkTask) -> Rows:
    """Scores a chunk, and writes its rows into memory."""
    together = _read(task)
    match, reading, passed, chunk = together.match, together.reading, together.passed, task.chunk
    session = session_for(task.input.storage, task.model)
    scored = score(session, match, reading, chunk.records, partial(keep_only, session))
    format = get_format(task.options.format, (task.first or task.input).dialect)
    content = format.write(result_of(format, scored, passed, match))
    errors = b""
    if scored.errors:
        keys = passed[task.options.key] if task.options.key is not None else None
        errors = error_lines(scored.errors, keys, chunk.first_record, together.place if task.first else None)
    facts = {"notes": list(match.notes), "model_seconds": scored.model_seconds}
    return Rows(content, errors, int(scored.failed.sum()), facts)


def _read(task: ChunkTask) -> Together:
    """The records of a chunk, of all its inputs."""
    if task.first is not None and (together := _read_files(task, task.first)) is not None:
        return together
    pieces = _filled(task)
    read = [_read_one(task, input, chunk) for input, chunk in pieces]
    if len({tuple(piece.reading.matrices) for piece in read}) > 1:  # a small input has none
        read = [_read_one(task, input, chunk, matrices=False) for input, chunk in pieces]
    if task.first is None:
        return read[0].together()
    own_result = task.options.is_per_input
    layout = read[0].match if own_result else match_named(task.first, task.model, task.options)
    return joined(read, layout, task.kinds, with_files=task.options.input_file)


class _Apart(Exception):
    """Files cannot be read together."""


def _read_files(task: ChunkTask, first: Input) -> Together | None:
    """The records of whole inputs of one layout, read as one table. None: they are not, or cannot be."""
    counts = [records for records in task.records if records is not None]
    format = task.input.reader
    if len(counts) < 2 or len(counts) != len(task.further) + 1 or not isinstance(format, FilesReader):
        return None
    layout = match_named(first, task.model, task.options)
    with ExitStack() as opened:
        sources = [opened.enter_context(input.reading()) for input in (task.input, *task.further)]

        def read(types: Mapping[str, DType], columns: Sequence[str] | None) -> Reading:
            reading = format.read_files(sources, task.chunk.records, types, columns)
            if reading is None:
                raise _Apart
            return reading

        try:
            reading, passed = layout.read_by(read, task.chunk, task.input.reader.family)
        except (_Apart, InvalidInput, SchemaMismatch, *PANICS):
            return None  # one by one: to name the input at fault
    keys = [input.key for input in (task.input, *task.further)]
    if isinstance(passed, pl.DataFrame):
        passed = fitted(passed, task.kinds, layout.header, first.key)
    return of_files(layout, reading, passed, keys, counts, with_files=task.options.input_file)


def _filled(task: ChunkTask) -> list[tuple[Input, Chunk]]:
    """The inputs of a chunk that have records in it; one that has columns, where none has any."""
    pieces = list(_pieces(task))
    filled = [piece for piece in pieces if piece[1].records] or pieces[:1]
    if task.first is not None and not filled[0][1].records and is_blank(filled[0][0]):
        return [(task.first, whole(task.first))]
    return filled


def _pieces(task: ChunkTask) -> Iterator[tuple[Input, Chunk]]:
    """The inputs of a chunk, each with what it has of it, numbered in the input."""
    if not task.further:
        yield task.input, moved(task.chunk, -task.base)
        return
    for input in (task.input, *task.further):
        yield input, whole(input)


def _read_one(task: ChunkTask, input: Input, chunk: Chunk, *, matrices: bool = True) -> Piece:
    named = replace(input, dialect=with_names(input.dialect, task.model, task.options))
    with of_input(input):
        match = match_input(header_of(named), task.model, task.options)
        with named.reading() as source:
            reading, passed = match.read(named.reader, source, chunk, matrices=matrices)
    return Piece(input.key, chunk, match, reading, passed)


def store_rows(storage: str, rows: Rows, key: str, errors_key: str) -> str:
    """Stores rows under one key, and their errors, if there are any, under the other. Returns the SHA-256 of the
    rows."""
    store = storage_at(storage)
    with store.create(key) as writer:
        writer.write(rows.content)
        stored = writer.commit()
    if rows.errors:
        with store.create(errors_key) as writer:
            writer.write(rows.errors)
            writer.commit()
    return stored.sha256
