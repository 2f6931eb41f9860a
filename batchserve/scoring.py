"""What runs in scoring processes: pure functions of storage keys, called by every engine.

The server parses no user data and loads no model. Planning, checking, scoring, assembling and admission stand here;
each takes a task and gives a small answer, everything large goes through storage.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, wraps
from itertools import chain, islice
from typing import Any, ParamSpec, TypeVar

import numpy as np
import orjson
import polars as pl

from batchserve.allowance import allowance
from batchserve.domain import (
    Chunk,
    ChunkLimits,
    CommittedChunk,
    Dialect,
    DType,
    ModelVersion,
    Options,
    Result,
    RowError,
    ScoredChunk,
    Signature,
    StoredInput,
)
from batchserve.errors import BatchserveError, InvalidInput, InvalidOptions, PayloadTooLarge
from batchserve.formats import get_format
from batchserve.formats.csv import escape_formulas
from batchserve.formats.protocol import Format, Header, Part, Reading, Records, Tensors
from batchserve.formats.schema import POLARS, as_base64
from batchserve.formats.tensors import vector
from batchserve.inference.images import Images
from batchserve.inference.inputs import build_inputs
from batchserve.inference.kernels import Session
from batchserve.inference.matching import Match, match_input, with_names
from batchserve.inference.outputs import ResultSchema
from batchserve.inference.run import run
from batchserve.inference.session import Sessions, trim_heap
from batchserve.storage import (
    Piece,
    Span,
    Storage,
    Stored,
    errors_key,
    errors_part_key,
    model_key,
    open_storage,
    part_key,
    result_key,
)

ERRORS_FORMAT = "jsonl"
DTYPES = {kind: dtype for dtype, kind in POLARS.items()}


@dataclass(frozen=True, slots=True)
class Input:
    """Stored bytes to read as records."""

    storage: str
    key: str
    format: str
    dialect: Dialect

    @classmethod
    def of(cls, storage: str, stored: StoredInput) -> "Input":
        return cls(storage, stored.key, stored.format, stored.dialect)

    @property
    def reader(self) -> Format:
        return get_format(self.format, self.dialect)


@dataclass(frozen=True, slots=True)
class ChunkTask:
    input: Input
    job_id: str
    attempt: int
    chunk: Chunk
    model: ModelVersion
    options: Options
    base: int = 0
    """Records in the inputs of the job before this one. A format counts those of its own."""


@dataclass(frozen=True, slots=True)
class PlanTask:
    input: Input
    after: Chunk | None
    """None: from the beginning of the input."""
    limits: ChunkLimits
    most: int
    """Chunks in one answer, at most."""
    number: int = 0
    """Which input of the job it is."""
    base: int = 0
    """Records in those before it."""


@dataclass(frozen=True, slots=True)
class Planned:
    chunks: tuple[Chunk, ...]
    complete: bool
    share: float
    """How much of the input is planned, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Small:
    """A whole job done in one call: its plan of one chunk, and its result."""

    planned: Planned
    scored: ScoredChunk
    result: Result


@dataclass(frozen=True, slots=True)
class AssembleTask:
    storage: str
    job_id: str
    attempt: int
    format: str
    dialect: Dialect
    parts: tuple[Part, ...]
    errors: tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class ConvertTask:
    """One chunk of a result, to be written in another format."""

    input: Input
    """The result."""
    chunk: Chunk
    model: ModelVersion
    top_k: int | None
    format: str
    dialect: Dialect
    key: str
    """Of the part that is written."""
    escape: bool
    """Whether texts that a spreadsheet would take for formulas are written so that it does not."""


@dataclass(frozen=True, slots=True)
class OnlineTask:
    storage: str
    body: bytes
    format: str
    dialect: Dialect
    model: ModelVersion
    options: Options
    records: int
    """Records that one request may hold."""


@dataclass(frozen=True, slots=True)
class Online:
    """The answer to an online request: a record for each that came, and the errors of those that failed."""

    lines: bytes
    """The records as NDJSON: inputs and outputs of each."""
    errors: tuple[RowError, ...]
    inference_ms: float
    """Time that the model alone took."""


