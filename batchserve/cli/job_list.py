"""`batchserve jobs list`."""

from enum import StrEnum
from itertools import islice
from typing import Annotated

import typer

from batchserve.cli.terminal import AsJson, moment, print_json, print_rows
from batchserve.client import Client
from batchserve.client.lists import JobFilters
from batchserve.domain import JobState


class Sort(StrEnum):
    CREATED = "created"
    FINISHED = "finished"


class Direction(StrEnum):
    DESC = "desc"
    ASC = "asc"


def list_jobs(
    state: Annotated[list[JobState] | None, typer.Option(help="Only jobs in this state; may be repeated.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Only jobs of this model.")] = None,
    search: Annotated[
        str | None, typer.Option("--search", "-s", metavar="TEXT", help="Only with this in id, file name or metadata.")
    ] = None,
    since: Annotated[str | None, typer.Option(metavar="TIME|AGE", help="Created since then, as in 7d.")] = None,
    until: Annotated[str | None, typer.Option(metavar="TIME|AGE", help="Created before that.")] = None,
    finished_since: Annotated[str | None, typer.Option(metavar="TIME|AGE", help="Finished since then.")] = None,
    finished_until: Annotated[str | None, typer.Option(metavar="TIME|AGE", help="Finished before that.")] = None,
    sort: Annotated[
        Sort | None, typer.Option(help="By which time; `finished`: only jobs that have. Default: `created`.")
    ] = None,
    order: Annotated[Direction, typer.Option(help="`desc`: the latest first.")] = Direction.DESC,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="Most jobs to list.")] = 30,
    count: Annotated[bool, typer.Option("--count", help="Print only the number of all matching jobs.")] = False,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first."""
    wanted: JobFilters = {
        "state": state, "model": model, "q": search, "since": since, "until": until,
        "finished_since": finished_since, "finished_until": finished_until,
    }  # fmt: skip
    with Client() as client:
        if count:
            print(client.jobs.count(**wanted))
            return
        jobs = list(islice(client.jobs.list(sort=sort, order=order, **wanted), limit))
    if as_json:
        print_json([job.data for job in jobs])
        return
    at = "finished" if sort is Sort.FINISHED or finished_since or finished_until else "created"
    print_rows(
        ("id", "state", "model", "rows", "failed", "progress", at),
        [
            (
                job.id,
                job.state,
                job.model,
                job.rows.get("total"),
                job.rows.get("failed"),
                f"{job.progress:.0%}",
                moment(job.data.get(f"{at}_at")),
            )
            for job in jobs
        ],
    )
