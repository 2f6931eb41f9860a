"""What a job would do, found out by the beginning of its input: how its columns fill a model, and its first answers."""

import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, ModelVersion, Options
from batchserve.errors import BatchserveError, InvalidInput, SchemaMismatch
from batchserve.formats import get_format
from batchserve.formats.protocol import Format, Header, Records
from batchserve.inference.answers import score
from batchserve.inference.binding import columns_of
from batchserve.inference.matching import Match, match_input, with_names
from batchserve.inference.unfilled import dtype_text, shape_text, wanted_array
from batchserve.scoring.faults import by_name
from batchserve.scoring.inputs import Input, header_of
from batchserve.scoring.results import result_of
from batchserve.scoring.sessions import keep_only, session_for
from batchserve.scoring.texts import values_of

__all__ = ["Answers", "Beginning", "DryRun", "Filled", "dry_run", "survey"]

SHOWN = 10
"""Records whose values and answers are shown."""
_SECONDS = 0.5
"""Time in the model for the records by which the size of a result is estimated, which are at least those shown."""
_MOST, _BYTES = 1000, 8 * 2**20
"""Limits of these records."""
_SHOWN_COLUMNS = 200
"""Most columns of a wide table whose values are shown."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The first records of an input, as texts."""

    columns: dict[str, str]
    """All names, each with its type."""
    rows: tuple[tuple[str | None, ...], ...]
    """The values of the first columns; None where one is missing."""


@dataclass(frozen=True, slots=True)
class Filled:
    """A column or array that a model takes, and what of the input fills it."""

    name: str
    dtype: str
    sources: tuple[str, ...]
    """Columns or arrays of the input; () when it is missing. An array without a name is ""."""
    fault: str | None
    """Why its values do not fit, or why it is missing."""


