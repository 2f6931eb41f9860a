"""The list of jobs: found, followed, and changed several at a time."""

from collections.abc import AsyncIterator
from functools import partial
from urllib.parse import urlencode

import anyio
from fastapi import BackgroundTasks, Request, Response
from starlette.responses import RedirectResponse, StreamingResponse
from starlette.routing import Route

from batchserve.api.auth import caller_of, is_key_in_force
from batchserve.api.deps import service_of
from batchserve.api.jobs import cancel_job, delete_job, retry
from batchserve.api.schemas.jobs import JobBody, job_body
from batchserve.domain import JobState
from batchserve.errors import BadRequest, BatchserveError
from batchserve.idempotency import KeyedRequest
from batchserve.jobs import lists, queries
from batchserve.service import Service
from batchserve.service.listing import read_slice
from batchserve.web.forms import read_fields
from batchserve.web.pages import page
from batchserve.web.search import Search, parse

__all__ = ["ROUTES", "latest"]

_PAGE = 50
_ACTIONS = ("cancel", "retry", "delete")
_AGES = {"any time": None, "last hour": "1h", "last day": "1d", "last week": "7d"}
_PAUSE = 1.0
"""Seconds between two looks for commits, after which the shown rows are read again."""


async def list_page(request: Request) -> Response:
    """`q`: the search. `after`: the cursor of the page before."""
    service, tenant = service_of(request), caller_of(request).tenant
    text, after = request.query_params.get("q", ""), request.query_params.get("after")

    def read() -> tuple[Search, dict[str, int], list[JobBody], str | None]:
        with service.runtime.database.read() as connection:
            now = service.runtime.database.moment(connection).wall
            counts = queries.count_by_state(connection, tenant)
        search = parse(text, now)
        if search.problem is not None:
            return search, counts, [], None
        return search, counts, *_bodies(service, tenant, search, after)

    search, counts, bodies, cursor = await service.calls.read(tenant, read)
    following = None if cursor is None else urlencode({"q": text, "after": cursor})
    template = "_jobs.html" if request.headers.get("hx-target") == "jobs" else "jobs.html"
    return page(
        request, template, 422 if search.problem else 200, search=search, jobs=bodies, counts=counts, after=after,
        following=following, total=sum(counts.values()), states=list(JobState), ages=_AGES,
    )  # fmt: skip


async def latest(service: Service, tenant: str, most: int) -> list[JobBody]:
    """The newest jobs."""
    bodies, _ = await service.calls.read(tenant, lambda: _bodies(service, tenant, Search(""), None, most))
    return bodies


def _bodies(
    service: Service, tenant: str, search: Search, after: str | None, most: int = _PAGE
) -> tuple[list[JobBody], str | None]:
    """The jobs of a page, and its cursor unless it is the last one."""
    found, more = read_slice(service, tenant, search.wanted, after, most, search.order)
    bodies = [job_body(view.job, view.attempts, view.place, view.now) for view in found]
    return bodies, lists.cursor_of(found[-1].job, search.order) if more else None


async def change_selected(request: Request) -> Response:
    """Cancels, retries or deletes the selected jobs; those that cannot be are named, and the others are changed."""
    form = await read_fields(request)
    action, selected, text = form.first("action"), form.all("job"), form.first("q")
    back = f"/jobs?{urlencode({'q': text})}"
    if action not in _ACTIONS:
        raise BadRequest(f"action: expected {', '.join(_ACTIONS)}, got {action!r}")
    if action == "delete" and not form.first("confirmed"):
        return page(request, "confirm.html", jobs=selected, back=back, q=text)
    service, caller, background = service_of(request), caller_of(request), BackgroundTasks()
    background.add_task(service.wake)
    problems = []
    for job_id in selected:
        try:
            await service.require_visible(caller.tenant, job_id)
            if action == "cancel":
                await cancel_job(job_id, service, caller, background)
            elif action == "retry":
                await retry(service, caller, job_id, "unfinished", KeyedRequest(caller.tenant, None, ""))
            else:
                await delete_job(job_id, request, service, caller)
        except BatchserveError as error:
            problems.append((job_id, error.detail))
    if problems:
        return page(request, "not_changed.html", 409, action=action, problems=problems, back=back)
    return RedirectResponse(back, 303, background=background)


async def changes(request: Request) -> Response:
    """An event for each moment in which something was committed, upon which a page reads its rows again."""
    service, keyring = service_of(request), request.app.state.keyring
    allowed = partial(is_key_in_force, request, keyring)

    async def events() -> AsyncIterator[bytes]:
        before = await service.runtime.database.version()
        while not service.stopping.is_set() and await allowed():
            with anyio.move_on_after(_PAUSE):
                await service.stopping.wait()
            version = await service.runtime.database.version()
            if version is None or version != before:
                before = version
                yield b"event: change\ndata:\n\n"

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


ROUTES = [
    Route("/jobs", list_page),
    Route("/jobs", change_selected, methods=["POST"]),
    Route("/jobs/changes", changes),
]
