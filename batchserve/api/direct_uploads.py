"""/v1/uploads: clients send large inputs to the object store themselves.

What a client has sent by one request may change as long as its URL is valid. So the store makes a copy that nobody else
can write, and that is verified and read. Parts cannot change once they are joined.
"""

import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import uuid_utils
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve.access import Caller
from batchserve.api.auth import CallerDep
from batchserve.api.bodies import COMPRESSED, json_object, require_space
from batchserve.api.deps import PROBLEMS, ServiceDep, job_response, leaving, parsed, read_body
from batchserve.api.schemas.jobs import JobBody
from batchserve.api.schemas.uploads import NewUpload, SentUpload, UploadBody, upload_body
from batchserve.api.upload import (
    FIT_PARAMETERS,
    Filename,
    InputHints,
    ModelName,
    Read,
    Received,
    create_job,
    fit_options,
)
from batchserve.domain import DirectUpload, StoredInput
from batchserve.errors import (
    BatchserveError,
    DigestMismatch,
    DirectUploadUnsupported,
    Gone,
    JobNotFound,
    PayloadTooLarge,
    Unavailable,
    UnsupportedMedia,
    UploadIncomplete,
    UploadNotFound,
)
from batchserve.formats import encoding_of, sniff
from batchserve.jobs import uploads
from batchserve.quotas.account import Added, charge_if_limited, require_room
from batchserve.service import Service
from batchserve.storage import Stored, TakesParts, TakesUploads, copy_object, delete_objects, input_key, sent_key
from batchserve.submission import clean_filename, wanted_columns
from batchserve.upkeep import retention

router = APIRouter(tags=["upload"])

UploadId = Annotated[str, Path(max_length=64)]
_BLOCK = 32 * 2**20
"""Bytes that are read at once, by several requests."""
_BEGINNING = 2**20
"""Bytes from which the format of an input is detected."""
_OTHERWISE = "send it with POST /v1/upload"


def _json_body(kind: type[BaseModel], *, required: bool) -> dict[str, Any]:
    return {"required": required, "content": {"application/json": {"schema": kind.model_json_schema()}}}


