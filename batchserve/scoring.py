"""What runs in scoring processes: pure functions of storage keys, called by every engine.

The server parses no user data and loads no model. Planning, checking, scoring, assembling and admission stand here;
each takes a task and gives a small answer, everything large goes through storage.
"""

import io
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, BinaryIO

import numpy as np
import orjson
import polars as pl

from batchserve.domain import (
    Chunk,
    ChunkLimits,
    Dialect,
    ModelVersion,
    Options,
    Result,
    RowError,
    ScoredChunk,
    Signature,
)
from batchserve.errors import InvalidInput, InvalidOptions, OutOfMemory, PayloadTooLarge, SchemaMismatch, ScoringFailed
from batchserve.formats import get_format
from batchserve.formats.csv import escape_formulas
from batchserve.formats.protocol import Format, Header, Part, Reading, Records, Tensors
from batchserve.formats.schema import POLARS
from batchserve.inference.binding import Binding, bind
from batchserve.inference.inputs import build_inputs, check_types
from batchserve.inference.outputs import check_count, output_columns, to_columns
from batchserve.inference.session import Session, Sessions, give_back_memory
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


@dataclass(frozen=True, slots=True)
class ChunkTask:
    input: Input
    job_id: str
    attempt: int
    chunk: Chunk
    model: ModelVersion
    options: Options
    sessions: int = 8


@dataclass(frozen=True, slots=True)
class PlanTask:
    input: Input
    after: Chunk | None
    limits: ChunkLimits
    most: int
    """Chunks in one answer, at most."""
    sessions: int = 8


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
class OnlineTask:
    storage: str
    body: bytes
    format: str
    dialect: Dialect
    model: ModelVersion
    options: Options
    records: int
    """Records that one request may hold."""
    sessions: int = 8


@dataclass(frozen=True, slots=True)
class Online:
    """The answer to an online request: a record for each that came, and the errors of those that failed."""

    records: list[dict[str, Any]]
    errors: tuple[RowError, ...]
    inference_ms: float
    """Time that the model alone took."""


def warm_up() -> None:
    """Imports what scoring needs, so that the first chunk does not wait for it."""


# --- jobs ------------------------------------------------------------------------------------------------------------


def plan_chunks(task: PlanTask) -> Planned:
    """The next chunks of an input, after those that are planned already. Raises InvalidInput."""
    store = _storage(task.input.storage)
    with store.open(task.input.key) as source:
        rest = get_format(task.input.format).plan(source, task.input.dialect, task.after, task.limits)
        chunks = tuple(islice(rest, task.most))
        complete = len(chunks) < task.most
        size = source.seek(0, io.SEEK_END)
    share = 1.0 if complete else min(1.0, chunks[-1].stop / max(size, 1))
    return Planned(chunks, complete, share)


