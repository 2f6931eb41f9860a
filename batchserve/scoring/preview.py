"""A few records of a stored file, as texts for a reader, wherever in the file they are."""

import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl

from batchserve.allowance import allowance
from batchserve.domain import Chunk, ChunkLimits, ModelVersion, Options
from batchserve.errors import BatchserveError, InvalidInput, Unavailable
from batchserve.formats.protocol import Header, Records, Tensors
from batchserve.inference.images import thumbnail_of
from batchserve.inference.matching import match_input, with_names
from batchserve.inference.outputs import ResultSchema
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input, header_of
from batchserve.scoring.planning import whole
from batchserve.scoring.texts import values_of

MOST_COLUMNS = 50
_MOST_CHARACTERS = 200
_PAGE = ChunkLimits(bytes=16 * 2**20)
"""Of the records that are read at a time."""
_MOST_READS = 4
"""A page of large records has fewer of them."""
_PLACES = ChunkLimits(4 * 2**20, 16_384)
_SECONDS = 10.0
"""To look for a record, before the client is asked to come again; what was found is kept."""
_SIDE = 128
"""Pixels of the longer side of a thumbnail."""


@dataclass(frozen=True, slots=True)
class PreviewTask:
    """Records of a file, counted in it from 0."""

    input: Input
    first: int
    count: int
    after: Chunk | None = None
    """A known chunk that ends at this record or before it. None: the way there is found from the beginning."""
    model: ModelVersion | None = None
    options: Options | None = None
    """How a job reads the file. None: as its bytes show."""
    is_result: bool = False
    """Whether only the columns are shown that the model has added."""
    further: tuple[Input, ...] = ()
    """The inputs that share its chunk, in one of which the first record may be."""


class Preview(NamedTuple):
    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]
    """A text for each column; None for a missing value, and for images."""
    hidden: int
    """How many columns are left out."""
    image: str | None
    """The column of images."""


class Cell(NamedTuple):
    """A value of a file; `after` as of a PreviewTask."""

    record: int
    column: str
    after: Chunk | None


@by_name
def preview(task: PreviewTask) -> Preview:
    """The wanted records, fewer where they are large or the file ends. Raises InvalidInput, and Unavailable where
    they are far from all that is known of the file: then it is known better next time."""
    task = _as_job(task)
    header = header_of(task.input)
    image = None if task.is_result else _image_column(task, header)
    chosen = _chosen(task, header)
    read = [name for name in chosen if name != image]
    limits = replace(_PAGE, records=task.count)
    if task.input.reader.family == "image":  # of which only the names are read
        limits = replace(limits, bytes=2**62)
    columns: dict[str, list[str | None]] = {name: [] for name in chosen}
    count = 0
    with task.input.open() as source:
        for reads, chunk in enumerate(chunks_at(task.input, source, task.first, task.after, limits)):
            if not chunk.records or count >= task.count or reads >= _MOST_READS:
                break
            if read:
                records = task.input.reader.read(source, chunk, {}, read).records
                for name, texts in _texts_of(records):
                    columns.setdefault(name, []).extend(texts[: task.count - count])
            count = min(task.count, count + chunk.records)
    shown = {name: texts or [None] * count for name, texts in columns.items() if texts or name == image}
    hidden = len(_names(task, header)) - len(chosen) + max(0, len(shown) - MOST_COLUMNS)
    shown = dict(list(shown.items())[:MOST_COLUMNS])
    return Preview(tuple(shown) or tuple(chosen), tuple(zip(*shown.values(), strict=True)), hidden, image)


@by_name
def cells(
    input: Input, model: ModelVersion | None, options: Options | None, wanted: Sequence[Cell]
) -> list[str | None]:
    """The text of each value; None for one that is missing, and for all of a column that is not in the file."""
    input = _named(input, model, options)
    there = header_of(input).columns
    texts: list[str | None] = []
    with input.open() as source:
        for cell in wanted:
            text = None
            if cell.column in there:
                limits = ChunkLimits(bytes=2**62, records=1)
                chunk = next(chunks_at(input, source, cell.record, cell.after, limits), None)
                if chunk is not None and chunk.records:
                    records = input.reader.read(source, chunk, {}, [cell.column]).records
                    text = dict(_texts_of(records))[cell.column][0]
            texts.append(text)
    return texts


@by_name
def thumbnail(task: PreviewTask) -> bytes:
    """The image of the first wanted record as a small JPEG. Raises InvalidInput where it has none."""
    task = _as_job(task)
    image = _image_column(task, header_of(task.input))
    if image is None:
        raise InvalidInput("the records of this input have no images")
    with task.input.open() as source:
        limits = ChunkLimits(bytes=2**62, records=1)
        chunk = next(chunks_at(task.input, source, task.first, task.after, limits), None)
        if chunk is None or not chunk.records:
            raise InvalidInput(f"there is no record {task.first}")
        values = task.input.reader.read(source, chunk, {}, [image]).records[image]
    if values[0] is None:
        raise InvalidInput(f"record {task.first} has no image")
    return thumbnail_of(values, _SIDE, allowance().image_pixels)


# --- where records are -----------------------------------------------------------------------------------------------


