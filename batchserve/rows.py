"""Validation of rows: types, ranges and words that releases of batchserve write.

The database may hold others: written by hand, damaged by a disk, or let through by a bug. Every reader refuses such a
row with UnreadableRow, and no other row is affected. The columns of a row are named as in the domain; statements and
joins belong to the modules that read them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import orjson
from pydantic import AfterValidator, ConfigDict, Field, Strict, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from batchserve.access import Action, ApiKey, AuditEntry, Quota, Scope
from batchserve.db.cache import ALWAYS, VersionedCache
from batchserve.domain import (
    Attempt,
    Chunk,
    CommittedChunk,
    Dialect,
    DirectUpload,
    Job,
    JobState,
    ModelVersion,
    Options,
    Result,
    Signature,
    StoredInput,
)
from batchserve.errors import UnreadableRow
from batchserve.formats import FORMATS, RESULT_FORMATS
from batchserve.recurring import ActionKind, CatchUp, Overlap, Schedule, Tick, TickState

__all__ = [
    "EARLIEST", "LATEST", "attempt", "audit_entry", "chunk", "committed_chunk", "direct_upload", "fault_of",
    "is_readable", "job", "key", "model", "options_adapter", "quota", "reader", "remembered", "require_written",
    "schedule", "signature", "signature_adapter", "stored_input", "tick",
]  # fmt: skip

Row = Mapping[Any, Any]
T = TypeVar("T")

EARLIEST, LATEST = -62_135_596_800.0, 253_402_300_799.0
"""The years 1 to 9999, which `datetime` can represent."""

signature_adapter = TypeAdapter(Signature)
options_adapter = TypeAdapter(Options)


def _one_of(name: str, known: Mapping[str, Any]) -> str:
    if name not in known:
        raise ValueError(f"expected one of {', '.join(known)}")
    return name


def _encodable(value: Any) -> Any:
    try:
        orjson.dumps(value)
    except TypeError as error:
        raise ValueError("nested too deeply") from error
    return value


def _known(facts: dict[str, Any] | None) -> dict[str, Any] | None:
    notes = (facts or {}).get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError("expected notes that are a list of texts")
    return facts


Time = Annotated[float, Field(ge=EARLIEST, le=LATEST, allow_inf_nan=False)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Format = Annotated[str, AfterValidator(lambda name: _one_of(name, FORMATS))]
_Json = Annotated[dict[str, Any] | None, AfterValidator(_encodable)]
_Facts = Annotated[dict[str, Any] | None, AfterValidator(_known)]


def _read_options(value: Any) -> Options | None:
    """An uploaded job has `{}`."""
    if not value and not isinstance(value, dict) and value is not None:
        raise ValueError("expected a JSON object")
    if not value:
        return None
    options = options_adapter.validate_python(value)
    _one_of(options.format, RESULT_FORMATS)
    return options


_JOB_TYPES: dict[str, Any] = {
    "state": Annotated[JobState, Strict(False)],
    "options": Any,
    "facts": _Facts,
    "error": _Json,
    "progress": _Share,
    "expires_in": _Rate | None,
}


def _columns(kind: type, own: Mapping[str, Any], leave: tuple[str, ...] = ()) -> dict[str, Any]:
    """The types of a domain's fields as rows hold them: times that `datetime` can represent, counts from 0 to the
    largest that a column holds."""
    strict: dict[Any, Any] = {float: Time, float | None: Time | None, int: _Count, int | None: _Count | None}
    types = {name: strict.get(hint, hint) for name, hint in get_type_hints(kind).items() if name not in leave}
    return types | dict(own)


def _adapter(name: str, types: dict[str, Any], *, total: bool = True) -> TypeAdapter[dict[str, Any]]:
    row = with_config(ConfigDict(strict=True))(TypedDict(name, types, total=total))  # type: ignore[operator]
    return TypeAdapter(row)


_INPUT = {
    f"input_{name}": hint
    for name, hint in _columns(
        StoredInput,
        {"format": _Format, "delimiter": Literal[",", ";", "\t", "|"], "decimal": Literal[".", ","]},
        leave=("dialect", "content"),
    ).items()
}
_RESULT = {"result_key": str | None, "result_bytes": _Count | None, "result_sha256": str | None}
_ERRORS = {"errors_key": str | None, "errors_bytes": _Count | None}
_JOB = {
    **_columns(Job, _JOB_TYPES, leave=("model", "inputs", "result")),
    "priority": Annotated[int, Field(ge=-(2**31), lt=2**31)],
    "inputs_total": Annotated[int, Field(ge=1)],
    **_INPUT,
    **_RESULT,
    **_ERRORS,
}
_input_row = _adapter("InputRow", _INPUT)
_job_row, _some_of_job = _adapter("JobRow", _JOB), _adapter("SomeOfJob", _JOB, total=False)
_attempt_row = _adapter("AttemptRow", _columns(Attempt, {"error": _Json}))
_chunk_row = _adapter("ChunkRow", _columns(Chunk, {}))
_COMMITTED = _columns(CommittedChunk, {"facts": _Facts}, leave=("chunk",))
_committed_row = _adapter("CommittedRow", _COMMITTED)
_model_row = _adapter("ModelRow", _columns(ModelVersion, {"signature": str}))
_key_row = _adapter("KeyRow", _columns(ApiKey, {"scope": Annotated[Scope, Strict(False)]}))
_audit_row = _adapter("AuditRow", _columns(AuditEntry, {"action": Annotated[Action, Strict(False)]}))
_quota_row = _adapter("QuotaRow", _columns(Quota, {"requests_per_second": _Rate | None}))
_direct_upload_row = _adapter("DirectUploadRow", _columns(DirectUpload, {}))
_schedule_row = _adapter(
    "ScheduleRow",
    _columns(
        Schedule,
        {
            "action": Annotated[ActionKind, Strict(False)],
            "request": Annotated[dict[str, Any], AfterValidator(_encodable)],
            "catch_up": Annotated[CatchUp, Strict(False)],
            "overlap": Annotated[Overlap, Strict(False)],
        },
    ),
)
_tick_row = _adapter(
    "TickRow",
    _columns(Tick, {"state": Annotated[TickState, Strict(False)], "late": bool, "error": _Json}),
)
_remembered_row = _adapter(
    "RememberedRow",
    {"job_id": str | None, "status": Annotated[int, Field(ge=200, lt=300)], "answer": str | None},
)


def job(row: Row, of_model: ModelVersion | None, further: Sequence[Row] | None = None) -> Job:
    """`further`: the rows of its inputs after the first, which is in the job's row; None: it is read without them.
    Raises UnreadableRow."""
    with _Named(f"job {row['id']!r}"):
        # A row of a prepared statement is validated as it is: further columns are ignored.
        values = _job_row.validate_python(row if type(row) is dict else {name: row[name] for name in _JOB})
        values["options"] = _read_options(values["options"])
        values["facts"] = values["facts"] or {}
        inputs = (_input(values), *(_input(_input_row.validate_python(_of(_INPUT, row))) for row in further or ()))
        if len(inputs) != values["inputs_total"] and further is not None:
            raise ValueError(f"inputs_total: it has {len(inputs)}")
        result = _result(values)
        own = {name: value for name, value in values.items() if name not in _APART}
        return Job(**own, inputs=inputs, result=result, model=of_model)


_APART = frozenset((*_INPUT, *_RESULT, *_ERRORS))


def stored_input(row: Row) -> StoredInput:
    """Raises UnreadableRow."""
    with _Named(f"input {row['number']!r} of job {row['job_id']!r}"):
        return _input(_input_row.validate_python(_of(_INPUT, row)))


def _of(types: Mapping[str, Any], row: Row) -> dict[str, Any]:
    return {name: row[name] for name in types}


def _input(values: Mapping[str, Any]) -> StoredInput:
    return StoredInput(
        key=values["input_key"],
        format=values["input_format"],
        dialect=Dialect(values["input_delimiter"], decimal=values["input_decimal"]),
        bytes=values["input_bytes"],
        sha256=values["input_sha256"],
        filename=values["input_filename"],
        owned=values["input_owned"],
        version=values["input_version"],
    )


def _result(values: Mapping[str, Any]) -> Result | None:
    key = values["result_key"]
    if key is None:
        return None
    if values["result_bytes"] is None:
        raise ValueError("result_bytes: expected the length of its result")
    errors = values["errors_key"], values["errors_bytes"] or 0
    return Result(key, values["result_bytes"], values["result_sha256"], *errors)


def require_written(values: Mapping[str, Any]) -> None:
    """Raises UnreadableRow unless `job` would accept these columns: checked before the commit."""
    with _Named("what was to be written"):
        _some_of_job.validate_python(values)
        _read_options(values.get("options"))


def attempt(row: Row) -> Attempt:
    """Raises UnreadableRow."""
    with _Named(f"attempt {row['number']!r} of job {row['job_id']!r}"):
        return Attempt(**_attempt_row.validate_python({name: row[name] for name in Attempt.__dataclass_fields__}))


def chunk(row: Row) -> Chunk:
    """Raises UnreadableRow."""
    with _Named(f"chunk {row['first_record']!r} of job {row['job_id']!r}"):
        return Chunk(**_chunk_row.validate_python({name: row[name] for name in Chunk.__dataclass_fields__}))


def committed_chunk(row: Row) -> CommittedChunk:
    """Raises UnreadableRow."""
    planned = chunk(row)
    with _Named(f"chunk {row['first_record']!r} of job {row['job_id']!r}"):
        values = _committed_row.validate_python({name: row[name] for name in _COMMITTED})
        values["facts"] = values["facts"] or {}
        return CommittedChunk(planned, **values)


def model(row: Row, prefix: str = "") -> ModelVersion:
    """`prefix`: of its columns in a join. Raises UnreadableRow."""
    values = {name: row[prefix + name] for name in ModelVersion.__dataclass_fields__}
    with _Named(f"model {values['name']}@{values['version']}"):
        text = values["signature"]
        values = _model_row.validate_python(values)
        values["signature"] = signature(text)
        return ModelVersion(**values)


_signatures: VersionedCache[str, Signature] = VersionedCache(256)


def signature(text: str) -> Signature:
    """Raises ValueError."""
    # Rows with the same text are read at every poll of a job; parsing costs more than the query.
    known = _signatures.get(text, ALWAYS)
    if known is None:
        orjson.loads(text)  # pydantic would take infinities, and NaN
        known = signature_adapter.validate_json(text)
        if min(known.batch, known.multiple, known.threads) < 1 or (known.records_per_second or 0.0) < 0:
            raise ValueError("expected a signature with a batch and threads of at least 1")
        _signatures.put(text, ALWAYS, known)
    return known


def key(row: Row) -> ApiKey:
    """Raises UnreadableRow."""
    with _Named(f"API key {row['id']!r}"):
        return ApiKey(**_key_row.validate_python({name: row[name] for name in ApiKey.__dataclass_fields__}))


def audit_entry(row: Row) -> AuditEntry:
    """Raises UnreadableRow."""
    with _Named(f"audit entry {row['id']!r}"):
        return AuditEntry(**_audit_row.validate_python({name: row[name] for name in AuditEntry.__dataclass_fields__}))


def reader(kind: type[T], what: str, own: Mapping[str, Any]) -> Callable[[Row], T]:
    """A function that reads a row as this dataclass, and raises UnreadableRow. `what`: how the row is called, with the
    names of its columns in braces. `own`: types of columns that the hints of the dataclass do not say."""
    types = _columns(kind, own)
    adapter = _adapter(f"{kind.__name__}Row", types)

    def read(row: Row) -> T:
        with _Named(what.format_map(row)):
            return kind(**adapter.validate_python(_of(types, row)))

    return read


def quota(row: Row) -> Quota:
    """Raises UnreadableRow."""
    with _Named(f"quota of {row['tenant']!r}"):
        return Quota(**_quota_row.validate_python({name: row[name] for name in Quota.__dataclass_fields__}))


def direct_upload(row: Row) -> DirectUpload:
    """Raises UnreadableRow."""
    with _Named(f"upload {row['id']!r}"):
        return DirectUpload(**_direct_upload_row.validate_python(dict(row)))


def schedule(row: Row) -> Schedule:
    """Raises UnreadableRow."""
    with _Named(f"schedule {row['id']!r}"):
        return Schedule(**_schedule_row.validate_python({name: row[name] for name in Schedule.__dataclass_fields__}))


def tick(row: Row) -> Tick:
    """Raises UnreadableRow."""
    with _Named(f"tick {row['id']!r} of schedule {row['schedule_id']!r}"):
        return Tick(**_tick_row.validate_python({name: row[name] for name in Tick.__dataclass_fields__}))


def remembered(row: Row) -> dict[str, Any]:
    """The remembered response of an idempotency key. Raises UnreadableRow."""
    with _Named(f"Idempotency-Key {row['key']!r}"):
        values = _remembered_row.validate_python({name: row[name] for name in ("job_id", "status", "answer")})
        if (values["job_id"] is None) == (values["answer"] is None):
            raise ValueError("expected a job or an answer")
        if values["answer"] is not None:
            orjson.loads(values["answer"])
        return values


def fault_of(read: Callable[[Row], object], row: Row) -> str | None:
    """Why this function cannot read a row; None when it can."""
    try:
        read(row)
    except UnreadableRow as error:
        return error.detail
    return None


def is_readable(read: Callable[[Row], object], row: Row) -> bool:
    return fault_of(read, row) is None


class _Named:
    """Raises UnreadableRow for the errors of validation inside. A generator would take three times as many calls."""

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "options"
            raise _unreadable(self._what, f"{place}: {first['msg'].removeprefix('Value error, ')}") from None
        if isinstance(error, ValueError):
            raise _unreadable(self._what, str(error)) from None


def _unreadable(what: str, reason: str) -> UnreadableRow:
    return UnreadableRow(
        f"the database's row of {what} cannot be read: {reason}. It is damaged, not as written by batchserve: "
        "remove it (`batchserve doctor` names the command)"
    )
