"""A job: its state, live, what may be done with it, and its files."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any, get_args

import orjson
from fastapi import BackgroundTasks, Request, Response
from starlette.responses import RedirectResponse, StreamingResponse
from starlette.routing import Route

from batchserve.api import download
from batchserve.api.auth import caller_of, is_key_in_force
from batchserve.api.deps import body_of, own_job, service_of
from batchserve.api.files import attachment, named_after
from batchserve.api.jobs import RetriedRows, cancel_job, delete_job, retry
from batchserve.api.schemas.jobs import JobBody
from batchserve.domain import Job, JobState
from batchserve.errors import BadRequest
from batchserve.formats import RESULT_FORMATS, get_format
from batchserve.idempotency import KeyedRequest
from batchserve.web import failed, records, summary
from batchserve.web.fit import fit_of
from batchserve.web.forms import read_fields
from batchserve.web.manifest import manifest_of
from batchserve.web.pages import page
from batchserve.web.recipes import recipe_of
from batchserve.web.tokens import COOKIE

__all__ = ["ROUTES"]

_INPUTS_SHOWN = 100
"""Most inputs of which the manifest on the page names all; its file always does."""
_FOLLOWED = (JobState.QUEUED, JobState.RUNNING)


async def show(request: Request) -> Response:
    """`record`: the first one of those that are shown."""
    job, body = await _read(request)
    if 1 < job.inputs_total <= _INPUTS_SHOWN:
        job = await records.whole(service_of(request), job.id)
    fit = await fit_of(request, job.id) if job.state is JobState.UPLOADED else None
    recipe = recipe_of(job, str(request.base_url).rstrip("/"), needs_key=COOKIE in request.cookies)
    return page(
        request, "job.html", job=body, fit=fit, formats=_formats(job), record=records.wanted(request),
        recipe=recipe, manifest=_pretty(manifest_of(job, body)).decode(), has_input=job.has_input,
        is_live=body.state in _FOLLOWED,
    )  # fmt: skip


async def status(request: Request) -> Response:
    """The part of the page that changes while the job runs."""
    _, body = await _read(request)
    return page(request, "_job_status.html", job=body, is_live=body.state in _FOLLOWED)


async def live(request: Request) -> Response:
    """`progress` when the job has changed, `state` once it is in another state than the page shows it (`state`)."""
    job_id = await own_job(request.path_params["job_id"], request)
    await service_of(request).read_job(job_id)
    shown = request.query_params.get("state")
    allowed = partial(is_key_in_force, request, request.app.state.keyring)

    async def events() -> AsyncIterator[bytes]:
        async with aclosing(request.app.state.following.follow(job_id, allowed)) as changes:
            async for change in changes:
                yield b"event: %b\ndata:\n\n" % (b"progress" if change.state == shown else b"state")
                if change.state != shown:
                    return

    return StreamingResponse(events(), media_type="text/event-stream", headers={"cache-control": "no-store"})


# --- what changes it -------------------------------------------------------------------------------------------------


async def cancel(request: Request) -> Response:
    job_id, background = await own_job(request.path_params["job_id"], request), BackgroundTasks()
    await cancel_job(job_id, service_of(request), caller_of(request), background)
    return RedirectResponse(f"/jobs/{job_id}", 303, background=background)


async def retry_rows(request: Request) -> Response:
    """`rows`: unfinished, those of this job; failed, those of a new one, which is shown."""
    job_id, service = await own_job(request.path_params["job_id"], request), service_of(request)
    caller = caller_of(request)
    wanted = (await read_fields(request)).first("rows")
    rows = next((rows for rows in get_args(RetriedRows) if rows == wanted), None)
    if rows is None:
        raise BadRequest(f"rows: expected {' or '.join(get_args(RetriedRows))}, got {wanted[:50]!r}")
    background = BackgroundTasks()
    background.add_task(service.wake)
    body = await retry(service, caller, job_id, rows, KeyedRequest(caller.tenant, None, ""))
    return RedirectResponse(f"/jobs/{body.id}", 303, background=background)


async def delete(request: Request) -> Response:
    """Asks before it deletes."""
    if request.method != "POST":
        _, body = await _read(request)
        return page(request, "job_delete.html", job=body)
    job_id = await own_job(request.path_params["job_id"], request)
    await delete_job(job_id, request, service_of(request), caller_of(request))
    return RedirectResponse("/jobs", 303)


# --- files -----------------------------------------------------------------------------------------------------------


async def result(request: Request) -> Response:
    """`format`: another one than the job's. `partial`: the finished rows."""
    job_id, query = await own_job(request.path_params["job_id"], request), request.query_params
    return await download.download(
        job_id, request, service_of(request), format=query.get("format") or None, partial=query.get("partial") == "true"
    )


async def errors_table(request: Request) -> Response:
    job_id = await own_job(request.path_params["job_id"], request)
    return await download.download_errors(job_id, request, service_of(request), partial=True, accept="text/csv")


async def errors_lines(request: Request) -> Response:
    job_id = await own_job(request.path_params["job_id"], request)
    return await download.download_errors(job_id, request, service_of(request), partial=True)


async def input_file(request: Request) -> Response:
    job_id = await own_job(request.path_params["job_id"], request)
    return await download.download_input(job_id, request, service_of(request))


async def manifest(request: Request) -> Response:
    job, body = await _read(request)
    job = await records.whole(service_of(request), job.id)
    headers = {"content-disposition": attachment(named_after(job, "manifest", ".json")), "cache-control": "no-store"}
    return Response(_pretty(manifest_of(job, body)), headers=headers, media_type="application/json")


async def _read(request: Request) -> tuple[Job, JobBody]:
    service = service_of(request)
    view = await service.view(await own_job(request.path_params["job_id"], request))
    return view.job, await body_of(service, view)


def _pretty(content: dict[str, Any]) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_INDENT_2)


def _formats(job: Job) -> list[str]:
    """The formats in which the result can be downloaded, the job's own first."""
    if job.state is not JobState.COMPLETED or job.options is None:
        return []
    own = get_format(job.options.format)
    tables = [name for name, format in RESULT_FORMATS.items() if format.holds == "table" and name != own.name]
    return [own.name, *(tables if own.holds == "table" and job.model is not None else [])]


_ROUTES: list[tuple[str, Any]] = [
    ("", show),
    ("/status", status),
    ("/live", live),
    ("/result", result),
    ("/errors.csv", errors_table),
    ("/errors.jsonl", errors_lines),
    ("/input", input_file),
    ("/manifest.json", manifest),
    ("/records", records.show),
    ("/image/{record}", records.show_image),
    ("/failed", failed.show),
    ("/plots", summary.show),
]
ROUTES = [
    *(Route(f"/jobs/{{job_id}}{path}", handler) for path, handler in _ROUTES),
    Route("/jobs/{job_id}/cancel", cancel, methods=["POST"]),
    Route("/jobs/{job_id}/retry", retry_rows, methods=["POST"]),
    Route("/jobs/{job_id}/delete", delete, methods=["GET", "POST"]),
]