class Places:
    """Where the records of a file are, as far as was asked for. Stored bytes never change."""

    def __init__(self, input: Input) -> None:
        self._reader = input.reader
        self.chunks: list[Chunk] = []
        self.is_complete = False

    def extend(self, source: BinaryIO, is_enough: Callable[[Chunk], bool], seconds: float) -> bool:
        """Goes on until a chunk is enough, or the file ends. False: until the time is over."""
        deadline = time.monotonic() + seconds
        if self.is_complete or (self.chunks and is_enough(self.chunks[-1])):
            return True
        for chunk in self._reader.plan(source, self.chunks[-1] if self.chunks else None, _PLACES):
            self.chunks.append(chunk)
            if is_enough(chunk):
                return True
            if time.monotonic() > deadline:
                return False
        self.is_complete = True
        return True

    def before(self, record: int) -> Chunk | None:
        """The last chunk that ends at this record or before it."""
        place = bisect_right(self.chunks, record, key=lambda chunk: chunk.first_record + chunk.records)
        return self.chunks[place - 1] if place else None


@lru_cache(maxsize=16)
def places_of(input: Input) -> Places:
    return Places(input)


def chunks_at(input: Input, source: BinaryIO, first: int, after: Chunk | None, limits: ChunkLimits) -> Iterator[Chunk]:
    """The chunks from exactly this record on. None, or an empty one, beyond the last."""
    known = after
    if known is None and first:
        places = places_of(input)
        if not places.extend(source, lambda chunk: chunk.first_record + chunk.records > first, _SECONDS):
            found = places.chunks[-1].first_record
            raise Unavailable(f"the first {found:,} records were counted so far: try again", retry_after=1)
        known = places.before(first)
    at = known.first_record + known.records if known else 0
    while at < first:
        skipped = next(input.reader.plan(source, known, ChunkLimits(bytes=2**62, records=first - at)), None)
        if skipped is None or not skipped.records:
            return
        known, at = skipped, at + skipped.records
    yield from input.reader.plan(source, known, limits)


# --- columns ---------------------------------------------------------------------------------------------------------


def _named(input: Input, model: ModelVersion | None, options: Options | None) -> Input:
    """With the names that a job gives to columns without any."""
    if model is None or options is None:
        return input
    return replace(input, dialect=with_names(input.dialect, model, options))


def _as_job(task: PreviewTask) -> PreviewTask:
    if task.is_result:
        return task
    input, first = task.input, task.first
    for following in task.further:
        if first < (records := whole(input).records):
            break
        input, first = following, first - records
    return replace(task, input=_named(input, task.model, task.options), first=first, further=())


def _names(task: PreviewTask, header: Header) -> list[str]:
    names = list(header.columns or header.arrays)
    if not task.is_result or task.model is None or task.options is None:
        return names
    signature = task.model.signature
    own = {*ResultSchema(signature, task.options.top_k).columns, *(output.name for output in signature.outputs)}
    return [name for name in names if name in own] or names


def _chosen(task: PreviewTask, header: Header) -> list[str]:
    """The columns that are shown, in the order of the file: those that the model takes before others."""
    names = _names(task, header)
    if len(names) <= MOST_COLUMNS or task.model is None:
        return names[:MOST_COLUMNS]
    taken = {column.name for column in task.model.signature.columns}
    first = [name for name in names if name in taken] + [name for name in names if name not in taken]
    kept = set(first[:MOST_COLUMNS])
    return [name for name in names if name in kept]


def _image_column(task: PreviewTask, header: Header) -> str | None:
    """The column from which the model takes images; without a model, one that may hold them."""
    if task.model is None or task.options is None:
        return next((name for name, kind in header.columns.items() if name == "image" and kind == pl.Binary()), None)
    if not any(tensor.image for tensor in task.model.signature.inputs):
        return None
    try:
        binding = match_input(header, task.model, task.options).binding
    except BatchserveError:  # which the job has told
        return None
    taken = (binding.sources[tensor.name][0] for tensor in task.model.signature.inputs if tensor.image)
    return next(taken, None)


# --- texts -----------------------------------------------------------------------------------------------------------


def _texts_of(records: Records) -> Iterator[tuple[str, list[str | None]]]:
    if isinstance(records, pl.DataFrame):
        for column in records:
            yield column.name, _texts(column)
    else:
        yield from _texts_of_arrays(records)


def _texts(column: pl.Series) -> list[str | None]:
    if column.dtype.is_numeric() or column.dtype in (pl.String(), pl.Boolean()):
        column = column.cast(pl.String())
    return [None if value is None else _text(value) for value in values_of(column)]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    text = str(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def _texts_of_arrays(arrays: Tensors) -> Iterator[tuple[str, list[str | None]]]:
    """A column for each array, or for each of its values where a record has a few."""
    for name, array in arrays.items():
        if array.ndim == 2 and array.shape[1] <= MOST_COLUMNS:
            for index in range(array.shape[1]):
                yield f"{name or 'array'}[{index}]", [_text(value) for value in array[:, index]]
        elif array.ndim == 0:
            yield name, []
        else:
            yield name or "array", [_text_of_array(value) for value in array]


def _text_of_array(value: Any) -> str:
    if not isinstance(value, np.ndarray):
        return _text(value)
    shape = " x ".join(map(str, value.shape))
    return _text(f"{shape}: {', '.join(map(str, value.ravel()[:_MOST_CHARACTERS].tolist()))}")
