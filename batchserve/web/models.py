"""The models: a list, each version with what is known of it, and the registration of a file."""

from pathlib import PurePath
from urllib.parse import quote, urlencode

from fastapi import Request, Response
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve import registry
from batchserve.access import Scope
from batchserve.api.auth import caller_of, require_admin
from batchserve.api.bodies import Body, require_space
from batchserve.api.deps import service_of
from batchserve.api.forms import is_form, only_file, open_form
from batchserve.api.models import admit_version, delete_version
from batchserve.api.schemas.models import model_body
from batchserve.domain import ModelVersion
from batchserve.errors import BadRequest, BatchserveError
from batchserve.service import Service
from batchserve.web.admissions import followed
from batchserve.web.forms import read_fields
from batchserve.web.pages import page, see
from batchserve.web.versions import differences, domain_text, parity_of

__all__ = ["ROUTES", "reference_of"]

_VERSIONS = 50
"""Most versions that are compared with the one before."""
_OWN_PLACES = ("columns", "labels", "parity", "sample", "targets", "task")
"""Entries of the metadata that a page shows otherwise."""


def _address(model: ModelVersion) -> str:
    return f"/models/{quote(model.name)}?version={model.version}"


async def list_page(request: Request) -> Response:
    return await _list_page(request)


async def _list_page(request: Request, status: int = 200, name: str = "", problem: str | None = None) -> Response:
    service, caller = service_of(request), caller_of(request)

    def read() -> list[ModelVersion]:
        with service.runtime.database.read() as connection:
            return registry.newest_versions(connection)

    models = [model_body(model) for model in await service.calls.read(caller.tenant, read)]
    is_admin = caller.scope is Scope.ADMIN
    return page(request, "models.html", status, models=models, is_admin=is_admin, name=name, problem=problem)


async def register(request: Request) -> Response:
    """Admits a file as `PUT /v1/models/{name}` does, and shows its version; a refusal is shown with the form."""
    caller = caller_of(request)
    await require_admin(caller)
    service, name = service_of(request), ""
    media_type = request.headers.get("content-type")
    if not is_form(media_type):
        raise BadRequest("expected a form with a file (multipart/form-data)")
    try:
        require_space(service.runtime)
        body = Body(request, service.runtime.settings, service.runtime.settings.model_bytes)
        async with open_form(media_type, body, service.runtime.storage) as form:
            name = form.fields.get("name", "").strip()
            file = only_file(form, "a model, with its external data, comes as one zip")
            name = name or PurePath(file.name).stem
            blocks = body.decoded(form.blocks(file))
            with followed(request, caller) as steps:
                model, is_new = await admit_version(name, body, blocks, request, service, caller, steps)
    except BatchserveError as refused:
        return await _list_page(request, refused.status, name, refused.detail)
    state = "new" if is_new else "known"
    return see(request, f"{_address(model)}&{urlencode({'admitted': state})}#admission")


async def show(request: Request) -> Response:
    """`version`: the newest by default."""
    service, caller = service_of(request), caller_of(request)
    model = await service.resolve_model(reference_of(request))
    versions = await _versions(service, caller.tenant, model.name)
    listed = versions[:_VERSIONS]
    changes = {now.version: differences(now, before) for now, before in zip(listed, versions[1:], strict=False)}
    return page(
        request, "model.html", model=model, body=model_body(model), versions=listed,
        more_versions=len(versions) - len(listed), changes=changes, parity=parity_of(model),
        values={
            column.name: domain_text(domain)
            for tensor in model.signature.inputs
            for column, domain in zip(tensor.columns or (), tensor.domains, strict=False)
        },
        metadata={
            name: text
            for name, text in model.metadata.items()
            if name.removeprefix("batchserve.") not in _OWN_PLACES
        },
        is_admin=caller.scope is Scope.ADMIN, admitted=request.query_params.get("admitted", ""),
    )  # fmt: skip


async def remove(request: Request) -> Response:
    """Deletes a version, once that was confirmed."""
    caller = caller_of(request)
    await require_admin(caller)
    service, form = service_of(request), await read_fields(request)
    name, version = request.path_params["name"], request.path_params["version"]
    model = await service.resolve_model(f"{name}@{version}")
    if not form.first("confirmed"):
        return page(request, "delete_version.html", model=model, back=_address(model))
    await delete_version(name, version, request, service, caller)
    return RedirectResponse("/models", 303)


def reference_of(request: Request) -> str:
    """Of the model in the path, with the version in the query if there is one."""
    name, version = request.path_params["name"], request.query_params.get("version")
    return f"{name}@{version}" if version else name


async def _versions(service: Service, tenant: str, name: str) -> list[ModelVersion]:
    """The newest first."""

    def read() -> list[ModelVersion]:
        with service.runtime.database.read() as connection:
            return registry.versions(connection, name)

    return await service.calls.read(tenant, read)


ROUTES = [
    Route("/models", list_page),
    Route("/models", register, methods=["POST"]),
    Route("/models/{name}", show),
    Route("/models/{name}/versions/{version:int}/delete", remove, methods=["POST"]),
]
