"""The records of several inputs that share a chunk, as one table."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import polars as pl

from batchserve.domain import INPUT_FILE, Chunk
from batchserve.errors import UnlikeInputs
from batchserve.formats.protocol import Matrix, Reading, Records
from batchserve.inference.matching import Match
from batchserve.scoring.comparison import unlike
from batchserve.scoring.passing import Kinds, fitted


@dataclass(frozen=True, slots=True)
class Piece:
    """What one input has of a chunk."""

    key: str
    """Of the input."""
    chunk: Chunk
    """Numbered in the input."""
    match: Match
    reading: Reading
    passed: Records

    def together(self) -> "Together":
        """This piece as a whole chunk."""
        return Together(self.match, self.reading, self.passed, (self.start,), (0,))

    @property
    def start(self) -> tuple[str, int]:
        return self.key, self.chunk.first_record


@dataclass(frozen=True, slots=True)
class Together:
    """All records of a chunk."""

    match: Match
    reading: Reading
    passed: Records
    """Columns or arrays that pass through to the result; the key of a record, if one is wanted, is among them."""
    places: Sequence[tuple[str, int]]
    """Of the first record of each piece: its input, and its number in it."""
    starts: Sequence[int]
    """The number in the chunk of the first record of each piece."""

    def place(self, record: int) -> Mapping[str, Any]:
        """The input of a record of the chunk, and the record's number in it."""
        number = bisect_right(self.starts, record) - 1
        key, first = self.places[number]
        return {INPUT_FILE: key, "input_record": first + record - self.starts[number]}


def joined(pieces: Sequence[Piece], layout: Match, kinds: Kinds, *, with_files: bool) -> Together:
    """The records of all pieces in order. `layout`: of the first input of the job, whose columns the result has.
    `kinds`: the types of these. `with_files`: whether the name of the input passes through with each record. Raises
    UnlikeInputs."""
    filled = [piece for piece in pieces if piece.chunk.records] or pieces[:1]
    counts = [piece.chunk.records for piece in filled]
    starts = [0, *accumulate(counts)][:-1]
    keys = [piece.key for piece in filled]
    passed = _joined_records([_laid_out(piece, layout, kinds) for piece in filled], keys)
    if with_files:
        passed = _with_files(passed, keys, counts)
    reading = filled[0].reading if len(filled) == 1 else _joined_reading(filled, starts)
    return Together(filled[0].match, reading, passed, [piece.start for piece in filled], starts)


def of_files(
    match: Match, reading: Reading, passed: Records, keys: Sequence[str], counts: Sequence[int], *, with_files: bool
) -> Together:
    """The records of whole inputs that were read as one table. `counts`: how many each has."""
    filled = [(key, count) for key, count in zip(keys, counts, strict=True) if count]
    if with_files:
        passed = _with_files(passed, [key for key, _ in filled], [count for _, count in filled])
    starts = [0, *accumulate(count for _, count in filled)][:-1]
    return Together(match, reading, passed, [(key, 0) for key, _ in filled], starts)


def _laid_out(piece: Piece, layout: Match, kinds: Kinds) -> Records:
    """What passes through, in the order of the first input and the types of all. Raises UnlikeInputs: an input was
    compared before, but by its first records."""
    if faults := list(unlike(layout, piece.match)):
        raise UnlikeInputs(f"{piece.key} is unlike the first input: {', '.join(faults)}")
    if isinstance(piece.passed, dict):
        return {name: piece.passed[name] for name in layout.passed}
    return fitted(piece.passed.select(layout.passed), kinds, piece.match.header, piece.key)


def _joined_records(parts: Sequence[Records], keys: Sequence[str]) -> Records:
    """`keys`: of their inputs. Raises UnlikeInputs."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    frames = [part for part in parts if isinstance(part, pl.DataFrame)]
    if all(frame.schema == frames[0].schema for frame in frames):
        return pl.concat(frames)
    return _joined_by_value(frames, keys)


def _joined_by_value(frames: Sequence[pl.DataFrame], keys: Sequence[str]) -> pl.DataFrame:
    """Frames with columns of several types, such as lists of integers and of other numbers, in types that hold all
    values of both. Raises UnlikeInputs where there are none: in the type of all, a value would be another one."""
    together, start = pl.concat(frames, how="vertical_relaxed"), 0
    for frame, key in zip(frames, keys, strict=True):
        for column in frame:
            kind = together[column.name].dtype
            back = together[column.name].slice(start, frame.height).cast(column.dtype, strict=False)
            if column.dtype != kind and not back.equals(column, null_equal=True):
                has = f"has {column.dtype} in {column.name!r}, and other inputs have what {kind} holds"
                raise UnlikeInputs(f"{key} is unlike the other inputs: {has}")
        start += frame.height
    return together


def _with_files(passed: Records, names: Sequence[str], counts: Sequence[int]) -> Records:
    if isinstance(passed, dict):
        return {**passed, INPUT_FILE: np.repeat(np.array(names), counts)}
    column = pl.Series(INPUT_FILE, list(names), dtype=pl.String())
    if len(names) == 1:
        column = column.new_from_index(0, counts[0])
    else:
        column = pl.concat([column.new_from_index(place, count) for place, count in enumerate(counts)])
    return pl.DataFrame([*passed, column])


def _joined_reading(pieces: Sequence[Piece], starts: Sequence[int]) -> Reading:
    used = [_used(piece) for piece in pieces]
    records = _joined_records([_in_order_of(used[0], one) for one in used], [piece.key for piece in pieces])
    errors = [
        replace(error, record=error.record + start)
        for piece, start in zip(pieces, starts, strict=True)
        for error in piece.reading.errors
    ]
    return Reading(records, errors, _joined_matrices([piece.reading.matrices for piece in pieces]))


def _used(piece: Piece) -> Records:
    """The records without the columns that only pass through."""
    records = piece.reading.records
    if isinstance(records, dict):
        return records
    return records.drop([name for name in records.columns if name not in piece.match.binding.used])


def _in_order_of(first: Records, records: Records) -> Records:
    if isinstance(first, dict) or isinstance(records, dict):
        return records
    return records.select([name for name in first.columns if name in records.columns])


def _joined_matrices(parts: Sequence[Mapping[str, Matrix]]) -> dict[str, Matrix]:
    of_block = {name: [part[name] for part in parts] for name in parts[0]}
    return {
        name: Matrix(np.concatenate([matrix.values for matrix in matrices]), _joined_absent(matrices))
        for name, matrices in of_block.items()
    }


def _joined_absent(parts: Sequence[Matrix]) -> np.ndarray | None:
    if all(part.absent is None for part in parts):
        return None
    return np.concatenate([np.zeros(part.values.shape, bool) if part.absent is None else part.absent for part in parts])
