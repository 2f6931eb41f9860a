"""/v1/models: register, look up, and predict online."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated, Any, NamedTuple

import orjson
import uuid_utils
from fastapi import APIRouter, Header, Path, Query, Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve import audit, registry
from batchserve.access import Action, Caller
from batchserve.api import conditional
from batchserve.api.auth import ADMIN, CallerDep, caller_of
from batchserve.api.bodies import Body, require_space
from batchserve.api.deps import PROBLEMS, ServiceDep, leaving, parsed, served
from batchserve.api.forms import form_file, is_form, only_file, open_form
from batchserve.api.head import header
from batchserve.api.plain import plain
from batchserve.api.schemas.models import ModelBody, ModelList, OnlineBody, ValidationBody, model_body
from batchserve.api.schemas.options import OnlineOptions, ValidateOptions, query_parameters
from batchserve.api.upload import INPUT_BODY
from batchserve.db.cache import ALWAYS, VersionedCache
from batchserve.domain import ModelVersion, Options, RowError, Signature
from batchserve.errors import InvalidInput, ModelRefused, ScoringFailed
from batchserve.formats import encoding_of, sniff
from batchserve.formats.encodings import decode
from batchserve.registration import NewModel, has_artifact, register, require_name
from batchserve.scoring import online, unpacking
from batchserve.scoring.admission import admit_model
from batchserve.service import Service
from batchserve.service.groups import GROUP_BYTES
from batchserve.service.turns import Lane, Place
from batchserve.storage import Span, model_key
from batchserve.submission import wanted_columns
from batchserve.upkeep import holds
from batchserve.values import Plain

router = APIRouter(tags=["models"])

_NO_OPTIONS = OnlineOptions()
_READ_AS_IS = _NO_OPTIONS.read
_GROUP_SECONDS = 0.05
"""Time in the model for the requests of one run, after which others wait too long for theirs."""

Name = Annotated[str, Path(description="Letters, digits, `.`, `_` and `-`.", examples=["iris"])]
Reference = Annotated[str, Path(description="`name` (its newest version) or `name@version`.", examples=["iris"])]
Version = Annotated[int, Path(ge=1, examples=[1])]
IfMatch = Annotated[str | None, Header(description="The ETag of the newest version: register the one after it only.")]
IfNoneMatch = Annotated[str | None, Header(description="`*`: register a first version only.")]

MODEL_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "An ONNX file, or a zip of `model.onnx` and its external data; or a form with one such file.",
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            "application/zip": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": {"type": "string", "format": "binary"}}}
            },
        },
    }
}

RECORDS_BODY: dict[str, Any] = INPUT_BODY["requestBody"] | {
    "description": "Objects, or arrays of values in the order of the model's columns; an image, or base64 of one in "
    "JSON; the bytes of any file that could be uploaded; or a form with one such file.",
}


@router.put(
    "/v1/models/{name}", status_code=201, response_model=ModelBody, openapi_extra=MODEL_BODY,
    operation_id="register_model", summary="Register a version of a model", dependencies=ADMIN,
    responses={200: {"model": ModelBody, "description": "A version of these bytes exists."}, **PROBLEMS},
)  # fmt: skip
async def register_model(
    name: Name,
    request: Request,
    service: ServiceDep,
    caller: CallerDep,
    if_match: IfMatch = None,  # noqa: ARG001 - `conditional` reads it, and the next
    if_none_match: IfNoneMatch = None,  # noqa: ARG001
) -> Response:
    """The graph is checked, mended and measured in a limited process first; a refused model is not stored."""
    require_name(name)
    body = Body(request, service.runtime.settings, service.runtime.settings.model_bytes)
    media_type = header(request.scope, b"content-type")
    if not is_form(media_type):
        model, is_new = await admit_version(name, body, body.blocks(), request, service, caller)
        return _model_response(model, 201 if is_new else 200)
    require_space(service.runtime)
    async with open_form(media_type, body, service.runtime.storage) as form:
        blocks = body.decoded(form.blocks(only_file(form, "a model, with its external data, comes as one zip")))
        model, is_new = await admit_version(name, body, blocks, request, service, caller)
    return _model_response(model, 201 if is_new else 200)


async def admit_version(
    name: str,
    body: Body,
    blocks: AsyncGenerator[bytes],
    request: Request,
    service: Service,
    caller: Caller,
    steps: FilePath | None = None,
) -> tuple[ModelVersion, bool]:
    """The version that these `blocks` of a body are, and whether it is new. `steps`: see `admit_model`. Raises
    InvalidOptions for a name that a model cannot have, and ModelRefused."""
    require_name(name)
    runtime = service.runtime
    require_space(runtime)
    _require_preconditions(
        request, await runtime.database.fetch_one(lambda connection: registry.find_newest(connection, name))
    )
    key = f"uploads/{uuid_utils.uuid7()}"
    try:
        beginning = await anext(blocks, b"")
        if not beginning:
            raise ModelRefused("the body is empty: expected an ONNX file")
        with runtime.storage.create(key) as writer:
            stored = await body.store(writer, beginning, blocks)
        known = await runtime.database.fetch_one(
            lambda connection: registry.find_digest(connection, name, stored.sha256)
        )
        if known is not None and await run_in_threadpool(has_artifact, service.runtime.storage, stored.sha256):
            return known, False
        signature, metadata, mended = await _admit(service, caller, key, steps)
        model = await run_in_threadpool(
            _register, request, service, name, stored.sha256, stored.bytes, signature, metadata, mended
        )
    finally:
        await run_in_threadpool(_discard, service, key)
    return model, known is None


@router.head("/v1/models", include_in_schema=False)
@router.get(
    "/v1/models", response_model=ModelList, responses=PROBLEMS,
    operation_id="list_models", summary="List models, newest versions",
)  # fmt: skip
async def list_models(
    service: ServiceDep,
    caller: CallerDep,
    q: Annotated[Annotated[str, Plain] | None, Query(description="Part of a name.", max_length=128)] = None,
    limit: Annotated[int | None, Query(ge=1, le=200, description="Default: all.")] = None,
    after: Annotated[
        Annotated[str, Plain] | None, Query(description="`next` of the page before.", max_length=128)
    ] = None,
) -> Response:
    """By name."""
    return await _list(service, caller, lambda connection: registry.newest_page(connection, q, after or "", limit))


@router.head("/v1/models/{name}", include_in_schema=False)
@router.get(
    "/v1/models/{name}", response_model=ModelBody, responses=PROBLEMS, operation_id="get_model",
    summary="Show the newest version",
)  # fmt: skip
async def get_model(name: Reference, request: Request, service: ServiceDep) -> Response:
    return _shown(request, await service.resolve_model(name))


@router.head("/v1/models/{name}/versions", include_in_schema=False)
@router.get(
    "/v1/models/{name}/versions", response_model=ModelList, responses=PROBLEMS,
    operation_id="list_versions", summary="List all versions",
)  # fmt: skip
async def list_versions(name: Name, service: ServiceDep, caller: CallerDep) -> Response:
    return await _list(service, caller, lambda connection: (registry.versions(connection, name), None))


@router.head("/v1/models/{name}/versions/{version}", include_in_schema=False)
@router.get(
    "/v1/models/{name}/versions/{version}", response_model=ModelBody, responses=PROBLEMS,
    operation_id="get_version", summary="Show a version",
)  # fmt: skip
async def get_version(name: Name, version: Version, request: Request, service: ServiceDep) -> Response:
    return _shown(request, await service.resolve_model(f"{name}@{version}"))


@router.delete(
    "/v1/models/{name}/versions/{version}", status_code=204, responses=PROBLEMS, operation_id="delete_version",
    summary="Remove a version that no unfinished job uses", dependencies=ADMIN,
)  # fmt: skip
async def delete_version(
    name: Name, version: Version, request: Request, service: ServiceDep, caller: CallerDep
) -> Response:
    def forget(connection: Connection) -> ModelVersion:
        model = registry.resolve_to_remove(connection, name, version)
        conditional.require(request, _etag(model), exists=True)
        now = service.runtime.database.moment(connection).wall
        registry.delete_if_unused(connection, model, now)
        audit.note_model(connection, caller, Action.DELETE, model.reference, now)
        return model

    def delete() -> None:
        model = service.runtime.database.write_freeing(forget, exclusive="models")
        # Again the row first. While this transaction is open, these bytes cannot be registered again.
        with service.runtime.database.write(exclusive="models") as connection:
            held = holds.any_in_force(connection, service.runtime.database.moment(connection))
            if not held and not registry.has_version(connection, model.digest):
                service.runtime.storage.delete(model_key(model.digest))

    await run_in_threadpool(delete)
    return Response(status_code=204)


async def _predict_online(request: Request) -> Response:
    return await predict_online(request.path_params["name"], request, served(request), caller_of(request))


@router.post(
    "/v1/models/{name}/predict", response_model=OnlineBody, responses=PROBLEMS,
    openapi_extra={"parameters": query_parameters(OnlineOptions), "requestBody": RECORDS_BODY},
    operation_id="predict_online", summary="Predict a few records at once",
)  # fmt: skip
@plain(_predict_online)
async def predict_online(name: Reference, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """The same code as a job, hence the same answers: input fields and outputs of each record, in order.

    A record is an object, or an array with the values in the order of the model's columns; one object alone is one
    record. Images do not come back."""
    options = parsed(OnlineOptions, request.query_params) if request.scope["query_string"] else _NO_OPTIONS
    with service.calls.place(caller.tenant, Lane.ONLINE) as place:  # before its body is in memory
        asked = await _asked(name, request, service, options, options.top_k)
        task = await _online_task(asked, options, await _received(request, service), request, service, place)
        answer = await _online_answer(request, service, place, task)
    body = {
        "prediction": orjson.Fragment(answer.records),
        "errors": [_error(error) for error in answer.errors],
        "model": asked.reference,
        "inference_ms": round(answer.inference_ms, 3),
    }
    return Response(orjson.dumps(body), media_type="application/json")


async def predict_records(
    reference: str, records: list[dict[str, Any]], request: Request, service: Service, caller: Caller
) -> online.Online:
    """What `predict_online` answers to these records, sent as JSON."""
    with service.calls.place(caller.tenant, Lane.ONLINE) as place:
        asked = await _asked(reference, request, service, _NO_OPTIONS)
        received = _Received(orjson.dumps(records), "application/json")
        task = await _online_task(asked, _NO_OPTIONS, received, request, service, place)
        return await _online_answer(request, service, place, task)


@router.post(
    "/v1/models/{name}/validate", response_model=ValidationBody, responses=PROBLEMS,
    openapi_extra={"parameters": query_parameters(ValidateOptions), "requestBody": RECORDS_BODY},
    operation_id="validate_records", summary="Check a sample against the model's signature",
)  # fmt: skip
async def validate(name: Reference, request: Request, service: ServiceDep, caller: CallerDep) -> Response:
    """No job, nothing stored. `errors` names each value that does not fit; a sample that does not fit at all is a 422,
    as it would be for predict."""
    options = parsed(ValidateOptions, request.query_params)
    with service.calls.place(caller.tenant, Lane.ONLINE) as place:
        asked = await _asked(name, request, service, options)
        task = await _online_task(asked, options, await _received(request, service), request, service, place)
        seconds = service.runtime.settings.online_timeout
        errors = await service.calls.run(place, online.validate_online, task, seconds=seconds, leaving=leaving(request))
    body = {
        "valid": not errors,
        "errors": [_error(error) for error in errors],
        "model": asked.reference,
    }
    return Response(orjson.dumps(body), media_type="application/json")


class _Received(NamedTuple):
    """The body of an online request, and what came with it."""

    content: bytes
    media_type: str | None
    filename: str | None = None


async def _received(request: Request, service: Service) -> _Received:
    settings = service.runtime.settings
    body, media_type = Body(request, settings, settings.online_bytes), header(request.scope, b"content-type")
    if is_form(media_type):
        return _Received(*await form_file(media_type, body, service.runtime.storage))
    return _Received(await body.read(), media_type)


async def _online_task(
    asked: "_Asked", options: ValidateOptions, received: _Received, request: Request, service: Service, place: Place
) -> online.OnlineTask:
    settings, (content, media_type, filename) = service.runtime.settings, received
    if not content:
        raise InvalidInput("the body is empty: expected records as JSON, NDJSON, CSV, Parquet or Arrow, or an image")
    read = _READ_AS_IS if options is _NO_OPTIONS else options.read
    content = decode(content, encoding_of(content, read))
    format, dialect = sniff(content, media_type, filename, read, asked.columns)
    name_of_format = format.name
    if name_of_format == "zip":
        limits = (read, asked.columns, settings.online_bytes)
        table = await service.calls.run(
            place,
            unpacking.unpack_bytes,
            content,
            *limits,
            seconds=settings.online_timeout,
            leaving=leaving(request),
        )
        content, name_of_format, dialect = table or (content, name_of_format, dialect)
    return online.OnlineTask(asked.common, content, name_of_format, dialect)


@dataclass(frozen=True, slots=True)
class _Asked:
    """A version and the options of requests for it."""

    common: online.OnlineModel
    columns: frozenset[str]
    """Those that a table is expected to have."""
    reference: orjson.Fragment
    """The version in their answers."""


async def _asked(
    name: str, request: Request, service: Service, options: ValidateOptions, top_k: int | None = None
) -> _Asked:
    """The same object for requests with the same options, mostly. Raises ModelNotFound."""
    model = await service.resolve_model(name, request.scope["database_version"])
    is_plain = options is _NO_OPTIONS
    known = _latest.get((model.id, is_plain), ALWAYS)
    if known is not None and is_plain and known.common.model is model:
        return known
    settings = service.runtime.settings
    columns = tuple(options.columns) if isinstance(options.columns, list) else options.columns
    chosen = Options("jsonl", "all", columns, top_k=top_k, inputs=options.inputs)
    common = online.OnlineModel(settings.storage, model, chosen, settings.chunk_records)
    if known is not None and known.common == common:
        return known
    reference = {"name": model.name, "version": model.version, "digest": model.digest}
    asked = _Asked(common, wanted_columns(model, options.columns), orjson.Fragment(orjson.dumps(reference)))
    _latest.put((model.id, is_plain), ALWAYS, asked)
    return asked


_latest: VersionedCache[tuple[int, bool], _Asked] = VersionedCache(256)
"""By the ID of a version, and by whether there were no options."""


async def _online_answer(request: Request, service: Service, place: Place, task: online.OnlineTask) -> online.Online:
    how: dict[str, Any] = {"seconds": service.runtime.settings.online_timeout, "leaving": leaving(request)}
    if not task.may_travel:
        return await service.calls.run(place, online.predict_online, task, **how)
    body = task.body, task.format
    answer = await service.calls.together(
        place, online.predict_together, task.common.pickled, body, size=_size(task), **how
    )
    return online.Online(*answer)


def _size(task: online.OnlineTask) -> int:
    """The size of a request among others in a group: its bytes, or more where the model is slow."""
    speed = task.common.model.signature.records_per_second
    seconds = task.body.count(b"{") / speed if speed else 0.0
    return max(len(task.body), int(GROUP_BYTES * seconds / _GROUP_SECONDS))


async def _admit(
    service: Service, caller: Caller, key: str, steps: FilePath | None
) -> tuple[Signature, dict[str, str], str]:
    settings = service.runtime.settings
    try:
        with service.calls.place(caller.tenant, Lane.LONG) as place:
            async with service.calls.long_turn(place, settings.online_wait):
                seconds = settings.admission_timeout
                return await service.calls.run(place, admit_model, settings.storage, key, steps, seconds=seconds)
    except ScoringFailed as error:
        raise ModelRefused(f"the model failed its first run: {error.detail}") from error


async def _list(
    service: Service, caller: Caller, find: Callable[[Connection], tuple[list[ModelVersion], str | None]]
) -> Response:
    def read() -> str:  # encoded in the thread, too: signatures of thousands of versions
        with service.runtime.database.read() as connection:
            found, following = find(connection)
        return ModelList(models=[model_body(model) for model in found], next=following).model_dump_json()

    return Response(await service.calls.read(caller.tenant, read), media_type="application/json")


def _register(
    request: Request,
    service: Service,
    name: str,
    digest: str,
    size: int,
    signature: Signature,
    metadata: dict[str, str],
    mended: str,
) -> ModelVersion:
    storage = service.runtime.storage
    with storage.open(mended) as graph:
        artifact = [Span(mended, 0, graph.seek(0, 2))]
    new = NewModel(name, digest, size, signature, metadata, artifact)
    require = partial(_require_preconditions, request)
    return register(service.runtime.database, storage, new, require, by=caller_of(request))


def _discard(service: Service, key: str) -> None:
    for suffix in ("", ".onnx"):
        service.runtime.storage.delete(f"{key}{suffix}")


def _require_preconditions(request: Request, newest: ModelVersion | None) -> None:
    """`If-None-Match: *` registers a first version only, `If-Match` the one after a version. Raises
    PreconditionFailed."""
    conditional.require(request, _etag(newest) if newest else None, exists=newest is not None)


def _etag(model: ModelVersion) -> str:
    return f'"{model.version}-{model.digest}"'


def _shown(request: Request, model: ModelVersion) -> Response:
    etag = _etag(model)
    if (known := conditional.answered(request, etag)) is not None:
        return known
    return Response(model_body(model).model_dump_json(), 200, {"etag": etag}, media_type="application/json")


def _model_response(model: ModelVersion, status: int) -> Response:
    body = model_body(model)
    headers = {"location": body.links["self"], "etag": _etag(model)}
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


def _error(error: RowError) -> dict[str, Any]:
    return {"record": error.record, "column": error.column, "code": error.code, "message": error.message}