P = ParamSpec("P")
R = TypeVar("R")


def _by_name(function: Callable[P, R]) -> Callable[P, R]:
    """What polars raises over the data of a user, also a panic, is a named error: over a date that no calendar has."""

    @wraps(function)
    def named(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InvalidInput(f"a value of the input can be neither read nor written: {reason[:200]}") from error

    return named


def warm_up() -> None:
    """Imports what scoring needs, so that the first chunk does not wait for it."""


# --- jobs ------------------------------------------------------------------------------------------------------------


@_by_name
def plan_chunks(task: PlanTask) -> Planned:
    """The next chunks of an input, after those that are planned already. Raises InvalidInput."""
    store = _storage(task.input.storage)
    after = _moved(task.after, -task.base) if task.after else None
    format = task.input.reader
    with store.open(task.input.key) as source:
        planned = islice(format.plan(source, after, task.limits), task.most)
        chunks = tuple(_moved(chunk, task.base, task.number) for chunk in planned)
        complete = len(chunks) < task.most
        share = 1.0 if complete else min(1.0, chunks[-1].stop / max(format.end(source), 1))
    return Planned(chunks, complete, share)


def halve_chunk(task: Input, whole: Chunk, after: Chunk | None, base: int = 0) -> list[Chunk]:
    """Two chunks in the place of one, or the one where it cannot be cut. `after`: the chunk of its input before it.
    `base`: the records in the inputs before that."""
    limits = ChunkLimits(bytes=2**62, records=(whole.records + 1) // 2)
    after = _moved(after, -base) if after else None
    with _storage(task.storage).open(task.key) as source:
        first = _moved(next(task.reader.plan(source, after, limits)), base, whole.input)
    if not 0 < first.records < whole.records:
        return [whole]
    return [
        first,
        Chunk(first.first_record + first.records, whole.records - first.records, first.stop, whole.stop, whole.input),
    ]


def _moved(chunk: Chunk, by: int, number: int | None = None) -> Chunk:
    """The chunk with its records counted from elsewhere."""
    if not by and not number:
        return chunk
    return replace(chunk, first_record=chunk.first_record + by, input=chunk.input if number is None else number)


@_by_name
def check_input(task: Input, model: ModelVersion, options: Options) -> None:
    """Whether the beginning of an input fits the model. Raises SchemaMismatch or InvalidInput, in the first second
    instead of an hour later."""
    match = match_input(_header(replace(task, dialect=with_names(task.dialect, model, options))), model, options)
    match.check()
    match.require_writable()


def check_inputs(tasks: Sequence[tuple[Input, Options]], model: ModelVersion) -> list[BatchserveError | None]:
    """What is wrong with each of several inputs. Raises InvalidOptions when the options do not suit the model."""

    def problem(task: Input, options: Options) -> BatchserveError | None:
        try:
            check_input(task, model, options)
        except InvalidOptions:
            raise
        except BatchserveError as error:
            return error
        except OSError as error:
            return InvalidInput(f"the stored input cannot be read: {error.strerror}")
        return None

    return [problem(task, options) for task, options in tasks]


@_by_name
def score_chunk(task: ChunkTask) -> ScoredChunk:
    """Reads a chunk, scores it, writes its part. One result row for each record, in order, or an error for all.

    A record that cannot be scored becomes a row of nulls and an entry in the part's errors.
    """
    part = part_key(task.job_id, task.chunk.first_record, task.attempt)
    return _score_into(task, part, errors_part_key(task.job_id, task.chunk.first_record, task.attempt))[0]


@_by_name
def score_small(task: PlanTask, job_id: str, attempt: int, model: ModelVersion, options: Options) -> Planned | Small:
    """Plans, scores and assembles an input of one chunk in one call. Gives the plan alone when it has more chunks, or
    when row errors end the job: then its part is wanted."""
    planned = plan_chunks(task)
    if not planned.complete or len(planned.chunks) != 1:
        return planned
    chunk_task = ChunkTask(task.input, job_id, attempt, planned.chunks[0], model, options)
    key, errors = result_key(job_id, attempt), errors_key(job_id, attempt)
    scored, stored = _score_into(chunk_task, key, errors)
    if scored.rows_failed and (options.on_row_error == "fail" or options.max_errors is not None):
        return planned
    listed = errors if scored.errors_bytes else None
    return Small(planned, scored, Result(key, stored.bytes, stored.sha256, listed, scored.errors_bytes))


def _score_into(task: ChunkTask, key: str, errors_key: str) -> tuple[ScoredChunk, Stored]:
    store = _storage(task.input.storage)
    named = replace(task.input, dialect=with_names(task.input.dialect, task.model, task.options))
    match = match_input(_header(named), task.model, task.options)
    chunk = _moved(task.chunk, -task.base)
    with store.open(named.key) as source:
        reading, passed = match.read(named.reader, source, chunk)
    session = _session(task.input.storage, task.model)
    scored = _score(session, match, reading, chunk.records)
    result_format = get_format(task.options.format, task.input.dialect)
    result = _result(result_format, scored, passed, match)
    with store.create(key) as writer:
        writer.write(result_format.write(result))
        stored = writer.commit()
    errors_bytes = 0
    if scored.errors:
        with store.create(errors_key) as writer:
            writer.write(_error_lines(scored.errors, reading.records, task))
            errors_bytes = writer.commit().bytes
    done = ScoredChunk(
        chunk=task.chunk,
        rows_failed=int(scored.failed.sum()),
        part_bytes=stored.bytes,
        part_sha256=stored.sha256,
        errors_bytes=errors_bytes,
        facts={"notes": list(match.notes), "model_seconds": scored.model_seconds},
    )
    return done, stored


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
    """Puts the parts together into the result object, in order, and the error lists beside it."""
    store = _storage(task.storage)
    key = result_key(task.job_id, task.attempt)
    stored = store.compose(key, assembled_pieces(store, task.format, task.dialect, task.parts))
    errors = errors_key(task.job_id, task.attempt) if task.errors else None
    size = store.compose(errors, _errors_pieces(store, task.errors)).bytes if errors else 0
    return Result(key, stored.bytes, stored.sha256, errors, size)


def assembled_pieces(store: Storage, format: str, dialect: Dialect, parts: Sequence[Part]) -> Iterator[Piece]:
    """The pieces of one file made of all parts. A part is a file of its own: a lone one is the result."""
    if len(parts) == 1:
        return iter([Span(parts[0].key, 0, parts[0].bytes)])
    return get_format(format, dialect).assemble(parts, store.open, sum(part.records for part in parts))


@_by_name
def convert_chunk(task: ConvertTask) -> Part:
    """Writes one chunk of a result in another format. What the result's format does not say of types, the model does.

    Between formats without types all is text, so that numbers keep their digits.
    """
    reader, writer_format = task.input.reader, get_format(task.format, task.dialect)
    types = _types_of(task) if reader.has_types or writer_format.has_types else {}
    store = _storage(task.input.storage)
    with store.open(task.input.key) as source:
        records = reader.read(source, task.chunk, types).records
    if task.escape and isinstance(records, pl.DataFrame):
        records = escape_formulas(records)
    with store.create(task.key) as writer:
        writer.write(writer_format.write(records))
        return Part(task.key, writer.commit().bytes, task.chunk.records)


def _types_of(task: ConvertTask) -> dict[str, DType]:
    """The types of the columns of a result: the model's own have those of its signature, the others stay text."""
    there, signature = _header(task.input).columns, task.model.signature
    taken = {
        column.name: column.dtype for column in signature.columns if column.name in there and column.dtype != "image"
    }
    given = ResultSchema(signature, task.top_k).columns
    return taken | {name: dtype for name, kind in given.items() if (dtype := DTYPES.get(kind))}


# --- online ----------------------------------------------------------------------------------------------------------


@_by_name
def predict_online(task: OnlineTask) -> Online:
    """Scores the records of one request body. The same code as for a chunk, hence the same answers."""
    match, reading, passed, chunk = _online_input(task)
    session = _session(task.storage, task.model)
    scored = _score(session, match, reading, chunk.records)
    jsonl = get_format("jsonl")
    result = _result(jsonl, scored, passed, match)
    return Online(jsonl.write(result), tuple(scored.errors), 1000 * scored.model_seconds)


@_by_name
def validate_online(task: OnlineTask) -> tuple[RowError, ...]:
    """Reads and checks the records of one request body against the model's signature, without scoring them.

    One error for each value that does not fit, where a job would stop at the first of a record."""
    match, reading, _, _ = _online_input(task)
    inputs, _, missing = build_inputs(match.signature, match.binding, reading.records, allowance().image_pixels)
    undecoded = [error for array in inputs.values() if isinstance(array, Images) for error in array.check()]
    unread = {(error.record, error.column) for error in reading.errors}  # what could not be read is missing too
    errors = [error for error in missing + undecoded if (error.record, error.column) not in unread]
    return tuple(_in_order(reading.errors + errors))


def admit_model(storage: str, key: str) -> tuple[Signature, dict[str, str], str]:
    """Admits an uploaded artifact and stores the mended graph under `key` + `.onnx`; gives what was learnt of it."""
    from batchserve.admission import admit  # with onnx, which no other call needs

    store = _storage(storage)
    with store.open(key) as source:
        admitted = admit(source.read())
    mended = f"{key}.onnx"
    with store.create(mended) as writer:
        writer.write(admitted.model)
        writer.commit()
    answer = admitted.signature, admitted.metadata, mended
    del admitted
    trim_heap()
    return answer


# --- one chunk -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scored:
    """Outputs of the graph for every record; those that `failed` hold no answer and stand in `errors`."""

    outputs: Tensors
    failed: np.ndarray
    errors: list[RowError]
    model_seconds: float
    """Time in the model itself, without that for decoding and preparing its inputs."""


def _score(session: Session, match: Match, reading: Reading, records: int) -> _Scored:
    pixels = allowance().image_pixels
    inputs, failed, missing = build_inputs(match.signature, match.binding, reading.records, pixels)
    # A value that only travels along and does not fit is told, but fails nothing.
    unread = [error for error in reading.errors if error.column is None or error.column in match.binding.used]
    for error in unread:
        failed[error.record] = True
    if not failed.all():
        match.require_shared(inputs)
    images = [array for array in inputs.values() if isinstance(array, Images)]
    if match.signature.mode == "whole":  # which can be decoded must be known before the run
        for error in chain.from_iterable(array.check() for array in images):
            failed[error.record] = True
    room = partial(_sessions.keep_only, session)
    ran = run(session, match.signature, {**inputs, **match.shared}, records, room, failed)
    undecoded = [error for array in images for error in array.errors]
    for error in (*undecoded, *ran.errors):
        failed[error.record] = True
    unanswered = list(_without_answer(match.signature, ran.outputs, failed))
    for error in unanswered:
        failed[error.record] = True
    # The first cause is the cause: what could not be read is missing too, and what is missing may crash.
    errors, told = list(reading.errors), {error.record for error in unread}
    for consequence in (missing, undecoded, ran.errors, unanswered):
        errors += [error for error in consequence if error.record not in told]
        told |= {error.record for error in consequence}
    return _Scored(ran.outputs, failed, _in_order(errors), ran.seconds)


def _without_answer(signature: Signature, outputs: Tensors, failed: np.ndarray) -> Iterator[RowError]:
    """Records whose probabilities are no numbers, as an infinite input makes them: their label would be made up."""
    for output in signature.outputs:
        array = outputs[output.name]
        if output.role == "probabilities" and array.dtype.kind == "f" and np.isnan(array.min(initial=0)):
            lost = np.isnan(array).any(axis=tuple(range(1, array.ndim))) & ~failed
            for record in np.flatnonzero(lost).tolist():
                message = f"{output.name} of this record is not a number: is one of its values infinite or too large?"
                yield RowError(record, "not-a-number", message)


# --- one result ------------------------------------------------------------------------------------------------------


def _result(format: Format, scored: _Scored, passed: pl.DataFrame | None, match: Match) -> Records:
    if format.holds == "arrays" and match.options.top_k is None and passed is None:
        return {name: _blanked(array, scored.failed) for name, array in scored.outputs.items()}
    outputs = match.result().frame(scored.outputs)
    if scored.failed.any():
        keep = pl.Series(~scored.failed)
        outputs = outputs.select(
            pl.when(keep).then(pl.col(name)).otherwise(None).alias(name) for name in outputs.columns
        )
    if passed is not None:
        inputs = [
            column.alias(f"input_{name}") if (name := column.name) in outputs.columns else column for column in passed
        ]
        outputs = pl.DataFrame([*inputs, *outputs]) if inputs else outputs
    lists = match.result().lists if format.holds != "table" else {}
    if not lists:
        return outputs
    return {
        column.name: _blanked(_of_one_size(scored.outputs[lists[name]], name), scored.failed)
        if (name := column.name) in lists
        else vector(column)
        for column in outputs
    }


def _of_one_size(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == object and array.ndim == 1 and any(isinstance(value, list) for value in array):
        raise InvalidOptions(
            f"{name!r} differs in size between records, which npy and npz cannot hold: request parquet"
        )
    return array


def _blanked(array: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """The array with the rows that failed made empty: NaN, "" or 0. The errors list tells them from real zeros."""
    if not failed.any():
        return array
    array = array.copy()
    array[failed] = np.nan if array.dtype.kind == "f" else "" if array.dtype.kind in "OU" else 0
    return array


def _error_lines(errors: Iterable[RowError], records: Records, task: ChunkTask) -> bytes:
    """An entry for each failed record, numbered over all inputs of the job, as NDJSON."""
    key = task.options.key
    keys = as_base64(records.select(key))[key] if key is not None and isinstance(records, pl.DataFrame) else None
    lines = []
    for error in errors:
        line: dict[str, Any] = {"record": task.chunk.first_record + error.record}
        if keys is not None:
            line["key"] = _plain_value(keys, error.record)
        line |= {"column": error.column, "code": error.code, "message": error.message}
        lines.append(orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _plain_value(column: pl.Series, place: int) -> Any:
    """A value as Python has it; None for what it has not, such as years beyond 9999."""
    try:
        return column[place]
    except (ValueError, OverflowError, pl.exceptions.PanicException):
        return None


def _errors_pieces(store: Storage, parts: Sequence[Part]) -> Iterator[Piece]:
    return get_format(ERRORS_FORMAT).assemble(parts, store.open, sum(part.records for part in parts))


def _in_order(errors: Iterable[RowError]) -> list[RowError]:
    return sorted(errors, key=lambda error: error.record)


# --- what a process keeps --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _storage(address: str) -> Storage:
    return open_storage(address)


@lru_cache(maxsize=32)
def _header(task: Input) -> Header:
    with _storage(task.storage).open(task.key) as source:
        return task.reader.header(source)


_sessions = Sessions(capacity=1)
"""The models that this process keeps loaded, as many as it may."""


def _session(storage: str, model: ModelVersion) -> Session:
    def load() -> bytes:
        with _storage(storage).open(model_key(model.digest)) as artifact:
            return artifact.read()

    allowed = allowance()
    _sessions.capacity = allowed.sessions
    threads = min(model.signature.threads, allowed.threads or model.signature.threads)
    return _sessions.get(model.digest, threads, load, model.signature.kernel)


def _online_input(task: OnlineTask) -> tuple[Match, Reading, pl.DataFrame | None, Chunk]:
    """How the records of a request meet the model, once that is checked; the records, what travels along, and where
    they are."""
    source = io.BytesIO(task.body)
    format = get_format(task.format, with_names(task.dialect, task.model, task.options))
    match = match_input(format.header(source), task.model, task.options)
    match.check()
    chunks = format.plan(source, None, ChunkLimits(bytes=2**62, records=task.records))
    chunk, more = next(chunks), next(chunks, None)
    if more is not None:
        raise PayloadTooLarge(
            f"an online request may hold {task.records} records; upload the file and predict it as a job"
        )
    return match, *match.read(format, source, chunk), chunk
