"""POST /v1/upload: bytes -> storage, under a job ID."""

import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeVar

import uuid_utils
from fastapi import APIRouter, Depends, Query, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import correlation, idempotency
from batchserve.access import Caller
from batchserve.api.auth import CallerDep, caller_of
from batchserve.api.bodies import Body, require_space
from batchserve.api.deps import (
    PROBLEMS,
    IdempotencyKey,
    ServiceDep,
    bare_key,
    body_of,
    has_long_key,
    job_response,
    leaving,
    parsed,
    replayed,
    served,
)
from batchserve.api.forms import MAX_FILES, disposition_filename, is_form, open_form
from batchserve.api.head import header
from batchserve.api.plain import plain
from batchserve.api.schemas.jobs import JobBody
from batchserve.api.schemas.options import FitOptions, query_parameters
from batchserve.domain import ModelVersion, Options, ReadOptions, StoredInput
from batchserve.errors import InvalidInput, InvalidOptions
from batchserve.formats import FORMATS, encoding_of, get_format, sniff
from batchserve.idempotency import KeyedRequest
from batchserve.jobs import requests
from batchserve.quotas.account import Added, charge_if_limited, require_room
from batchserve.service import JobSnapshot, Service
from batchserve.storage import input_key, is_in_row, key_in_row
from batchserve.submission import Submission, clean_filename, default_format, naming_bytes, wanted_columns
from batchserve.values import MAX_REFERENCE, Plain

router = APIRouter(tags=["upload"])

T = TypeVar("T")

Delimiter = Annotated[
    str | None,
    Query(description="Of a CSV: `,`, `;`, `tab` or `|`. Default: recognised.", examples=[";"], max_length=8),
]
Decimal = Annotated[
    str | None, Query(description="Decimal mark of a CSV: `.` (default) or `,`.", examples=[","], max_length=8)
]
Encoding = Annotated[
    str | None,
    Query(
        description="Of a text: `utf-8` (default), `latin-1`, `windows-1252`, `utf-16` and others.",
        examples=["windows-1252"],
        max_length=32,
    ),
]
Sheet = Annotated[
    Annotated[str, Plain] | None,
    Query(description="Of an Excel workbook: the first one by default.", examples=["Sheet1"], max_length=256),
]


async def read_options(
    delimiter: Delimiter = None, decimal: Decimal = None, encoding: Encoding = None, sheet: Sheet = None
) -> ReadOptions:
    """How an input is to be read, as the query says."""
    return ReadOptions(delimiter, decimal, encoding, sheet)


Read = Annotated[ReadOptions, Depends(read_options)]
ModelName = Annotated[
    Annotated[str, Plain] | None,
    Query(description="`name` or `name@version`.", examples=["flights"], max_length=MAX_REFERENCE),
]
Filename = Annotated[
    Annotated[str, Plain] | None,
    Query(
        description="Stored as the input's name; Content-Disposition works as well.",
        examples=["flights.csv"],
        max_length=4096,
    ),
]

INPUT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a file (`curl -T`), plain or compressed by gzip or zstd; or a form with one "
        f"file of any type. A form with several, at most {MAX_FILES}, is an archive of them: one record per image.",
        "content": {
            # Any of the formats; first, for clients that are generated from this.
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "text/csv": {
                "schema": {"type": "string"},
                "example": "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n",
            },
            "application/x-ndjson": {"schema": {"type": "string"}, "example": '{"age": 31, "city": "Bern"}\n'},
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": True,
                    "description": "Records under `data`, or one record. An array of records is taken as well.",
                },
                "example": {"data": [{"age": 31, "city": "Bern"}, {"age": None, "city": "Biel"}]},
            },
            **{
                format.media_type: {"schema": {"type": "string", "format": "binary"}}
                for format in FORMATS.values()
                if not format.is_text
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {"file": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                }
            },
        },
    }
}

FIT_PARAMETERS = query_parameters(FitOptions)


async def _upload(request: Request) -> Response | None:
    if request.scope["query_string"] or has_long_key(request):
        return None
    key = request.headers.get("idempotency-key")
    return await upload(request, served(request), caller_of(request), ReadOptions(), idempotency_key=key)