def halve_chunk(task: PlanTask, whole: Chunk) -> list[Chunk]:
    """Two chunks in the place of one. `task.after` is the chunk before it, `task.limits` do not matter."""
    limits = ChunkLimits(bytes=2**62, records=(whole.records + 1) // 2)
    store = _storage(task.input.storage)
    with store.open(task.input.key) as source:
        rest = get_format(task.input.format).plan(source, task.input.dialect, task.after, limits)
        first = next(rest)
    if not 0 < first.records < whole.records:
        return [whole]
    return [
        first,
        Chunk(first.first_record + first.records, whole.records - first.records, first.stop, whole.stop),
    ]


def check_input(task: Input, model: ModelVersion, options: Options) -> None:
    """Whether the beginning of an input fits the model. Raises SchemaMismatch or InvalidInput, in the first second
    instead of an hour later."""
    match = _match(_header(task), model, options)
    match.check()
    _require_writable(model.signature, options)


def score_chunk(task: ChunkTask) -> ScoredChunk:
    """Reads a chunk, scores it, writes its part. One result row for each record, in order, or an error for all.

    A record that can not be scored becomes a row of nulls and an entry in the part's errors.
    """
    part = part_key(task.job_id, task.chunk.first_record, task.attempt)
    return _score_into(task, part, errors_part_key(task.job_id, task.chunk.first_record, task.attempt))[0]


def score_small(task: PlanTask, job_id: str, attempt: int, model: ModelVersion, options: Options) -> Planned | Small:
    """Plans, scores and assembles an input of one chunk in one call. Gives the plan alone when it has more chunks, or
    when row errors end the job: then its part is wanted."""
    planned = plan_chunks(task)
    if not planned.complete or len(planned.chunks) != 1:
        return planned
    chunk_task = ChunkTask(task.input, job_id, attempt, planned.chunks[0], model, options, task.sessions)
    key, errors = result_key(job_id, attempt), errors_key(job_id, attempt)
    scored, stored = _score_into(chunk_task, key, errors)
    if scored.rows_failed and (options.on_row_error == "fail" or options.max_errors is not None):
        return planned
    listed = errors if scored.errors_bytes else None
    return Small(planned, scored, Result(key, stored.bytes, stored.sha256, listed, scored.errors_bytes))


def _score_into(task: ChunkTask, key: str, errors_key: str) -> tuple[ScoredChunk, Stored]:
    store = _storage(task.input.storage)
    match = _match(_header(task.input), task.model, task.options)
    with store.open(task.input.key) as source:
        reading, passed = match.read(task.input.format, source, task.input.dialect, task.chunk)
    scored = _score(_session(task.input.storage, task.model, task.sessions), match, reading, task.chunk)
    result_format = get_format(task.options.format)
    result = _result(result_format, scored, passed, match)
    with store.create(key) as writer:
        writer.write(result_format.write(result, task.input.dialect))
        stored = writer.commit()
    errors_bytes = 0
    if scored.errors:
        with store.create(errors_key) as writer:
            writer.write(_error_lines(scored.errors, reading.records, task.chunk, task.options.key))
            errors_bytes = writer.commit().bytes
    done = ScoredChunk(
        first_record=task.chunk.first_record,
        records=task.chunk.records,
        rows_failed=int(scored.failed.sum()),
        part_bytes=stored.bytes,
        part_sha256=stored.sha256,
        errors_bytes=errors_bytes,
        notes=match.notes,
    )
    return done, stored


def stored_parts(job_id: str, done: Iterable[tuple[Chunk, int, int, int]]) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of committed chunks (`jobs.done_chunks`) and of their error lists, in order."""
    parts, errors = [], []
    for chunk, attempt, part_bytes, errors_bytes in done:
        parts.append(Part(part_key(job_id, chunk.first_record, attempt), part_bytes, chunk.records))
        if errors_bytes:
            errors.append(Part(errors_part_key(job_id, chunk.first_record, attempt), errors_bytes, chunk.records))
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
    return get_format(format).assemble(parts, store.open, dialect, sum(part.records for part in parts))


def convert_chunk(
    task: Input,
    chunk: Chunk,
    model: ModelVersion,
    top_k: int | None,
    format: str,
    dialect: Dialect,
    key: str,
    escape: bool = False,
) -> Part:
    """Writes one chunk of a result in another format, under `key`. `escape`: with texts that are no formulas.

    A CSV says no types: the model's own columns have those of its signature, the others stay text. From CSV to CSV
    all is text, so that numbers keep their digits.
    """
    there = _header(task).columns
    types = {
        column.name: column.dtype
        for column in model.signature.columns
        if column.name in there and column.dtype != "image"
    }
    types |= {
        name: dtype for name, kind in output_columns(model.signature, top_k).items() if (dtype := DTYPES.get(kind))
    }
    if format == task.format == "csv":
        types = {}
    store = _storage(task.storage)
    with store.open(task.key) as source:
        records = get_format(task.format).read(source, task.dialect, chunk, types).records
    if escape and isinstance(records, pl.DataFrame):
        records = escape_formulas(records)
    with store.create(key) as writer:
        writer.write(get_format(format).write(records, dialect))
        return Part(key, writer.commit().bytes, chunk.records)


# --- online ----------------------------------------------------------------------------------------------------------


def predict_online(task: OnlineTask) -> Online:
    """Scores the records of one request body. The same code as for a chunk, hence the same answers."""
    header, chunk, source = _online_input(task)
    match = _match(header, task.model, task.options)
    match.check()
    reading, passed = match.read(task.format, source, task.dialect, chunk)
    session = _session(task.storage, task.model, task.sessions)
    started = time.perf_counter()
    scored = _score(session, match, reading, chunk)
    inference_ms = 1000 * (time.perf_counter() - started)
    jsonl = get_format("jsonl")
    result = _result(jsonl, scored, passed, match)
    lines = jsonl.write(result, task.dialect).splitlines()
    return Online([orjson.loads(line) for line in lines], tuple(scored.errors), inference_ms)


def validate_online(task: OnlineTask) -> tuple[RowError, ...]:
    """Reads and checks the records of one request body against the model's signature, without scoring them."""
    header, chunk, source = _online_input(task)
    match = _match(header, task.model, task.options)
    match.check()
    reading, _ = match.read(task.format, source, task.dialect, chunk)
    _, _, errors = build_inputs(match.signature, match.binding, reading.records, 0)
    return tuple(_in_order(reading.errors + errors))


def admit_model(storage: str, key: str) -> tuple[Signature, dict[str, str], str]:
    """Admits an uploaded artifact and stores the mended graph under `key` + `.onnx`; gives what was learnt of it."""
    from batchserve.inference.admission import admit  # with onnx, which no other call needs

    store = _storage(storage)
    with store.open(key) as source:
        admitted = admit(source.read())
    mended = f"{key}.onnx"
    with store.create(mended) as writer:
        writer.write(admitted.model)
        writer.commit()
    answer = admitted.signature, admitted.metadata, mended
    del admitted
    give_back_memory()
    return answer


# --- an input and a model -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Match:
    """How the columns of an input meet a model, under the options of a job."""

    header: Header
    signature: Signature
    options: Options
    binding: Binding
    passed: tuple[str, ...]
    """The columns that travel to the result, in file order, the key first."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of the types, once for a job."""
        wide = [name for name, kind in self.header.columns.items() if kind == pl.Float64()]
        rounded = [name for name in wide if self.binding.types.get(name) == "float32"]
        return (f"float64 columns were rounded to the model's float32: {', '.join(rounded)}",) if rounded else ()

    def check(self) -> None:
        """Raises SchemaMismatch when the types or first values of the input do not fit."""
        binding = self.binding if self.header.columns else None
        check_types(self.signature, binding, self.header.columns, self.header.sample)

    def read(
        self, format: str, source: BinaryIO, dialect: Dialect, chunk: Chunk
    ) -> tuple[Reading, pl.DataFrame | None]:
        """The records of a chunk in the types of the model, and of these what travels along (None: arrays).

        In the same format in and out, values travel as they were written, not as the model rounds them.
        """
        needed = [name for name in self.header.columns if name in self.passed or name in self.binding.used]
        reader = get_format(format)
        reading = reader.read(source, dialect, chunk, self.binding.types, needed or None)
        if isinstance(reading.records, dict):
            return reading, None
        passed = pl.DataFrame([reading.records[name] for name in self.passed])
        both = [name for name in self.passed if name in self.binding.used]
        if both and _FAMILY.get(format, format) == _FAMILY.get(self.options.format, self.options.format):
            written = reader.read(source, dialect, chunk, {}, both).records
            if isinstance(written, pl.DataFrame):
                passed = passed.with_columns(written.get_columns())
        return reading, passed


_FAMILY = {"json": "jsonl", "arrows": "arrow"}
"""Formats that hold the same values in other brackets."""


def _match(header: Header, model: ModelVersion, options: Options) -> _Match:
    """Raises SchemaMismatch for columns that are missing, to the model or to the options."""
    names = list(header.columns)
    if not names and isinstance(header.sample, pl.DataFrame):
        raise InvalidInput("the input has no records, so its columns are unknown; expected one record or more")
    # Arrays, a header without columns, fill the inputs by their own names.
    binding = bind(model.signature, names, options.columns) if names else Binding({}, {})
    _require_columns(names, options)
    match options.passthrough:
        case "all":
            passed = names
        case "none":
            passed = []
        case "unused":
            passed = [name for name in names if name not in binding.used]
        case chosen:
            passed = [name for name in names if name in chosen]
    if options.key is not None:
        passed = [options.key, *(name for name in passed if name != options.key)]
    return _Match(header, model.signature, options, binding, tuple(passed))


def _require_columns(names: Sequence[str], options: Options) -> None:
    wanted = set(options.passthrough) if isinstance(options.passthrough, tuple) else set()
    wanted |= {options.key} if options.key is not None else set()
    if unknown := sorted(wanted - set(names)):
        there = f"it has {', '.join(map(repr, names))}" if names else "it holds arrays, which have no columns"
        raise SchemaMismatch(
            f"the input has no column {', '.join(map(repr, unknown))}; {there}",
            errors=[
                {"column": name, "message": "asked for in passthrough or key, not in the input"} for name in unknown
            ],
        )


# --- one chunk -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Scored:
    """Outputs of the graph for every record; those that `failed` hold no answer and stand in `errors`."""

    outputs: Tensors
    failed: np.ndarray
    errors: list[RowError]


def _score(session: Session, match: "_Match", reading: Reading, chunk: Chunk) -> _Scored:
    inputs, failed, missing = build_inputs(match.signature, match.binding, reading.records, chunk.first_record)
    # A value that only travels along and does not fit is told, but fails nothing.
    unread = [error for error in reading.errors if error.column is None or error.column in match.binding.used]
    for error in unread:
        failed[error.record - chunk.first_record] = True
    outputs, crashed = _run(session, match.signature, inputs, chunk)
    unanswered = list(_without_answer(match.signature, outputs, failed, chunk))
    for error in (*crashed, *unanswered):
        failed[error.record - chunk.first_record] = True
    # The first cause is the cause: what could not be read is missing too, and what is missing may crash.
    errors, told = list(reading.errors), {error.record for error in unread}
    for consequence in (missing, crashed, unanswered):
        errors += [error for error in consequence if error.record not in told]
        told |= {error.record for error in consequence}
    return _Scored(outputs, failed, _in_order(errors))


def _without_answer(signature: Signature, outputs: Tensors, failed: np.ndarray, chunk: Chunk) -> Iterator[RowError]:
    """Records whose probabilities are no numbers, as an infinite input makes them: their label would be made up."""
    for output in signature.outputs:
        array = outputs[output.name]
        if output.role == "probabilities" and array.dtype.kind == "f" and np.isnan(array.min(initial=0)):
            lost = np.isnan(array).any(axis=tuple(range(1, array.ndim))) & ~failed
            for index in np.flatnonzero(lost).tolist():
                message = f"{output.name} of this record is not a number: is one of its values infinite or too large?"
                yield RowError(chunk.first_record + index, "not-a-number", message)


def _run(session: Session, signature: Signature, inputs: Tensors, chunk: Chunk) -> tuple[Tensors, list[RowError]]:
    """Runs the graph over all records, batch by batch; a batch that fails is bisected to name its bad records."""
    per_record = {tensor.name for tensor in signature.inputs if tensor.per_record}
    records, size = chunk.records, _batch(signature, chunk.records)
    errors: list[RowError] = []
    blocks: list[Tensors] = []
    spans = [(start, min(start + size, records)) for start in range(0, records, size)]
    pending = spans[::-1]
    while pending:
        start, stop = pending.pop()
        batch = {name: array[start:stop] if name in per_record else array for name, array in inputs.items()}
        try:
            outputs = _run_batch(session, signature, batch, stop - start, per_record)
            check_count(outputs, stop - start)
        except ScoringFailed as failure:
            if signature.mode == "whole":
                raise
            if isinstance(failure, OutOfMemory) and _sessions.keep_only(session):
                pending.append((start, stop))  # other models held the memory: that is not this record's fault
                continue
            if stop - start == 1:
                errors.append(RowError(chunk.first_record + start, failure.code, failure.detail))
                blocks.append({})
            else:
                middle = (start + stop) // 2
                pending += [(middle, stop), (start, middle)]
            continue
        blocks.append(outputs)
    return _joined(blocks, signature, records), errors


def _run_batch(session: Session, signature: Signature, batch: Tensors, records: int, per_record: set[str]) -> Tensors:
    if signature.mode != "fixed" or records == signature.batch:
        return session.run(batch)
    padded = {
        name: np.concatenate([array, np.repeat(array[-1:], signature.batch - records, axis=0)])
        if name in per_record
        else array
        for name, array in batch.items()
    }
    return {name: array[:records] for name, array in session.run(padded).items()}


def _batch(signature: Signature, records: int) -> int:
    return max(records, 1) if signature.mode == "whole" else signature.batch


def _joined(blocks: Sequence[Tensors], signature: Signature, records: int) -> Tensors:
    """One array for each output. A block without outputs is one record that failed: a row of zeros, nulled later."""
    if len(blocks) == 1 and blocks[0]:
        return blocks[0]
    shapes = {name: array for block in blocks for name, array in block.items()} or _no_outputs(signature)
    joined = {}
    for name, like in shapes.items():
        missing = np.full((1, *like.shape[1:]), "" if like.dtype.kind in "OU" else 0, like.dtype)
        arrays = [block.get(name, missing) for block in blocks]
        joined[name] = np.concatenate(arrays) if arrays else np.zeros((records, *like.shape[1:]), like.dtype)
    return joined


def _no_outputs(signature: Signature) -> Tensors:
    return {
        output.name: np.zeros(
            (0, *(size or 1 for size in output.shape[1:])),
            object if output.dtype == "string" else output.dtype,
        )
        for output in signature.outputs
    }


# --- one result ------------------------------------------------------------------------------------------------------


def _result(format: Format, scored: _Scored, passed: pl.DataFrame | None, match: "_Match") -> Records:
    if format.name == "npz" and match.options.top_k is None and passed is None:
        return {name: _blanked(array, scored.failed) for name, array in scored.outputs.items()}
    outputs = to_columns(match.signature, scored.outputs, match.options.top_k)
    if scored.failed.any():
        keep = pl.Series(~scored.failed)
        outputs = outputs.select(
            pl.when(keep).then(pl.col(name)).otherwise(None).alias(name) for name in outputs.columns
        )
    if passed is None:
        return outputs
    clashing = {name: f"input_{name}" for name in passed.columns if name in outputs.columns}
    return pl.DataFrame([*passed.rename(clashing), *outputs]) if passed.width else outputs


def _require_writable(signature: Signature, options: Options) -> None:
    columns = output_columns(signature, options.top_k)
    if options.format == "npy" and pl.String() in columns.values():
        raise InvalidOptions("this model gives text, which npy can not hold: ask for csv, jsonl, parquet or arrow")


def _blanked(array: np.ndarray, failed: np.ndarray) -> np.ndarray:
    """The array with the rows that failed made empty: NaN, "" or 0. The errors list tells them from real zeros."""
    if not failed.any():
        return array
    array = array.copy()
    array[failed] = np.nan if array.dtype.kind == "f" else "" if array.dtype.kind in "OU" else 0
    return array


def _error_lines(errors: Iterable[RowError], records: Records, chunk: Chunk, key: str | None) -> bytes:
    keys = records[key] if key is not None and isinstance(records, pl.DataFrame) else None
    lines = []
    for error in errors:
        line: dict[str, Any] = {"record": error.record}
        if keys is not None:
            line["key"] = keys[error.record - chunk.first_record]
        line |= {"column": error.column, "code": error.code, "message": error.message}
        lines.append(orjson.dumps(line, default=str, option=orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _errors_pieces(store: Storage, parts: Sequence[Part]) -> Iterator[Piece]:
    return get_format(ERRORS_FORMAT).assemble(parts, store.open, Dialect(), sum(part.records for part in parts))


def _in_order(errors: Iterable[RowError]) -> list[RowError]:
    return sorted(errors, key=lambda error: error.record)


# --- what a process keeps --------------------------------------------------------------------------------------------


@lru_cache(maxsize=4)
def _storage(address: str) -> Storage:
    return open_storage(address)


@lru_cache(maxsize=32)
def _header(task: Input) -> Header:
    with _storage(task.storage).open(task.key) as source:
        return get_format(task.format).header(source, task.dialect)


_sessions = Sessions(capacity=1)
"""The models that this process keeps loaded, as many as the last task allowed."""


def _session(storage: str, model: ModelVersion, capacity: int) -> Session:
    def load() -> bytes:
        with _storage(storage).open(model_key(model.digest)) as artifact:
            return artifact.read()

    _sessions.capacity = capacity
    return _sessions.get(model.digest, model.signature.threads, load, model.signature.kernel)


def _online_input(task: OnlineTask) -> tuple[Header, Chunk, BinaryIO]:
    source = io.BytesIO(task.body)
    format = get_format(task.format)
    header = format.header(source, task.dialect)
    chunks = format.plan(source, task.dialect, None, ChunkLimits(bytes=2**62, records=task.records))
    chunk, more = next(chunks), next(chunks, None)
    if more is not None:
        raise PayloadTooLarge(
            f"an online request may hold {task.records} records; upload the file and predict it as a job"
        )
    return header, chunk, source
