"""The system: health, queue, workers and what they do, space, settings and keys."""

from dataclasses import dataclass

from fastapi import Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve import audit, keys
from batchserve.access import EVERY_TENANT, ApiKey, AuditEntry, Caller, Scope
from batchserve.api.auth import caller_of, require_admin
from batchserve.api.deps import service_of
from batchserve.api.schemas.jobs import JobBody, job_body
from batchserve.domain import JobState
from batchserve.errors import Forbidden, InvalidOptions
from batchserve.jobs import queries
from batchserve.jobs.lists import JobFilter
from batchserve.service import Service
from batchserve.service.health import health_of
from batchserve.service.listing import read_slice
from batchserve.storage import free_bytes
from batchserve.web.forms import read_fields
from batchserve.web.pages import page

__all__ = ["ROUTES"]

_MOST_RUNNING = 200
_ENTRIES = 100
_RUNNING = JobFilter(states=(JobState.RUNNING,))


@dataclass(frozen=True, slots=True)
class _Facts:
    health: dict[str, str]
    counts: dict[str, int]
    waits: dict[str, float]
    """Seconds since the job that waits longest could have started, by tenant."""
    running: list[JobBody]
    free: int | None
    unreadable: int


async def show(request: Request) -> Response:
    service, caller = service_of(request), caller_of(request)
    facts = await service.calls.read(caller.tenant, lambda: _facts(service, caller))
    is_admin = caller.scope is Scope.ADMIN
    settings = service.runtime.settings.in_force() if is_admin else []
    template = "_system.html" if request.headers.get("hx-target") == "system" else "system.html"
    return page(request, template, facts=facts, settings=settings, is_admin=is_admin)


def _facts(service: Service, caller: Caller) -> _Facts:
    health = health_of(service)
    database = service.runtime.database
    with database.read() as connection:
        counts = queries.count_by_state(connection, caller.tenant)
        waits = queries.longest_waits(connection, database.moment(connection).wall)
    if caller.tenant != EVERY_TENANT:
        waits = {tenant: wait for tenant, wait in waits.items() if tenant == caller.tenant}
    found, _ = read_slice(service, caller.tenant, _RUNNING, None, _MOST_RUNNING)
    running = [job_body(view.job, view.attempts, view.place, view.now) for view in found]
    return _Facts(health, counts, waits, running, free_bytes(service.runtime.storage), service.unreadable.count())


# --- keys ------------------------------------------------------------------------------------------------------------


async def show_keys(request: Request) -> Response:
    await require_admin(caller_of(request))
    return await _keys_page(request)


async def create_key(request: Request) -> Response:
    """The only page on which the text of the key is shown."""
    caller = caller_of(request)
    await require_admin(caller)
    fields, database = await read_fields(request), service_of(request).runtime.database
    if (scope := fields.first("scope")) not in list(Scope):
        raise InvalidOptions(f"scope: expected {', '.join(Scope)}, got {scope[:100]!r}")
    tenant = fields.first("tenant").strip() or caller.tenant
    _require_administration(caller, tenant)

    def create(connection: Connection) -> tuple[ApiKey, str]:
        now = database.moment(connection).wall
        return keys.create(connection, fields.first("name").strip(), Scope(scope), tenant, now, caller)

    key, text = await database.commit(create)
    return await _keys_page(request, created=key, text=text)


async def revoke_key(request: Request) -> Response:
    caller, database = caller_of(request), service_of(request).runtime.database
    await require_admin(caller)
    reference = str(request.path_params["key_id"])

    def revoke(connection: Connection) -> None:
        key = keys.revoke(connection, reference, database.moment(connection).wall, caller)
        if not caller.administers(key.tenant):  # nothing is committed, and it is as unknown as one that does not exist
            raise keys.no_key(reference)

    await run_in_threadpool(database.write_freeing, revoke)
    return RedirectResponse("/keys", 303)


def _require_administration(caller: Caller, tenant: str) -> None:
    """Raises Forbidden."""
    if not caller.administers(tenant):
        raise Forbidden(f"the keys of the tenant {tenant[:100]!r} need an admin key of it, or of all tenants")


async def _keys_page(request: Request, created: ApiKey | None = None, text: str = "") -> Response:
    caller = caller_of(request)
    found = await service_of(request).runtime.database.fetch(keys.list_all)
    shown = [key for key in found if caller.administers(key.tenant)]
    return page(request, "keys.html", keys=shown, created=created, text=text, scopes=list(Scope), is_first=not found)


# --- the audit log ---------------------------------------------------------------------------------------------------


async def show_audit(request: Request) -> Response:
    """`after`: the last entry of the page before."""
    service, caller = service_of(request), caller_of(request)
    await require_admin(caller)
    text = request.query_params.get("after", "")
    if text and not (text.isdecimal() and len(text) < 10):
        raise InvalidOptions(f"after: expected the number of an entry, got {text[:100]!r}")

    def read() -> list[AuditEntry]:
        with service.runtime.database.read() as connection:
            return audit.list_page(connection, caller.tenant, after=int(text) if text else None, limit=_ENTRIES + 1)

    found = await service.calls.read(caller.tenant, read)
    entries = found[:_ENTRIES]
    following = entries[-1].id if len(found) > _ENTRIES else None
    return page(request, "audit.html", entries=entries, following=following)


ROUTES = [
    Route("/system", show),
    Route("/system/audit", show_audit),
    Route("/keys", show_keys),
    Route("/keys", create_key, methods=["POST"]),
    Route("/keys/{key_id:int}/revoke", revoke_key, methods=["POST"]),
]