@router.post(
    "/v1/upload", status_code=201, response_model=JobBody, responses=PROBLEMS,
    openapi_extra={**INPUT_BODY, "parameters": FIT_PARAMETERS}, operation_id="upload",
    summary="Store an input under a new job ID",
)  # fmt: skip
@router.put(
    "/v1/upload", status_code=201, response_model=JobBody, responses=PROBLEMS,
    openapi_extra={"parameters": FIT_PARAMETERS}, include_in_schema=False,
)  # fmt: skip
@plain(_upload)
async def upload(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    read: Read,
    filename: Filename = None,
    model: ModelName = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """The job is `uploaded`: nothing runs until a predict. 201 means that the bytes are durably on disk. The type is
    detected from the bytes; a Content-Type that contradicts them is refused (415). `curl -T` may PUT. With `model`, the
    beginning of the input is checked against its signature, and predict need not name it again;
    `columns` and `inputs` count for that check, and predict takes them again.
    """
    key, fit = bare_key(idempotency_key), fit_options(request, model)
    await require_quota(request, service, caller, key)
    with service.only_one(caller.tenant, key):
        version = await service.resolve_model(model) if model else None
        columns = wanted_columns(version, fit.columns) if version else frozenset()
        async with received_input(request, service, InputHints(caller.tenant, read, columns), filename) as received:
            content = idempotency.fingerprint("upload", str(request.query_params), received.sha256)
            keyed = KeyedRequest(caller.tenant, key, content)
            if (answer := await replayed(service, keyed)) is not None:
                return answer

            def remember(connection: Connection, now: float) -> None:
                keyed.remember(connection, received.job_id, 201, now)

            return await create_job(service, caller, received, version, fit, remember)


async def create_job(
    service: Service,
    caller: Caller,
    received: "Received",
    version: ModelVersion | None,
    fit: FitOptions,
    also: Callable[[Connection, float], None],
) -> Response:
    """Creates the uploaded job of an input, whose beginning fits the version if one is named. `also` is called first in
    its transaction, with the time."""
    new, asked_by = received.input, correlation.current()
    if version is not None:
        options = _options(fit, new, version)
        await service.check(caller.tenant, Submission(caller.home, received.job_id, (new,), version, options))

    def insert(connection: Connection) -> JobSnapshot:
        now = service.runtime.database.moment(connection).wall
        also(connection, now)
        job = requests.create(connection, received.job_id, (new,), version, now, caller.home, asked_by.traceparent)
        charge_if_limited(service.limits, connection, caller.home, Added(new.bytes or 0), now)
        return service.shown(job, [], now)

    view = await keep(service, caller, received, insert)
    service.note_created(caller.tenant, view.job, new)
    return job_response(await body_of(service, view), 201)


def fit_options(request: Request, model: str | None) -> FitOptions:
    given = {name: request.query_params[name] for name in FitOptions.model_fields if name in request.query_params}
    if given and model is None:
        raise InvalidOptions(f"{', '.join(given)}: only with model, as part of its check")
    return parsed(FitOptions, given)


def _options(fit: FitOptions, new: StoredInput, version: ModelVersion) -> Options:
    columns = tuple(fit.columns) if isinstance(fit.columns, list) else fit.columns
    return Options(default_format(new.format, version), columns=columns, inputs=fit.inputs)


@dataclass(slots=True)
class Received:
    """An input without a job: stored already, or small and to be stored with its row. Unless it is `kept`, stored bytes
    are removed again."""

    job_id: str
    input: StoredInput
    sha256: str
    kept: bool = False


@dataclass(frozen=True, slots=True)
class InputHints:
    """What is known of an input besides its bytes and the names that came with them."""

    tenant: str
    read: ReadOptions
    columns: frozenset[str]
    """The names that a table is expected to have."""


@asynccontextmanager
async def received_input(
    request: Request, service: Service, hints: InputHints, filename: str | None
) -> AsyncIterator[Received]:
    received = await _receive(request, service, hints, filename)
    try:
        yield received
    finally:
        if not received.kept and not is_in_row(received.input.key):
            await run_in_threadpool(service.runtime.storage.delete, received.input.key)


async def keep(service: Service, caller: Caller, received: Received, insert: Callable[[Connection], T]) -> T:
    """Inserts the row of an input of this caller in the transaction of `insert`, and returns its value."""

    def discard() -> None:
        received.kept = False

    def commit() -> T:
        with naming_bytes(service.runtime.database, undo=discard) as connection:
            return insert(connection)

    if is_in_row(received.input.key):
        is_limited = await service.limits.of(caller.home) is not None
        return await service.runtime.database.commit(insert, alone=is_limited)
    received.kept = True  # set before the commit: when the request is cancelled, the thread continues
    return await run_in_threadpool(commit)


async def require_quota(
    request: Request, service: Service, caller: Caller, key: str | None, *, queues: bool = False
) -> None:
    """Raises QuotaExceeded and StorageQuotaExceeded before a large body is sent in vain. The transaction of its job
    decides; so it does on a small one, and on one that may have been answered before, under its idempotency key."""
    if await service.limits.of(caller.home) is None:
        return
    length, database = header(request.scope, b"content-length"), service.runtime.database
    if length is not None and int(length) <= service.runtime.settings.inline_bytes:
        return

    def require(connection: Connection) -> None:
        if key is None or not idempotency.is_known(connection, key, caller.tenant):
            size = int(length or 0) - service.runtime.settings.inline_bytes  # a form has more than its file
            added = Added(max(1, size), queues=queues)
            require_room(connection, caller.home, added, database.moment(connection).wall)

    await database.fetch(require)


async def _receive(request: Request, service: Service, hints: InputHints, filename: str | None) -> Received:
    """Streams the body into storage, durably, before a row references it. Raises for bytes of an unsupported type."""
    runtime = service.runtime
    require_space(runtime)
    media_type = request.headers.get("content-type")
    if not filename and (disposition := request.headers.get("content-disposition")) is not None:
        filename = disposition_filename(disposition)
    body = Body(request, runtime.settings, runtime.settings.upload_bytes)
    if not is_form(media_type):
        return await _store(request, service, body, _Sent(body.blocks(), media_type, filename), hints)
    async with open_form(media_type, body, runtime.storage) as form:
        if len(form.files) > 1:
            sent = _Sent(body.decoded(form.archive()), get_format("zip").media_type, None)
        else:
            (file,) = form.files
            sent = _Sent(body.decoded(form.blocks(file)), file.content_type, filename or file.name)
        return await _store(request, service, body, sent, hints)


@dataclass(frozen=True, slots=True)
class _Sent:
    """The bytes of an input, and the client's description of them."""

    blocks: AsyncGenerator[bytes]
    media_type: str | None
    filename: str | None


async def _store(request: Request, service: Service, body: Body, sent: _Sent, hints: InputHints) -> Received:
    job_id = str(uuid_utils.uuid7())
    blocks = sent.blocks
    beginning = await anext(blocks, b"")
    if not beginning:
        raise InvalidInput("the body is empty: expected a file with a header or records, got 0 bytes")
    if (encoding := encoding_of(beginning, hints.read)) is not None:
        blocks = body.transcoded(beginning, blocks, encoding)
        beginning = await anext(blocks, b"")
    format, dialect = sniff(beginning, sent.media_type, sent.filename, hints.read, hints.columns)
    filename = clean_filename(sent.filename)
    if len(beginning) <= service.runtime.settings.inline_bytes and format.name != "zip":
        if not (following := await anext(blocks, b"")):
            sha256, key = hashlib.sha256(beginning).hexdigest(), key_in_row(input_key(job_id))
            small = StoredInput(key, format.name, dialect, len(beginning), sha256, filename, content=beginning)
            return Received(job_id, small, sha256)
        blocks = _begun(following, blocks)
    with service.runtime.storage.create(input_key(job_id)) as writer:
        stored = await body.store(writer, beginning, blocks)
    new = StoredInput(input_key(job_id), format.name, dialect, stored.bytes, stored.sha256, filename)
    if format.name == "zip":
        new = await _unpacked(request, service, new, hints)
    assert new.sha256 is not None
    return Received(job_id, new, new.sha256)


async def _begun(first: bytes, rest: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    yield first
    async for block in rest:
        yield block


async def _unpacked(request: Request, service: Service, stored: StoredInput, hints: InputHints) -> StoredInput:
    """The table in a zip in the place of the zip, or that itself."""
    new: StoredInput | None = None
    try:
        new = await service.unpack(hints.tenant, stored, hints.read, hints.columns, leaving(request))
    finally:
        if new is not stored:
            await run_in_threadpool(service.runtime.storage.delete, stored.key)
    return replace(new, filename=stored.filename or clean_filename(new.filename))