@dataclass(frozen=True, slots=True)
class Answers:
    """The first rows of a result, and what those of the whole input are estimated to be."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str | None, ...], ...]
    faults: dict[int, str]
    """By the record that could not be scored."""
    records: int
    """Scored, of which the first are shown."""
    failed: int
    all_records: int
    """Of the input; estimated unless all were scored."""
    result_bytes: int
    """Of all records."""

    @property
    def is_whole(self) -> bool:
        """Whether all records of the input were scored."""
        return self.records == self.all_records


@dataclass(frozen=True, slots=True)
class DryRun:
    """How an input fits a model."""

    filled: tuple[Filled, ...]
    extra: tuple[str, ...]
    """Columns of the input that the model does not take."""
    passed: tuple[str, ...]
    """Those that pass through to the result."""
    problem: str | None
    """Why a job would be refused or fail; None: it would run."""
    answers: Answers | None
    """None where there is a problem."""


@by_name
def survey(task: Input, models: Sequence[tuple[ModelVersion, Options]]) -> tuple[Beginning, list[int | None]]:
    """The beginning of an input, and for each model how many of its columns or arrays it would use, None where the
    input does not fit. Raises InvalidInput, also where the stored bytes are lost."""
    try:
        beginning = _beginning(header_of(task))
    except OSError as error:
        raise InvalidInput(f"the stored input cannot be read: {error.strerror}") from error
    return beginning, [_used_if_fits(task, model, options) for model, options in models]


def _beginning(header: Header) -> Beginning:
    sample = header.sample
    if not isinstance(sample, pl.DataFrame):
        return Beginning({name: _array_text(header, name) for name in header.arrays}, ())
    columns = {name: _type_text(kind, sample[name]) for name, kind in header.columns.items()}
    return Beginning(columns, _texts(sample[:SHOWN, :_SHOWN_COLUMNS]))


def _used_if_fits(task: Input, model: ModelVersion, options: Options) -> int | None:
    try:
        return _used(task, model, options)
    except (BatchserveError, OSError):
        return None


@by_name
def _used(task: Input, model: ModelVersion, options: Options) -> int:
    match = _matched(task, model, options)
    match.check()
    match.require_writable()
    return len(match.binding.used)


@by_name
def dry_run(task: Input, model: ModelVersion, options: Options) -> DryRun:
    """Raises InvalidInput for an input that cannot be read, and InvalidOptions."""
    try:
        match = _matched(task, model, options)
    except SchemaMismatch as lacking:
        return _unfilled(task, model, options, lacking)
    problem, faults = None, {}
    try:
        match.check()
        match.require_writable()
    except SchemaMismatch as misfit:
        problem, faults = misfit.detail, _faults(misfit)
    filled = tuple(_filled(match, faults))
    extra = tuple(name for name in _names(match.header) if name not in match.binding.used)
    if problem is not None:
        return DryRun(filled, extra, match.passed, problem, None)
    try:
        answers = _answers(task, model, match)
    except BatchserveError as failed:
        return DryRun(filled, extra, match.passed, failed.detail, None)
    return DryRun(filled, extra, match.passed, None, answers)


def _matched(task: Input, model: ModelVersion, options: Options) -> Match:
    return match_input(header_of(_named(task, model, options)), model, options)


def _named(task: Input, model: ModelVersion, options: Options) -> Input:
    return replace(task, dialect=with_names(task.dialect, model, options))


def _names(header: Header) -> list[str]:
    return list(header.columns or header.arrays)


# --- how columns fill a model ----------------------------------------------------------------------------------------


def _unfilled(task: Input, model: ModelVersion, options: Options, lacking: SchemaMismatch) -> DryRun:
    """Of an input that lacks something: the rest of the model's columns is compared alone, so that all faults are known
    at once."""
    signature, missing = model.signature, _faults(lacking)
    known = [column.name for column in signature.columns if column.name in missing]
    known += [tensor.name for tensor in signature.inputs if tensor.columns is None and tensor.name in missing]
    lost = tuple(_missing(model, missing))
    others = tuple(_names(header_of(_named(task, model, options))))
    if not known:
        return DryRun((), others, (), lacking.detail, None)
    kept = tuple(
        replace(tensor, columns=columns)
        for tensor in signature.inputs
        if (columns := tuple(c for c in tensor.columns or () if c.name not in missing))
    )
    rest = replace(model, signature=replace(signature, inputs=kept))
    renamed = options.columns if isinstance(options.columns, dict) else {}
    mapped = {name: source for name, source in renamed.items() if name not in missing}
    found: tuple[Filled, ...] = ()
    extra = others
    if kept:
        try:
            match = _matched(task, rest, replace(options, columns=mapped or None, passthrough="none", key=None))
        except BatchserveError:
            return DryRun(lost, (), (), lacking.detail, None)
        faults: dict[str, str] = {}
        try:
            match.check()
        except SchemaMismatch as misfit:
            faults = _faults(misfit)
        found = tuple(_filled(match, faults))
        extra = tuple(name for name in _names(match.header) if name not in match.binding.used)
    order = {name: place for place, name in enumerate(_wanted(model))}
    filled = sorted((*found, *lost), key=lambda one: order.get(one.name, len(order)))
    return DryRun(tuple(filled), extra, (), lacking.detail, None)


def _faults(error: SchemaMismatch) -> dict[str, str]:
    """By the column at fault, or the model's that is missing."""
    return {str(fault["column"]): str(fault["message"]) for fault in error.errors if "column" in fault}


def _wanted(model: ModelVersion) -> Iterator[str]:
    for tensor in model.signature.inputs:
        yield from (column.name for column in tensor.columns) if tensor.columns is not None else (tensor.name,)


def _missing(model: ModelVersion, missing: dict[str, str]) -> Iterator[Filled]:
    for tensor in model.signature.inputs:
        if tensor.columns is None and tensor.name in missing:
            yield Filled(tensor.name, wanted_array(tensor), (), missing[tensor.name])
        for column in tensor.columns or ():
            if column.name in missing:
                yield Filled(column.name, column.dtype, (), missing[column.name])


