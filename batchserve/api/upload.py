"""POST /v1/upload: bytes -> storage, under a job ID."""

import time
import unicodedata
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import Message
from typing import Annotated, Any

import uuid_utils
from fastapi import APIRouter, Query, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from batchserve import idempotency, jobs, scoring
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import BLOCK, Body, require_space
from batchserve.api.deps import (
    PROBLEMS,
    IdempotencyKey,
    Service,
    ServiceDep,
    bare_key,
    job_response,
    once,
    read_body,
    replayed,
    resolve_model,
)
from batchserve.api.schemas import JobBody
from batchserve.domain import ModelVersion, Options
from batchserve.errors import BadRequest, InvalidInput, InvalidOptions, ScoringCrashed
from batchserve.formats import sniff
from batchserve.jobs import NewInput
from batchserve.storage import input_key

router = APIRouter(tags=["upload"])

Delimiter = Annotated[
    str | None, Query(description="Of a CSV: `,` (default), `;`, `tab` or `|`.", examples=[";"], max_length=8)
]
ModelName = Annotated[str | None, Query(description="`name` or `name@version`.", examples=["flights"])]
Filename = Annotated[
    str | None,
    Query(description="Kept as the input's name; Content-Disposition works as well.", examples=["flights.csv"]),
]

INPUT_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "The bytes of a file (`curl -T`), gzip or zstd compressed or not; or a form with one `file`.",
        "content": {
            "text/csv": {
                "schema": {"type": "string"},
                "example": "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n",
            },
            "application/x-ndjson": {"schema": {"type": "string"}, "example": '{"age": 31, "city": "Bern"}\n'},
            "application/json": {
                "schema": {"type": "object"},
                "example": {"data": [{"age": 31, "city": "Bern"}, {"age": None, "city": "Biel"}]},
            },
            "application/vnd.apache.parquet": {"schema": {"type": "string", "format": "binary"}},
            "application/vnd.apache.arrow.file": {"schema": {"type": "string", "format": "binary"}},
            "application/vnd.apache.arrow.stream": {"schema": {"type": "string", "format": "binary"}},
            "application/x-npy": {"schema": {"type": "string", "format": "binary"}},
            "application/x-npz": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    }
}


@router.post(
    "/v1/upload", status_code=201, response_model=JobBody, responses=PROBLEMS, openapi_extra=INPUT_BODY,
    operation_id="upload", summary="Store an input under a new job ID",
)  # fmt: skip
@router.put("/v1/upload", status_code=201, response_model=JobBody, responses=PROBLEMS, include_in_schema=False)
async def upload(
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    delimiter: Delimiter = None,
    filename: Filename = None,
    model: ModelName = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """The job is `uploaded`: nothing runs until a predict. 201 means that the bytes are safely on disk.

    The type is taken from the bytes; a Content-Type that contradicts them is refused (415). `curl -T` may PUT. With
    `model`, the beginning of the input is checked against its signature, and predict need not name it again.
    """
    key = bare_key(idempotency_key)

    async def work() -> Response:
        version = resolve_model(service, model) if model else None
        async with received_input(request, service, delimiter, filename) as received:
            new = received.input
            content = idempotency.fingerprint("upload", str(request.query_params), new.sha256)
            if (answer := await replayed(service, caller, key, content)) is not None:
                return answer
            if version is not None:
                await check_input(service, new, version, Options(new.format))

            def insert(connection: Connection) -> None:
                now = time.time()
                jobs.create(connection, new, version, now, caller.home)
                if key is not None:
                    idempotency.remember(connection, key, content, new.job_id, 201, now, caller.tenant)

            await keep(service, received, insert)
        return job_response(read_body(service, new.job_id), 201)

    return await once(service, caller, key, work)


@dataclass(slots=True)
class Received:
    """An input in storage that no job has yet. Unless it is `kept`, its bytes are removed again."""

    input: NewInput
    kept: bool = False


@asynccontextmanager
async def received_input(
    request: Request, service: Service, delimiter: str | None, filename: str | None
) -> AsyncIterator[Received]:
    received = Received(await _receive(request, service, delimiter, filename))
    try:
        yield received
    finally:
        if not received.kept:
            await run_in_threadpool(service.runtime.storage.delete, received.input.key)


async def keep(service: Service, received: Received, insert: Callable[[Connection], None]) -> None:
    """Gives an input its row, in one transaction with all that `insert` does."""

    def discard() -> None:
        received.kept = False

    def commit() -> None:
        with service.naming_bytes(undo=discard) as connection:
            insert(connection)

    received.kept = True  # from now on: when the request is cancelled, the thread goes on to its commit
    await run_in_threadpool(commit)


async def check_input(service: Service, new: NewInput, model: ModelVersion, options: Options) -> None:
    """Raises SchemaMismatch or InvalidInput when the beginning of an input does not fit a model."""
    source = scoring.Input(service.runtime.settings.storage, new.key, new.format, new.dialect)
    what = (scoring.check_input, source, model, options)
    try:
        await service.call(*what, seconds=service.runtime.settings.online_timeout)
    except ScoringCrashed:  # maybe killed by somebody, for no fault of the input: that is no reason to refuse it
        await service.call(*what, seconds=service.runtime.settings.online_timeout)


async def _receive(request: Request, service: Service, delimiter: str | None, filename: str | None) -> NewInput:
    """Streams the body into storage, durably, before any row names it. Raises for bytes of no supported type."""
    runtime = service.runtime
    require_space(runtime)
    job_id = str(uuid_utils.uuid7())
    media_type = request.headers.get("content-type")
    body = Body(request, runtime.settings, runtime.settings.upload_bytes)
    filename = filename or _disposition_filename(request.headers.get("content-disposition"))
    if media_type is not None and media_type.startswith("multipart/form-data"):
        file = await _form_file(request, body)
        blocks, media_type, filename = body.decoded(_file_blocks(file)), file.content_type, filename or file.filename
    else:
        blocks = body.blocks()
    beginning = await anext(blocks, b"")
    if not beginning:
        raise InvalidInput("the body is empty: expected a file with a header or records, got 0 bytes")
    format, dialect = sniff(beginning, media_type, filename, delimiter)
    with runtime.storage.create(input_key(job_id)) as writer:
        stored = await body.store(writer, beginning, blocks)
    return NewInput(
        job_id, input_key(job_id), stored.bytes, stored.sha256, format.name, dialect, _clean_filename(filename)
    )


async def _form_file(request: Request, body: Body) -> UploadFile:
    """The one file of a form, which waits in the temporary folder. The limits of the body hold for the form."""
    try:
        form = await MultiPartParser(request.headers, body.blocks(), max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise BadRequest(f"the form can not be read: {error.message}") from None
    files = [value for value in form.values() if isinstance(value, UploadFile)]
    if len(files) != 1:
        raise InvalidOptions(f"the form needs one file in the field `file`, got {len(files)}")
    return files[0]


async def _file_blocks(file: UploadFile) -> AsyncGenerator[bytes]:
    try:
        while block := await file.read(BLOCK):
            yield block
    finally:
        await file.close()


def _disposition_filename(header: str | None) -> str | None:
    if header is None:
        return None
    message = Message()
    message["content-disposition"] = header
    return message.get_filename()


def _clean_filename(name: str | None) -> str | None:
    """The client's name for the file: kept to be shown, never part of a path."""
    if name is None:
        return None
    shown = "".join(char for char in unicodedata.normalize("NFC", name) if char.isprintable())
    return shown.encode()[:255].decode(errors="ignore") or None
