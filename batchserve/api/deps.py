"""Code shared by routes: dependencies, and common forms of requests and responses."""

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool

from batchserve.api.auth import caller_of, require_key_still
from batchserve.api.events import JobEvents
from batchserve.api.head import listed
from batchserve.api.parameters import require_documented
from batchserve.api.schemas.jobs import JobBody, job_body
from batchserve.domain import JobState
from batchserve.errors import BadRequest
from batchserve.idempotency import KeyedRequest
from batchserve.options import PredictOptions
from batchserve.service import MAX_WAIT, JobSnapshot, Service
from batchserve.service.calls import Leaving
from batchserve.service.following import Following

Options = TypeVar("Options", bound=BaseModel)
_WAIT_QUOTED = re.compile(r'"([0-9]+)"')
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


async def get_service(request: Request) -> Service:  # as a plain function it would take a thread, for each request
    """See `served`. Behind keys and the ID in a path, it comes to the query."""
    return served(request)


def served(request: Request) -> Service:
    """The service of this application, for routes under /v1. Raises RequestValidationError for parameters that the
    route does not document."""
    if request.scope["query_string"]:
        require_documented(request)
    return service_of(request)


def service_of(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


async def get_following(request: Request) -> Following[JobEvents]:
    following: Following[JobEvents] = request.app.state.following
    return following


async def own_job(job_id: str, request: Request) -> str:
    """The ID in the path. Raises JobNotFound for a job of another tenant: later code need not check the tenant
    again."""
    await service_of(request).require_visible(caller_of(request).tenant, job_id)
    return job_id


ServiceDep = Annotated[Service, Depends(get_service)]
FollowingDep = Annotated[Following[JobEvents], Depends(get_following)]
OwnJob = Annotated[str, Depends(own_job)]
_LONGEST_KEY = 257
"""Characters of a key in quotes."""
IdempotencyKey = Annotated[
    str | None,
    Header(
        description="Makes the request safe to repeat: same key and content, same job; kept 24 hours.",
        max_length=_LONGEST_KEY,
    ),
]
# The app adds the schema: a `model` here would be documented as application/json.
_PROBLEM = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"description": "The problem, the expected and the received value.", "content": _PROBLEM},
    "5XX": {"description": "Not ready: Retry-After says when to try again. Or a server bug.", "content": _PROBLEM},
}


def parsed(kind: type[Options], given: Mapping[str, Any]) -> Options:
    """Raises RequestValidationError, which names each unknown or invalid option."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def predict_options(service: Service, given: Mapping[str, Any]) -> PredictOptions:
    """Raises RequestValidationError, and InvalidOptions for a longer retention than the settings have."""
    options = parsed(PredictOptions, given)
    options.require_allowed(service.runtime.settings)
    return options


def has_long_key(request: Request) -> bool:
    """Whether the Idempotency-Key is longer than documented: FastAPI answers that, plain routes need not."""
    return len(request.headers.get("idempotency-key", "")) > _LONGEST_KEY


def leaving(request: Request) -> Leaving:
    """Waits until the client has left. What it still sends is discarded: also the end of a body that was not read."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return left


async def read_body(service: Service, job_id: str) -> JobBody:
    """A job as its clients see it. Raises JobNotFound."""
    return await body_of(service, await service.view(job_id))


async def body_of(service: Service, view: JobSnapshot) -> JobBody:
    place = view.place
    if _is_far_back(view):
        place = (await run_in_threadpool(service.places.of, [view.job], view.now))[view.job.id]
    return job_body(view.job, view.attempts, place, view.now)


def read_body_from_thread(service: Service, job_id: str) -> JobBody:
    """The same for callers in a thread."""
    view = service.view_from_thread(job_id)
    place = service.places.of([view.job], view.now)[job_id] if _is_far_back(view) else view.place
    return job_body(view.job, view.attempts, place, view.now)


def _is_far_back(view: JobSnapshot) -> bool:
    return view.job.state is JobState.QUEUED and view.place is None


async def wait_for(
    request: Request, service: Service, job_id: str, seconds: float, until: Callable[[JobState], bool]
) -> None:
    """Waits until the state is as wanted, for at most `seconds`. Raises JobNotFound, and Unauthorized when the key of
    the request is revoked meanwhile."""
    await service.wait_for(job_id, seconds, until, partial(require_key_still, request, request.app.state.keyring))


def finished(state: JobState) -> bool:
    return state.finished


def job_headers(body: JobBody) -> dict[str, str]:
    headers = {"location": body.links["self"]}
    if body.state in (JobState.QUEUED, JobState.RUNNING):
        headers["retry-after"] = str(max(1, min(30, round(body.eta_s or 1))))
    return headers


def job_response(body: JobBody, status: int, headers: dict[str, str] | None = None) -> Response:
    return Response(
        body.model_dump_json(), status, {**job_headers(body), **(headers or {})}, media_type="application/json"
    )


def preferred_wait(request: Request) -> float:
    """Seconds of `Prefer: wait=N` (RFC 7240); 0 without it."""
    given = listed(request.scope, b"prefer")
    if given is None:
        return 0.0
    for preference in _QUOTED.sub("", _WAIT_QUOTED.sub(r"\1", given)).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait" and (seconds := value.strip()).isascii() and seconds.isdigit():
            return min(float(seconds), MAX_WAIT)
    return 0.0


def bare_key(key: str | None) -> str | None:
    """The key without the quotes of a structured header. Raises BadRequest for one that is empty or too long."""
    if key is None:
        return None
    key = key.strip().removeprefix('"').removesuffix('"')
    if not 0 < len(key) <= 255:
        raise BadRequest(f"an Idempotency-Key has 1 to 255 characters, got {len(key)}")
    if not key.isprintable():
        raise BadRequest(f"an Idempotency-Key has printable characters only, got {key!r}")
    return key


async def replayed(service: Service, keyed: KeyedRequest) -> Response | None:
    """The response to an earlier request with this key. Raises IdempotencyMismatch when its content was different."""
    if keyed.key is None:
        return None
    remembered = await service.runtime.database.fetch_one(keyed.recall)
    if remembered is None:
        return None
    headers = {"idempotency-replayed": "true"}
    if remembered.job_id is None:
        return Response(remembered.answer, remembered.status, headers, media_type="application/json")
    return job_response(await read_body(service, remembered.job_id), remembered.status, headers)
