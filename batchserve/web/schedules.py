"""The schedules: a list, and each with its next times, its request and its history."""

import orjson
from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve.api.auth import caller_of
from batchserve.api.deps import service_of
from batchserve.api.schedules import (
    delete_schedule,
    pause,
    read_schedule,
    read_schedules,
    read_ticks,
    resume,
    run,
    scheduler_of,
)
from batchserve.api.schemas.schedules import ScheduleBody, TickList
from batchserve.errors import BadRequest, InvalidOptions
from batchserve.web.forms import read_fields
from batchserve.web.pages import page

__all__ = ["ROUTES"]

_PAGE = 50
_ACTIONS = ("pause", "resume", "run", "delete")


async def list_page(request: Request) -> Response:
    """`after`: the last schedule of the page before."""
    service, tenant = service_of(request), caller_of(request).tenant
    after = request.query_params.get("after")
    if after is not None and (len(after) > 64 or "\0" in after):
        raise InvalidOptions(f"after: expected the ID of a schedule, got {after[:100]!r}")
    found = await service.calls.read(tenant, lambda: read_schedules(service, tenant, after, _PAGE))
    return page(request, "schedules.html", schedules=found.schedules, following=found.next)


async def show(request: Request) -> Response:
    """`after`: the last tick of the page before."""
    service, tenant, reference = service_of(request), caller_of(request).tenant, request.path_params["reference"]
    text = request.query_params.get("after", "")
    if text and not (text.isdecimal() and len(text) < 10):
        raise InvalidOptions(f"after: expected the number of a tick, got {text[:100]!r}")

    def read() -> tuple[ScheduleBody, TickList]:
        after = int(text) if text else None
        return read_schedule(service, tenant, reference), read_ticks(service, tenant, reference, None, after, _PAGE)

    schedule, history = await service.calls.read(tenant, read)
    template = "_schedule.html" if request.headers.get("hx-target") == "schedule" else "schedule.html"
    return page(
        request, template, schedule=schedule, ticks=history.ticks, following=history.next, after=text,
        asked=orjson.dumps(schedule.request, option=orjson.OPT_INDENT_2).decode(),
    )  # fmt: skip


async def change(request: Request) -> Response:
    """Pauses, resumes, runs or deletes a schedule; a deletion once it was confirmed."""
    service, caller, reference = service_of(request), caller_of(request), request.path_params["reference"]
    form = await read_fields(request)
    action, scheduler = form.first("action"), scheduler_of(request)
    if action not in _ACTIONS:
        raise BadRequest(f"action: expected {', '.join(_ACTIONS)}, got {action[:100]!r}")
    if action == "delete":
        if not form.first("confirmed"):
            found = await run_in_threadpool(read_schedule, service, caller.tenant, reference)
            return page(request, "schedule_delete.html", schedule=found)
        await delete_schedule(reference, service, caller)
        return RedirectResponse("/schedules", 303)
    if action == "pause":
        found = await run_in_threadpool(pause, service, scheduler, caller, reference)
    elif action == "resume":
        found = await run_in_threadpool(resume, service, scheduler, caller, reference)
    else:
        found = await run_in_threadpool(read_schedule, service, caller.tenant, reference)
        await run_in_threadpool(run, service, scheduler, caller, found.id)
    return RedirectResponse(f"/schedules/{found.id}", 303)


ROUTES = [
    Route("/schedules", list_page),
    Route("/schedules/{reference}", show),
    Route("/schedules/{reference}", change, methods=["POST"]),
]
