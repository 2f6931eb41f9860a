"""HTTP bodies, as they stand in the OpenAPI document, and how they are made from the domain."""

import json
import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from batchserve.api import examples
from batchserve.domain import (
    Attempt,
    Column,
    InputTensor,
    Job,
    JobState,
    ModelVersion,
    Options,
    OutputTensor,
    StoredInput,
)
from batchserve.errors import BatchserveError
from batchserve.formats import FORMATS, RESULT_FORMATS
from batchserve.inference.outputs import ResultSchema
from batchserve.submission import Queueing, Submission, default_format

MAX_METADATA = 16
METADATA_BYTES = 16 * 1024
MAX_NAME = 4096
MAX_NAMES = 16_384
MAX_REFERENCE = 256
MAX_COUNT = 2**53
"""The largest number up to which a float counts every one."""
RUN_AFTER = datetime(1970, 1, 1, tzinfo=UTC), datetime(3000, 1, 1, tzinfo=UTC)
"""Between which a job may be put off: with any retention, all its times can be shown."""


def _comma_list(value: Any) -> Any:
    """Query parameters carry lists as `a,b` and everything else as JSON."""
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith(("[", "{")):
        return _json(value)
    return [part.strip() for part in value.split(",")]


def _word_or_list(value: Any) -> Any:
    return value if value in ("unused", "all", "none") else _comma_list(value)


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"this is not JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def plain_text(text: str) -> str:
    """A text that can be kept and sent again. Raises ValueError for NUL, and for half of a character."""
    if "\0" in text:
        raise ValueError("expected a text without the character NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("expected a text of whole characters, got a lone surrogate") from None
    return text


Plain = AfterValidator(plain_text)
_Name = Annotated[str, Field(max_length=MAX_NAME), Plain]
"""Of a column, or of an input of a model."""


def _scalar(value: Any) -> Any:
    """One fault for a value that is none of the types, instead of one for each of them."""
    if not isinstance(value, bool | int | float | str) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("expected a finite number, a text, true or false")
    return plain_text(value) if isinstance(value, str) else value


Shared = Annotated[
    bool
    | Annotated[int, Field(ge=-(2**63), lt=2**64)]
    | Annotated[float, Field(allow_inf_nan=False)]
    | Annotated[str, Field(max_length=65_536), Plain],
    BeforeValidator(_scalar),
]
"""A value that all records share, as it may come in JSON: of 64 bits, and finite."""


Columns = Annotated[
    Annotated[list[_Name], Field(max_length=MAX_NAMES)]
    | Annotated[dict[_Name, _Name], Field(max_length=MAX_NAMES)]
    | None,
    BeforeValidator(_comma_list, json_schema_input_type=str | list[str] | dict[str, str] | None),
    Field(
        description="For a model that does not name its columns: which to take, in order. "
        "A mapping says under which name the file has a column of the model."
    ),
]
TopK = Annotated[
    int | None, Field(ge=1, lt=2**31, description="Only the k most probable classes, as label_1, probability_1 ...")
]
Inputs = Annotated[
    Annotated[dict[_Name, Shared], Field(max_length=1024)] | None,
    BeforeValidator(_json, json_schema_input_type=dict[str, Shared] | str | None),
    Field(description="Values of model inputs that all records share.", examples=[{"threshold": 0.5}]),
]


class PredictOptions(BaseModel):
    """How to predict, as query parameters or as a JSON body."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[str, Plain] = Field(
        max_length=MAX_REFERENCE,
        description="`name` (its newest version) or `name@version`.",
        examples=["iris", "iris@2"],
    )
    format: str | None = Field(
        None,
        description="Format of the result. Default: the input's; jsonl for images.",
        examples=["csv", "parquet"],
    )
    passthrough: Annotated[
        Literal["unused", "all", "none"] | Annotated[list[_Name], Field(max_length=MAX_NAMES)],
        BeforeValidator(_word_or_list, json_schema_input_type=Literal["unused", "all", "none"] | str | list[str]),
    ] = Field("unused", description="Input columns copied to the result: those the model does not use, or a list.")
    columns: Columns = None
    key: _Name | None = Field(
        None, description="Column that identifies a record: first in the result, and in each row error."
    )
    on_row_error: Literal["continue", "fail"] = Field("continue", description="`fail` ends the job at a failed record.")
    max_errors: float | None = Field(
        None,
        ge=0,
        le=MAX_COUNT,
        allow_inf_nan=False,
        description="Failed records that end the job: a count, or below 1 a share of all records.",
    )
    top_k: TopK = None
    inputs: Inputs = None
    reuse: bool = Field(True, description="Reuse the result of a completed job with equal input, model and options.")
    priority: int = Field(0, ge=-100, le=100, description="Queued jobs with a higher priority start first.")
    run_after: datetime | None = Field(
        None, description="Do not start before this time (RFC 3339), of the years 1970 to 2999."
    )
    metadata: Annotated[
        dict[Annotated[str, Plain], Annotated[str, Plain]],
        BeforeValidator(_json, json_schema_input_type=dict[str, str] | str),
    ] = Field(
        default_factory=dict,
        max_length=MAX_METADATA,
        description="At most 16 pairs of texts, 16 KiB in all, stored with the job.",
    )

    @field_validator("format")
    @classmethod
    def _known_format(cls, name: str | None) -> str | None:
        if name is not None and name not in RESULT_FORMATS:
            raise ValueError(f"expected one of {', '.join(RESULT_FORMATS)}")
        return name

    @field_validator("run_after")
    @classmethod
    def _has_zone(cls, moment: datetime | None) -> datetime | None:
        if moment is not None and moment.tzinfo is None:
            raise ValueError("expected a time with a zone, as in 2026-11-20T02:00:00Z")
        if moment is not None and not RUN_AFTER[0] <= moment < RUN_AFTER[1]:
            raise ValueError("expected a time of the years 1970 to 2999")
        return moment

    @field_validator("metadata")
    @classmethod
    def _bounded(cls, pairs: dict[str, str]) -> dict[str, str]:
        size = sum(len(name.encode()) + len(value.encode()) for name, value in pairs.items())
        if size > METADATA_BYTES:
            raise ValueError(f"expected at most {METADATA_BYTES} bytes in all, got {size}")
        return pairs

    def submission(self, tenant: str, job_id: str, inputs: tuple[StoredInput, ...], model: ModelVersion) -> Submission:
        """What these options ask of the inputs of a job."""
        passthrough = self.passthrough
        options = Options(
            format=self.format or default_format(inputs[0].format, model),
            passthrough=tuple(passthrough) if isinstance(passthrough, list) else passthrough,
            columns=tuple(self.columns) if isinstance(self.columns, list) else self.columns,
            key=self.key,
            on_row_error=self.on_row_error,
            max_errors=self.max_errors,
            top_k=self.top_k,
            inputs=self.inputs,
        )
        run_after = self.run_after.timestamp() if self.run_after else None
        queueing = Queueing(self.priority, run_after, self.metadata, self.reuse)
        return Submission(tenant, job_id, inputs, model, options, queueing)


class ValidateOptions(BaseModel):
    """How to read the records of an online request, as query parameters."""

    model_config = ConfigDict(extra="forbid")

    columns: Columns = None
    inputs: Inputs = None
    delimiter: str | None = Field(
        None, description="Of a CSV: `,` (default), `;`, `tab` or `|`.", examples=[";"], max_length=8
    )


class OnlineOptions(ValidateOptions):
    """How to predict online, as query parameters."""

    top_k: TopK = None


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    model_config = ConfigDict(json_schema_extra={"example": examples.PROBLEM})

    type: str
    code: str = Field(description="Stable: for programs to decide by.")
    title: str
    status: int
    detail: str = Field(description="The problem, the expected and the received value.")
    instance: str = Field("", description="Path of the request; absent if it was refused before the path was read.")
    errors: list[dict[str, Any]] = Field(
        default_factory=list, description="Single errors: any of row, column, value, expected, message."
    )


class ModelReference(BaseModel):
    name: str
    version: int
    digest: str


class InputBody(BaseModel):
    bytes: int | None = Field(description="Null: not known before it was read, as of an input that is borrowed.")
    sha256: str | None
    media_type: str
    format: str
    filename: str | None
    rows: int | None = Field(description="Records, known when planning is done.")


class Rows(BaseModel):
    total: int | None
    ok: int
    failed: int


class Chunks(BaseModel):
    total: int | None
    done: int


class ResultBody(BaseModel):
    bytes: int
    sha256: str | None = Field(description="Null where the storage put the result together without reading its bytes.")
    media_type: str
    format: str
    rows: int


class AttemptBody(BaseModel):
    number: int
    worker: str
    started_at: datetime
    finished_at: datetime | None
    outcome: str | None
    error: dict[str, Any] | None


class JobBody(BaseModel):
    """A job. `state` is one of uploaded, queued, running, completed, failed, cancelled, expired."""

    model_config = ConfigDict(json_schema_extra={"example": examples.JOB})

    id: str
    tenant: str = Field(description="The tenant of the key that created it.")
    state: JobState
    reason: str | None
    model: ModelReference | None
    input: InputBody
    options: dict[str, Any]
    attempt: int
    attempts: list[AttemptBody]
    cancel_requested: bool
    rows: Rows
    chunks: Chunks
    progress: float = Field(ge=0, le=1, description="The share that is done, including assembly; 1.0 when completed.")
    rows_per_s: float | None
    eta_s: float | None
    queue_position: int | None
    result: ResultBody | None
    reused_from: str | None
    error: dict[str, Any] | None
    notes: list[str]
    created_at: datetime
    queued_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    expires_at: datetime | None
    metadata: dict[str, str]
    links: dict[str, str]


class RefusedJob(BaseModel):
    """A job that stays uploaded, since its input does not fit the model."""

    id: str
    problem: dict[str, Any] = Field(description="`code` and `detail` of the problem that its predict would return.")

    @classmethod
    def of(cls, job_id: str, error: BatchserveError) -> Self:
        return cls(id=job_id, problem={"code": error.code, "detail": error.detail})


class QueuedBody(BaseModel):
    """What became of the uploaded jobs that one request queued."""

    model_config = ConfigDict(json_schema_extra={"example": examples.QUEUED})

    queued: int = Field(description="Jobs that wait for a worker now.")
    completed: int = Field(description="Jobs that reused the result of an equal job.")
    refused: list[RefusedJob]
    jobs: list[str] = Field(description="The ids of the queued and the completed jobs, in the order of their upload.")


class JobList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.JOBS})

    jobs: list[JobBody]
    next: str | None = Field(description="Value of `after` for the next page; null on the last one.")


class ColumnBody(BaseModel):
    name: str
    dtype: str
    nullable: bool = Field(description="Whether the model handles missing values itself.")


class TensorBody(BaseModel):
    name: str
    dtype: str
    shape: list[int | None]


class ModelInputBody(TensorBody):
    columns: list[str] | None = Field(
        description="The columns that fill it, by name. null: an array, or columns without names in their order."
    )


class ModelBody(BaseModel):
    """A model version: what it takes, what it gives, how it is run."""

    model_config = ConfigDict(json_schema_extra={"example": examples.MODEL})

    name: str
    version: int
    digest: str
    bytes: int
    task: str
    columns: list[ColumnBody] = Field(description="Columns taken from a table, by name. Empty: any, in file order.")
    inputs: list[ModelInputBody]
    outputs: list[TensorBody]
    result_columns: dict[str, str] = Field(description="Columns that the result adds, with their types.")
    labels: list[str]
    mode: str
    batch: int
    threads: int
    records_per_second: float | None
    notes: list[str]
    sample: list[dict[str, Any]]
    metadata: dict[str, Any]
    created_at: datetime
    links: dict[str, str]


class ModelList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.MODELS})

    models: list[ModelBody]


class OnlineBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.ONLINE})

    prediction: list[dict[str, Any]] = Field(description="Each record with the outputs of the model, in order.")
    errors: list[dict[str, Any]] = Field(description="Of records that could not be scored; those hold nulls.")
    model: ModelReference
    inference_ms: float = Field(description="Time of the model alone, without reading and decoding.")


class ValidationBody(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": examples.VALIDATION})

    valid: bool
    errors: list[dict[str, Any]]
    model: ModelReference


def query_parameters(options: type[BaseModel]) -> list[dict[str, Any]]:
    """Options as the OpenAPI document has parameters of a query, where lists and mappings are texts."""
    return [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": {"type": "string"} if name in _TEXTS else schema,
            "description": schema.get("description", ""),
        }
        for name, schema in options.model_json_schema()["properties"].items()
    ]


_TEXTS = ("columns", "inputs", "metadata", "passthrough")


def job_body(job: Job, attempts: list[Attempt], queue_position: int | None, now: float) -> JobBody:
    rate, eta = _speed(job, attempts, now)
    return JobBody(
        id=job.id,
        tenant=job.tenant,
        state=job.state,
        reason=job.reason,
        model=model_reference(job.model) if job.model else None,
        input=InputBody(
            bytes=job.input.bytes,
            sha256=job.input.sha256,
            media_type=FORMATS[job.input.format].media_type,
            format=job.input.format,
            filename=job.input.filename,
            rows=job.rows_planned if job.planned else None,
        ),
        options=_options(job),
        attempt=job.attempt,
        attempts=[_attempt(attempt) for attempt in attempts],
        cancel_requested=job.cancel_requested_at is not None,
        rows=Rows(total=job.rows_planned if job.planned else None, ok=job.rows_ok, failed=job.rows_failed),
        chunks=Chunks(total=job.chunks_total if job.planned else None, done=job.chunks_done),
        progress=job.progress,
        rows_per_s=rate,
        eta_s=eta,
        queue_position=queue_position,
        result=_result(job),
        reused_from=job.reused_from,
        error=job.error,
        notes=list(job.notes),
        created_at=_time(job.created_at),
        queued_at=_time_or_none(job.queued_at),
        started_at=_time_or_none(job.started_at),
        finished_at=_time_or_none(job.finished_at),
        expires_at=_time_or_none(job.expires_at),
        metadata=job.metadata,
        links=_links(job),
    )


def model_body(model: ModelVersion) -> ModelBody:
    signature = model.signature
    labels = next((output.labels for output in signature.outputs if output.labels), ())
    link = f"/v1/models/{model.name}/versions/{model.version}"
    return ModelBody(
        name=model.name,
        version=model.version,
        digest=model.digest,
        bytes=model.bytes,
        task=signature.task,
        columns=[_column(column) for column in signature.columns],
        inputs=[_input(tensor) for tensor in signature.inputs],
        outputs=[_tensor(tensor) for tensor in signature.outputs],
        result_columns={name: str(kind) for name, kind in ResultSchema(signature).columns.items()},
        labels=list(labels),
        mode=signature.mode,
        batch=signature.batch,
        threads=signature.threads,
        records_per_second=signature.records_per_second,
        notes=list(signature.notes),
        sample=list(signature.sample),
        metadata={name: _maybe_json(text) for name, text in model.metadata.items()},
        created_at=_time(model.created_at),
        links={
            "self": link,
            "versions": f"/v1/models/{model.name}/versions",
            "predict": f"/v1/models/{model.name}/predict",
            "validate": f"/v1/models/{model.name}/validate",
        },
    )


def model_reference(model: ModelVersion) -> ModelReference:
    return ModelReference(name=model.name, version=model.version, digest=model.digest)


def _options(job: Job) -> dict[str, Any]:
    if job.options is None:
        return {}
    return {
        "format": job.options.format,
        "passthrough": job.options.passthrough,
        "columns": job.options.columns,
        "key": job.options.key,
        "on_row_error": job.options.on_row_error,
        "max_errors": job.options.max_errors,
        "top_k": job.options.top_k,
        "inputs": job.options.inputs,
        "priority": job.priority,
        "run_after": _time_or_none(job.run_after),
    }


def _result(job: Job) -> ResultBody | None:
    if job.state is not JobState.COMPLETED or job.result is None or job.options is None:
        return None
    return ResultBody(
        bytes=job.result.bytes,
        sha256=job.result.sha256,
        media_type=FORMATS[job.options.format].media_type,
        format=job.options.format,
        rows=job.rows_done,
    )


def _speed(job: Job, attempts: list[Attempt], now: float) -> tuple[float | None, float | None]:
    """Rows per second in the last attempt, and the seconds that are left at that pace."""
    rows = job.rows_done - attempts[-1].rows_before if attempts else 0
    if rows <= 0:
        return None, None
    attempt = attempts[-1]
    elapsed = max((attempt.finished_at or now) - attempt.started_at, 1e-3)
    running = job.state is JobState.RUNNING and job.progress > 0
    gained = job.progress * rows / job.rows_done
    return round(rows / elapsed, 1), round((1 - job.progress) * elapsed / gained, 1) if running else None


def _links(job: Job) -> dict[str, str]:
    download, self_ = f"/v1/download/{job.id}", f"/v1/jobs/{job.id}"
    return {
        "self": self_,
        "input": f"{download}/input",
        "result": download,
        "errors": f"{download}/errors",
        "events": f"{self_}/events",
        "cancel": f"{self_}/cancel",
    }


def _attempt(attempt: Attempt) -> AttemptBody:
    return AttemptBody(
        number=attempt.number,
        worker=attempt.worker,
        started_at=_time(attempt.started_at),
        finished_at=_time_or_none(attempt.finished_at),
        outcome=attempt.outcome,
        error=attempt.error,
    )


def _column(column: Column) -> ColumnBody:
    return ColumnBody(name=column.name, dtype=column.dtype, nullable=column.nullable)


def _input(tensor: InputTensor) -> ModelInputBody:
    names = None if tensor.columns is None else [column.name for column in tensor.columns]
    return ModelInputBody(name=tensor.name, dtype=tensor.dtype, shape=list(tensor.shape), columns=names)


def _tensor(tensor: OutputTensor) -> TensorBody:
    return TensorBody(name=tensor.name, dtype=tensor.dtype, shape=list(tensor.shape))


def _maybe_json(text: str) -> Any:
    try:
        return orjson.loads(text)  # which refuses what an answer cannot hold, such as lone surrogates
    except ValueError:
        return text


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _time_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else _time(seconds)