def _filled(match: Match, faults: dict[str, str]) -> Iterator[Filled]:
    """In the order of the model. `faults`: by the column of the input."""
    for tensor in match.signature.inputs:
        sources = match.binding.sources[tensor.name]
        if tensor.columns is None or tensor.name in match.binding.arrays:
            told = [faults[source] for source in sources if source in faults]
            yield Filled(tensor.name, f"{tensor.dtype} {shape_text(tensor.shape)}", sources, next(iter(told), None))
            continue
        for column, source in zip(columns_of(tensor, sources), sources, strict=True):
            yield Filled(column.name, column.dtype, (source,), faults.get(source))


# --- the first answers -----------------------------------------------------------------------------------------------


def _answers(task: Input, model: ModelVersion, match: Match) -> Answers:
    named = _named(task, model, match.options)
    reader = named.reader
    rate = model.signature.records_per_second or 0.0
    most = max(SHOWN, min(_MOST, int(rate * _SECONDS)))
    with named.open() as source:
        planned = reader.plan(source, None, ChunkLimits(_BYTES, most))
        chunk = next(planned)
        all_records = _estimated(chunk, planned, partial(reader.end, source))
        reading, passed = match.read(reader, source, chunk)
    session = session_for(task.storage, model)
    scored = score(session, match, reading, chunk.records, partial(keep_only, session))
    format = get_format(match.options.format, task.dialect)
    result = result_of(format, scored, passed, match)
    shown = result_of(get_format("jsonl"), scored, passed, match)
    assert isinstance(shown, pl.DataFrame), "rows are a table"
    faults: dict[int, str] = {}
    for error in scored.errors:
        if error.record < SHOWN:
            faults.setdefault(error.record, f"{error.column}: {error.message}" if error.column else error.message)
    shown = shown[:SHOWN, :_SHOWN_COLUMNS]
    return Answers(
        columns=tuple(shown.columns), rows=_texts(shown), faults=faults, records=chunk.records,
        failed=int(scored.failed.sum()), all_records=all_records,
        result_bytes=_result_bytes(format, result, chunk.records, all_records),
    )  # fmt: skip


def _estimated(first: Chunk, following: Iterator[Chunk], end: Callable[[], int]) -> int:
    """The records of an input, by the share of it that the first ones take."""
    records = first.records
    for chunk in following:
        if (chunk.start, chunk.stop) != (first.start, first.stop):
            return round(records * (end() - first.start) / max(first.stop - first.start, 1))
        records += chunk.records  # the next slice of one batch, which has no place of its own
    return records


def _result_bytes(format: Format, result: Records, records: int, all_records: int) -> int:
    """Of a result with `all_records`, the first of which these are: what a file has once, and its records."""
    written = len(format.write(result))
    if records in (0, all_records):
        return written
    none: Records = result[:0] if isinstance(result, pl.DataFrame) else {name: a[:0] for name, a in result.items()}
    once = len(format.write(none))
    return round(once + max(written - once, 0) / records * all_records)


# --- values as texts -------------------------------------------------------------------------------------------------


def _texts(table: pl.DataFrame) -> tuple[tuple[str | None, ...], ...]:
    return tuple(zip(*([_text(value) for value in values_of(column)] for column in table), strict=True))


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value if value is None or len(value) <= _short.maxstring else f"{value[: _short.maxstring]}…"
    if isinstance(value, bytes):
        return f"{len(value):,} bytes"
    return f"{value:.6g}" if isinstance(value, float) else _short.repr(value) if isinstance(value, list) else str(value)


_short = reprlib.Repr()
_short.maxlist, _short.maxstring = 4, 80


def _type_text(kind: pl.DataType | None, sample: pl.Series) -> str:
    """In a file without types, that of its first values."""
    if kind is not None or not isinstance(sample.dtype, pl.String):
        return str(kind or sample.dtype)
    given = sample.filter(sample.is_not_null() & (sample != ""))
    return "numbers" if len(given) and given.cast(pl.Float64(), strict=False).null_count() == 0 else "text"


def _array_text(header: Header, name: str) -> str:
    array = header.arrays[name]
    return f"{dtype_text(np.dtype(array.dtype))} {shape_text(array.shape)}"
