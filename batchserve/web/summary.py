"""The plots of a job: what its result says, and how fast it was made."""

from fastapi import Request, Response
from markupsafe import Markup
from starlette.concurrency import run_in_threadpool

from batchserve.api.auth import caller_of
from batchserve.api.deps import leaving, own_job, service_of
from batchserve.domain import CommittedChunk, Job
from batchserve.errors import BatchserveError
from batchserve.formats import get_format
from batchserve.jobs import plan
from batchserve.scoring.summary import Classes, Histogram, Summary, SummaryTask, summarize
from batchserve.service import Service
from batchserve.service.turns import Lane
from batchserve.web import plots, records

__all__ = ["show"]

_MOST = 100_000
"""Records that are read."""
_POINTS = 60
Plot = tuple[str, Markup, str]
"""The title, the drawing, and a sentence below it."""


async def show(request: Request) -> Response:
    job_id, service = await own_job(request.path_params["job_id"], request), service_of(request)
    job = await service.read_job(job_id)
    summary, problem = Summary(), None
    try:
        summary = await _summary(request, service, job)
    except (BatchserveError, FileNotFoundError) as error:
        problem = error.detail if isinstance(error, BatchserveError) else "The result was removed."
    done = await service.calls.read(caller_of(request).tenant, lambda: _done(service, job))
    drawn = [_of_classes(found, _unmarked(job)) for found in summary.classes]
    drawn += map(_of_numbers, summary.probabilities + summary.numbers)
    speeds = _speeds(done)
    if len(speeds) > 1:
        below = "Rows per second of time in the model, without reading and writing, over the records of the input."
        drawn.append(("Speed of the model", plots.line("Rows per second", speeds, "rows/s"), below))
    return records.part(request, "plots", job, summary=summary, plots=drawn, problem=problem)


async def _summary(request: Request, service: Service, job: Job) -> Summary:
    result = await run_in_threadpool(records.result_of, service, job)
    if result is None or job.model is None or job.options is None or not job.rows_done:
        return Summary()
    task = SummaryTask(result, job.model, job.options.top_k, _MOST)
    settings = service.runtime.settings
    with service.calls.place(caller_of(request).tenant, Lane.LONG) as place:
        async with service.calls.long_turn(place, settings.online_wait):
            seconds = settings.online_timeout
            return await service.calls.run(place, summarize, task, seconds=seconds, leaving=leaving(request))


def _unmarked(job: Job) -> str:
    """What is to be said of failed records that look like others in the result."""
    is_of_arrays = job.options is not None and get_format(job.options.format).holds != "table"
    if not is_of_arrays or not job.rows_failed:
        return ""
    return f"Failed records, {job.rows_failed:,} in the job, count as 0 or empty: arrays have no missing labels."


def _of_classes(found: Classes, unmarked: str) -> Plot:
    counts, (others, rest) = list(found.counts), found.rest
    if others:
        counts.append((f"{others:,} others", rest))
    total = sum(count for _, count in counts)
    below = [f"{found.others:,} records have no class."] if found.others else []
    return f"Classes: {found.name}", plots.bars(found.name, counts, total), " ".join([*below, unmarked]).strip()


def _of_numbers(found: Histogram) -> Plot:
    drawn = plots.histogram(found.name, found.counts, found.low, found.high)
    below = [f"Mean {found.mean:.4g}."] if sum(found.counts) else []
    below += [f"{found.others:,} records have no finite number."] if found.others else []
    return f"Distribution: {found.name}", drawn, " ".join(below)


def _done(service: Service, job: Job) -> list[CommittedChunk]:
    with service.runtime.database.read() as connection:
        return plan.done_chunks(connection, job.id)


def _speeds(done: list[CommittedChunk]) -> list[tuple[float, float]]:
    """The middle record and the rows per second of several chunks at a time."""
    timed = [(each.chunk, each.facts.get("model_seconds")) for each in done]
    known = [(chunk, float(seconds)) for chunk, seconds in timed if isinstance(seconds, float) and seconds > 0]
    step = max(1, -(-len(known) // _POINTS))
    points = []
    for start in range(0, len(known), step):
        some = known[start : start + step]
        rows, seconds = sum(chunk.records for chunk, _ in some), sum(seconds for _, seconds in some)
        points.append((some[0][0].first_record + rows / 2, rows / seconds))
    return points