@router.post(
    "/v1/uploads", status_code=201, response_model=UploadBody, responses=PROBLEMS,
    openapi_extra={"requestBody": _json_body(NewUpload, required=True)}, operation_id="begin_upload",
    summary="Begin a direct upload to the object store",
)  # fmt: skip
async def begin_upload(request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """The client PUTs the bytes to the URLs, and then completes the upload; before, there is no job. 422
    `direct-upload-unsupported` where the storage takes none: then use `POST /v1/upload`."""
    runtime = service.runtime
    size, most = parsed(NewUpload, await json_object(request, runtime.settings)).bytes, runtime.settings.upload_bytes
    if size > most:
        raise PayloadTooLarge(f"the input has {size} bytes, at most {most} are accepted")
    body = await run_in_threadpool(_begin, service, caller, size)
    headers = {"location": body.links["self"], "cache-control": "no-store"}
    return Response(body.model_dump_json(), 201, headers, media_type="application/json")


@router.post(
    "/v1/uploads/{upload_id}/complete", status_code=201, response_model=JobBody, responses=PROBLEMS,
    openapi_extra={"requestBody": _json_body(SentUpload, required=False), "parameters": FIT_PARAMETERS},
    operation_id="complete_upload", summary="Verify what was sent, and create its job",
)  # fmt: skip
async def complete_upload(
    upload_id: UploadId,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    read: Read,
    filename: Filename = None,
    model: ModelName = None,
) -> Response:
    """Reads what lies in the store: its length and digest, and its type as that of any upload. Then the job is
    `uploaded`, under the ID of the upload; to repeat the request gives the same job. A refused one changes nothing:
    complete the upload with other options, or send the bytes again (parts as long as some are missing).
    """
    sha256 = parsed(SentUpload, await json_object(request, service.runtime.settings)).sha256
    fit = fit_options(request, model)

    def end(connection: Connection, _: float) -> None:
        uploads.end(connection, upload_id)

    try:
        upload = await _pending(service, caller, upload_id)
        version = await service.resolve_model(model) if model else None
        hints = InputHints(caller.tenant, read, wanted_columns(version, fit.columns) if version else frozenset())
        async with _received(request, service, upload, hints, filename) as received:
            if sha256 is not None and sha256.lower() != received.sha256:
                raise DigestMismatch(
                    f"what was sent does not match: expected sha-256 {sha256}, got {received.sha256} of {upload.bytes} "
                    "bytes"
                )
            return await create_job(service, replace(caller, tenant=upload.tenant), received, version, fit, end)
    except (UploadNotFound, UploadIncomplete) as error:  # perhaps completed meanwhile, and what was sent removed
        return await _completed(service, caller, upload_id, error)


@router.delete(
    "/v1/uploads/{upload_id}", status_code=204, responses=PROBLEMS, operation_id="delete_upload",
    summary="Give up a direct upload",
)  # fmt: skip
async def delete_upload(upload_id: UploadId, service: ServiceDep, caller: CallerDep) -> Response:
    """Removes what was sent. A completed upload is a job, and is removed as such."""
    upload = await _find(service, caller, upload_id)

    def delete() -> None:
        service.runtime.database.write_freeing(lambda connection: uploads.end(connection, upload.id))
        retention.remove_sent(service.runtime.storage, [upload])

    await run_in_threadpool(delete)
    return Response(status_code=204)


def _begin(service: Service, caller: Caller, size: int) -> UploadBody:
    runtime = service.runtime
    storage, life = runtime.storage, runtime.settings.upload_life
    if not isinstance(storage, TakesUploads):
        raise DirectUploadUnsupported(
            f"the storage is no object store to which clients could send inputs: {_OTHERWISE}"
        )
    require_space(runtime)
    added = Added(size)
    with runtime.database.read() as connection:  # before the store prepares for parts
        if service.limits.of_in(connection, caller.home) is not None:
            require_room(connection, caller.home, added, runtime.database.moment(connection).wall)
    upload_id = str(uuid_utils.uuid7())
    parts = storage.begin_parts(input_key(upload_id), size, life) if isinstance(storage, TakesParts) else None
    urls = parts.urls if parts else (storage.upload_url(sent_key(upload_id), size, life),)
    with runtime.database.write() as connection:
        now = runtime.database.moment(connection).wall
        upload = DirectUpload(upload_id, caller.home, size, now + life, parts.id if parts else None)
        uploads.begin(connection, upload)
        charge_if_limited(service.limits, connection, caller.home, added, now)
    return upload_body(upload, parts.part_bytes if parts else size, urls)


async def _find(service: Service, caller: Caller, upload_id: str) -> DirectUpload:
    """Raises UploadNotFound."""
    return await service.runtime.database.fetch_one(
        lambda connection: uploads.get(connection, upload_id, caller.tenant)
    )


async def _pending(service: Service, caller: Caller, upload_id: str) -> DirectUpload:
    """Raises UploadNotFound, and Gone for one that has expired."""
    database = service.runtime.database

    def find(connection: Connection) -> tuple[DirectUpload, float]:
        return uploads.get(connection, upload_id, caller.tenant), database.moment(connection).wall

    upload, now = await database.fetch(find)
    if now > upload.expires_at:
        raise Gone(f"the upload {upload_id} has expired: begin another one")
    return upload


async def _completed(service: Service, caller: Caller, upload_id: str, error: BatchserveError) -> Response:
    """The job of an upload that is completed. Raises the error where there is none."""
    try:
        await service.require_visible(caller.tenant, upload_id)
        return job_response(await read_body(service, upload_id), 201)
    except JobNotFound:
        raise error from None


# --- verification ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _received(
    request: Request, service: Service, upload: DirectUpload, hints: InputHints, filename: str | None
) -> AsyncIterator[Received]:
    """What was sent as an input. In the end either that remains, if it is kept, or what was sent."""
    sent, key = uploads.sent_object(upload), input_key(upload.id if upload.multipart else str(uuid_utils.uuid7()))
    unneeded, received = {key} - {sent}, None
    try:
        beginning, stored = await service.calls.verify(hints.tenant, partial(_verified, service, upload, key))
        new = _recognised(beginning, stored, key, filename, hints)
        if new.format == "zip":
            unpacked = await service.unpack(hints.tenant, new, hints.read, hints.columns, leaving(request))
            new = replace(unpacked, filename=new.filename or clean_filename(unpacked.filename))
            unneeded.add(new.key)
        received = Received(upload.id, new, stored.sha256)
        yield received
        unneeded.add(sent)
    finally:
        if received is not None and received.kept:
            unneeded.discard(received.input.key)
        await run_in_threadpool(delete_objects, service.runtime.storage, sorted(unneeded))


def _verified(service: Service, upload: DirectUpload, key: str) -> tuple[bytes, Stored]:
    """Makes an object of what was sent that cannot change any more; returns its beginning, and its length and digest.
    Raises UploadIncomplete."""
    storage = service.runtime.storage
    try:
        if upload.multipart is None:
            copy_object(storage, sent_key(upload.id), key, upload.bytes)
        elif isinstance(storage, TakesParts):
            _require_length(upload, storage.join_parts(key, upload.multipart, upload.bytes))
        source = storage.open(key)
    except FileNotFoundError:
        raise UploadIncomplete(f"nothing was sent for the upload {upload.id}: PUT its {upload.bytes} bytes") from None
    with source:
        _require_length(upload, size := source.seek(0, os.SEEK_END))
        source.seek(0)
        digest, beginning = hashlib.sha256(), b""
        while block := source.read(_BLOCK):
            digest.update(block)
            beginning = beginning or block[:_BEGINNING]
            if service.stopping.is_set():
                raise Unavailable("the server stops: complete the upload again", retry_after=5)
    return beginning, Stored(size, digest.hexdigest())


def _require_length(upload: DirectUpload, sent: int) -> None:
    if sent != upload.bytes:
        raise UploadIncomplete(f"{upload.bytes} bytes were announced, and {sent} were sent: send them again")


def _recognised(beginning: bytes, stored: Stored, key: str, filename: str | None, hints: InputHints) -> StoredInput:
    """Raises UnsupportedMedia, also for what other uploads convert while they are received."""
    if beginning.startswith(COMPRESSED):
        raise UnsupportedMedia(f"a direct upload is stored as it is sent, and these bytes are compressed: {_OTHERWISE}")
    if (encoding := encoding_of(beginning, hints.read)) is not None:
        raise UnsupportedMedia(f"a direct upload is stored as it is sent, and this text is in {encoding}: {_OTHERWISE}")
    format, dialect = sniff(beginning, None, filename, hints.read, hints.columns)
    return StoredInput(key, format.name, dialect, stored.bytes, stored.sha256, clean_filename(filename))
