"""The records of a job, its input and its result side by side, and their images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from fastapi import Request, Response
from sqlalchemy import Connection
from starlette.concurrency import run_in_threadpool

from batchserve.api.auth import caller_of
from batchserve.api.deps import leaving, own_job, service_of
from batchserve.domain import Chunk, Job, JobState, StoredInput
from batchserve.errors import BadRequest, BatchserveError, Gone
from batchserve.jobs import contents, plan, queries, requests
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import moved
from batchserve.scoring.preview import Preview, PreviewTask, preview, thumbnail
from batchserve.service import Service
from batchserve.service.turns import Lane
from batchserve.storage import is_elsewhere
from batchserve.web.pages import page

__all__ = ["PAGE", "Place", "input_of", "part", "place_of", "result_of", "run", "show", "show_image", "wanted", "whole"]

T = TypeVar("T")
PAGE = 20
_FARTHEST = 2**53
_HEADINGS = {"records": "Records", "failed": "Failed records", "plots": "Plots"}
_IMAGE = {"cache-control": "private, max-age=3600", "referrer-policy": "same-origin"}


@dataclass(frozen=True, slots=True)
class Records:
    """Records of a job from `first` on, their inputs beside their results."""

    first: int
    input: Preview | None
    result: Preview | None
    following: int | None
    """The first record of the next page."""

    @property
    def rows(self) -> list[tuple[int, tuple[str | None, ...], tuple[str | None, ...]]]:
        there = [known.rows for known in (self.input, self.result) if known is not None]
        count = min(map(len, there), default=0)
        given, answers = (known.rows[:count] if known else ((),) * count for known in (self.input, self.result))
        return [(self.first + index, *pair) for index, pair in enumerate(zip(given, answers, strict=True))]


async def show(request: Request) -> Response:
    """A page of them."""
    job_id, service, first = await own_job(request.path_params["job_id"], request), service_of(request), wanted(request)
    job = await whole(service, job_id)
    found, problem = None, None
    try:
        found = await _read(request, service, job, first)
    except BatchserveError as error:
        problem = error.detail
    answer = part(request, "records", job, records=found, problem=problem, first=first, size=PAGE)
    answer.headers["hx-replace-url"] = f"/jobs/{job_id}?record={first}" if first else f"/jobs/{job_id}"
    return answer


async def show_image(request: Request) -> Response:
    """The image of a record, small."""
    job_id, service = await own_job(request.path_params["job_id"], request), service_of(request)
    job = await whole(service, job_id)
    task = await run_in_threadpool(_input_task, service, job, _record(request.path_params["record"]), 1)
    return Response(await run(request, service, thumbnail, task), headers=_IMAGE, media_type="image/jpeg")


def wanted(request: Request) -> int:
    """The record that the query names. Raises BadRequest."""
    return _record(request.query_params.get("record") or "0")


def _record(text: str) -> int:
    if not (text.isdecimal() and text.isascii()) or int(text[:20]) > _FARTHEST:
        raise BadRequest(f"record: expected a number from 0 on, got {text[:50]!r}")
    return int(text[:20])


def part(request: Request, name: str, job: Job, **values: Any) -> Response:
    """A part of the page of a job: alone for a script, within a page of its own for a browser."""
    template = f"_job_{name}.html"
    is_alone = request.headers.get("hx-request") == "true"
    values |= {"job": job, "part": template, "target": name, "heading": _HEADINGS[name]}
    return page(request, template if is_alone else "job_part.html", **values)


async def run(request: Request, service: Service, function: Callable[..., T], *args: Any) -> T:
    """Calls a function in an interactive scoring process. Raises what it raises, and Gone for bytes that are gone."""
    seconds = service.runtime.settings.online_timeout
    try:
        with service.calls.place(caller_of(request).tenant, Lane.ONLINE) as place:
            return await service.calls.run(place, function, *args, seconds=seconds, leaving=leaving(request))
    except FileNotFoundError:
        raise Gone("the bytes were removed") from None


async def whole(service: Service, job_id: str) -> Job:
    """A job with all its inputs. Raises JobNotFound."""
    return await service.runtime.database.fetch(lambda connection: queries.get_whole(connection, job_id))


# --- where the bytes are ---------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where a record of a job is."""

    number: int
    """Of its input, or of the first of those that share its chunk."""
    record: int
    """Counted from the beginning of that one."""
    after: Chunk | None
    """A chunk of it that ends there or before: so far into a long input, it is not read from its beginning."""
    together: int
    """Inputs that share the chunk."""


def place_of(connection: Connection, job: Job, record: int) -> Place:
    holding = plan.chunk_before(connection, job.id, record + 1)
    if holding is None:
        return Place(0, record, None, 1)
    base = plan.first_records(connection, job.id)[holding.input] if job.inputs_total > 1 else 0
    before = plan.chunk_before(connection, job.id, holding.first_record)
    is_same = before is not None and before.input == holding.input
    after = moved(before, -base, 0) if before is not None and is_same else None
    return Place(holding.input, record - base, after, holding.inputs)


def input_of(connection: Connection, service: Service, stored: StoredInput) -> Input:
    return Input.of(service.runtime.settings.storage, contents.with_content(connection, stored))


def result_of(service: Service, job: Job) -> Input | None:
    """The result of a completed job. Raises Gone."""
    if job.state is not JobState.COMPLETED or job.result is None or job.options is None:
        return None
    if is_elsewhere(job.result.key) or job.options.archive:
        return None
    stored = StoredInput(job.result.key, job.options.format, job.dialect)
    with service.runtime.database.read() as connection:
        return input_of(connection, service, stored)


def _input_task(service: Service, job: Job, first: int, count: int) -> PreviewTask:
    requests.require_read(job)
    if not job.has_input:
        raise Gone(f"the input of job {job.id} was removed at the end of its retention")
    with service.runtime.database.read() as connection:
        place = place_of(connection, job, first)
        sharing = job.inputs[place.number : place.number + place.together]
        source, *further = (input_of(connection, service, stored) for stored in sharing)
    return PreviewTask(source, place.record, count, place.after, job.model, job.options, further=tuple(further))


async def _read(request: Request, service: Service, job: Job, first: int) -> Records:
    given, answers = None, None
    if job.has_input:
        task = await run_in_threadpool(_input_task, service, job, first, PAGE)
        given = await run(request, service, preview, task)
    if (result := await run_in_threadpool(result_of, service, job)) is not None:
        task = PreviewTask(result, first, PAGE, None, job.model, job.options, is_result=given is not None)
        answers = await run(request, service, preview, task)
    found = Records(first, given, answers, None)
    end = first + len(found.rows)
    is_last = end >= job.rows_planned if job.planned else len(found.rows) < PAGE
    return found if is_last or not found.rows else Records(first, given, answers, end)
