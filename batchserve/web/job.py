"""A job: its state, live, and what may be done with it."""

from fastapi import BackgroundTasks, Request, Response
from starlette.responses import RedirectResponse
from starlette.routing import Route

from batchserve.api.auth import caller_of
from batchserve.api.deps import own_job, read_body, service_of
from batchserve.api.jobs import cancel_job
from batchserve.domain import JobState
from batchserve.web.fit import fit_of
from batchserve.web.pages import page

__all__ = ["ROUTES"]


async def show(request: Request) -> Response:
    job_id = await own_job(request.path_params["job_id"], request)
    body = await read_body(service_of(request), job_id)
    fit = await fit_of(request, job_id) if body.state is JobState.UPLOADED else None
    return page(request, "job.html", job=body, fit=fit)


async def cancel(request: Request) -> Response:
    job_id, background = await own_job(request.path_params["job_id"], request), BackgroundTasks()
    await cancel_job(job_id, service_of(request), caller_of(request), background)
    return RedirectResponse(f"/jobs/{job_id}", 303, background=background)


ROUTES = [Route("/jobs/{job_id}", show), Route("/jobs/{job_id}/cancel", cancel, methods=["POST"])]
