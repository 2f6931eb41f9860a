"""GET /v1/jobs: the list of jobs."""

import re
from dataclasses import dataclass, replace
from typing import Annotated

import orjson
from fastapi import APIRouter, Depends, Query, Response
from pydantic import BeforeValidator

from batchserve.api.auth import CallerDep
from batchserve.api.deps import PROBLEMS, ServiceDep
from batchserve.api.schemas.filters import Direction, comma_separated, moment_query, moments
from batchserve.api.schemas.jobs import JobList, job_body
from batchserve.domain import JobState
from batchserve.errors import InvalidOptions
from batchserve.jobs import lists
from batchserve.jobs.lists import JobFilter, JobOrder, SortKey
from batchserve.service import Service
from batchserve.service.listing import read_slice
from batchserve.values import MAX_REFERENCE, Plain

router = APIRouter(tags=["jobs"])

SLICE = 50
PAGE_BYTES = 4 * 2**20
_REFERENCE = re.compile(r"[^@]+(@[0-9]{1,9})?")

States = Annotated[
    list[JobState] | None,
    BeforeValidator(comma_separated),
    Query(description="Any of these, repeated or with commas.", examples=[["failed", "cancelled"]]),
]
Model = Annotated[
    Annotated[str, Plain] | None,
    Query(description="`name` or `name@version`.", examples=["iris"], max_length=MAX_REFERENCE),
]
Words = Annotated[
    Annotated[str, Plain] | None,
    Query(description="Part of an ID, a file name or a metadata value.", max_length=1024),
]


@dataclass(frozen=True, slots=True)
class ListRequest:
    """Which jobs a request asks for."""

    wanted: JobFilter
    order: JobOrder
    times: dict[str, str]
    """Those of the filter, as the request says them: an age counts back from the moment of the list."""

    def at(self, now: float) -> JobFilter:
        """The filter at this moment. Raises InvalidOptions."""
        return replace(self.wanted, **moments(self.times, now))


async def list_request(
    state: States = None,
    model: Model = None,
    q: Words = None,
    since: Annotated[str | None, moment_query("Created at this time or later.")] = None,
    until: Annotated[str | None, moment_query("Created before this time.")] = None,
    finished_since: Annotated[str | None, moment_query("Finished at this time or later; sorts by `finished`.")] = None,
    finished_until: Annotated[str | None, moment_query("Finished before this time; sorts by `finished`.")] = None,
    sort: Annotated[
        SortKey | None, Query(description="Default: `created`. `finished`: only jobs that have finished.")
    ] = None,
    order: Annotated[Direction, Query(description="`desc`: the latest first.")] = Direction.DESC,
) -> ListRequest:
    """Raises InvalidOptions for what no list has."""
    if model is not None and not _REFERENCE.fullmatch(model):
        raise InvalidOptions(f"model: expected name or name@version with a number, got {model!r}")
    given = {"since": since, "until": until, "finished_since": finished_since, "finished_until": finished_until}
    times = {name: text for name, text in given.items() if text is not None}
    finished = next((name for name in times if name.startswith("finished")), None)
    if finished is not None and sort is SortKey.CREATED:
        raise InvalidOptions(f"sort: expected finished with {finished}, got created")
    by = sort or (SortKey.CREATED if finished is None else SortKey.FINISHED)
    return ListRequest(JobFilter(tuple(state or ()), model, q), JobOrder(by, order is Direction.ASC), times)


@router.head("/v1/jobs", include_in_schema=False)
@router.get(
    "/v1/jobs", response_model=JobList, responses=PROBLEMS, operation_id="list_jobs", summary="List jobs, newest first"
)  # fmt: skip
async def list_jobs(
    service: ServiceDep,
    caller: CallerDep,
    asked: Annotated[ListRequest, Depends(list_request)],
    total: Annotated[bool, Query(description="Whether to count the jobs of all pages.")] = False,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: Annotated[
        Annotated[str, Plain] | None, Query(description="`next` of the page before.", max_length=80)
    ] = None,
) -> Response:
    """A page ends early, with `next`, where its jobs would take more than 4 MiB. `next` remains valid while jobs are
    created and deleted: no page repeats or omits a job for that."""
    page = await service.calls.read(
        caller.tenant, lambda: _page(service, caller.tenant, asked, after=after, limit=limit, total=total)
    )
    return Response(page, media_type="application/json")


def _page(service: Service, tenant: str, asked: ListRequest, *, after: str | None, limit: int, total: bool) -> bytes:
    """A JobList. In several reads, so that none fetches much more than the page holds."""
    database, counted = service.runtime.database, None
    with database.read() as connection:
        wanted = asked.at(database.moment(connection).wall)
        if total:
            counted = lists.count(connection, tenant, wanted, asked.order)
    page: list[bytes] = []
    size, more = 0, True
    while more and len(page) < limit:
        found, more = read_slice(service, tenant, wanted, after, min(SLICE, limit - len(page)), asked.order)
        for view in found:
            body = job_body(view.job, view.attempts, view.place, view.now).model_dump_json().encode()
            size += len(body)
            if page and size > PAGE_BYTES:
                return _encoded(page, after, counted)
            page.append(body)
            after = lists.cursor_of(view.job, asked.order)
    return _encoded(page, after if more else None, counted)


def _encoded(bodies: list[bytes], following: str | None, total: int | None) -> bytes:
    return b'{"jobs":[%b],"next":%b,"total":%b}' % (b",".join(bodies), orjson.dumps(following), orjson.dumps(total))
