"""The records of a job that could not be scored, grouped by reason."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson
from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from batchserve.api.auth import caller_of
from batchserve.api.deps import own_job, service_of
from batchserve.api.download import stored_errors
from batchserve.api.files import blocks_of
from batchserve.domain import INPUT_FILE, Job
from batchserve.errors import BatchserveError
from batchserve.formats import get_format
from batchserve.jobs import contents
from batchserve.scoring.inputs import Input
from batchserve.scoring.preview import Cell, cells
from batchserve.service import Service
from batchserve.storage import Span
from batchserve.web import records

__all__ = ["show"]

_MOST = 100_000
"""Entries of the list that are read."""
_GROUPS = 20
_FIRST = 3
"""Records shown of each group."""
_FILE = "file"
"""The column with the names of images in an archive."""


@dataclass(slots=True)
class Failure:
    """A failed record; `value`: what its input has in the column."""

    record: int
    key: str | None
    message: str
    value: str | None = None
    input: str | None = None
    """The address of its input, of a job that has several."""
    place: int = 0
    """The record's number in that input."""


@dataclass(slots=True)
class Group:
    """The records that failed for one reason."""

    code: str
    column: str | None
    count: int = 0
    first: list[Failure] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Failed:
    groups: list[Group]
    """The largest first."""
    read: int
    has_more: bool
    """Whether the list has entries that were not read."""


async def show(request: Request) -> Response:
    job_id, service = await own_job(request.path_params["job_id"], request), service_of(request)
    job = await records.whole(service, job_id)
    found, problem = Failed([], 0, False), None
    try:
        found = await service.calls.read(caller_of(request).tenant, functools.partial(_read, service, job))
        await _add_values(request, service, job, found.groups[:_GROUPS])
    except FileNotFoundError:
        problem = "The list of failed records was removed."
    except BatchserveError as error:
        problem = error.detail
    shown, has_values = found.groups[:_GROUPS], _has_values(job)
    return records.part(request, "failed", job, failed=found, shown=shown, has_values=has_values, problem=problem)


def _has_values(job: Job) -> bool:
    """Whether its input is there, and has columns."""
    return job.has_input and get_format(job.input.format).holds == "table"


def _read(service: Service, job: Job) -> Failed:
    groups: dict[tuple[str, str | None], Group] = {}
    lines = _lines(service, job)
    read = 0
    for line in islice(lines, _MOST):
        entry, read = orjson.loads(line), read + 1
        code, column = str(entry.get("code")), entry.get("column")
        group = groups.setdefault((code, column), Group(code, column))
        group.count += 1
        if len(group.first) < _FIRST:
            failure = Failure(entry["record"], _text(entry.get("key")), str(entry.get("message")))
            failure.input, failure.place = entry.get(INPUT_FILE), entry.get("input_record", 0)
            group.first.append(failure)
    has_more = next(lines, None) is not None
    return Failed(sorted(groups.values(), key=lambda group: -group.count), read, has_more)


def _lines(service: Service, job: Job) -> Iterator[bytes]:
    runtime = service.runtime
    opened = functools.partial(contents.opened, runtime.database, runtime.storage)
    rest = b""
    for block in blocks_of(opened, (Span(part.key, 0, part.bytes) for part in stored_errors(service, job))):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines


def _text(key: Any) -> str | None:
    return None if key is None else str(key)


async def _add_values(request: Request, service: Service, job: Job, groups: list[Group]) -> None:
    if not _has_values(job):
        return
    wanted = [(group.column, failure) for group in groups if group.column is not None for failure in group.first]
    for source, some in (await run_in_threadpool(_sources, service, job, wanted)).items():
        texts = await records.run(request, service, cells, source, job.model, job.options, [cell for cell, _ in some])
        for text, (_, failure) in zip(texts, some, strict=True):
            failure.value = text


def _sources(service: Service, job: Job, wanted: list[tuple[str, Failure]]) -> dict[Input, list[tuple[Cell, Failure]]]:
    """The values to read, by their input."""
    found: dict[Input, list[tuple[Cell, Failure]]] = {}
    with service.runtime.database.read() as connection:
        inputs = [records.input_of(connection, service, stored) for stored in job.inputs]
        numbers = {stored.key: number for number, stored in enumerate(job.inputs)}
        for column, failure in wanted:
            number, record, after, _ = records.place_of(connection, job, failure.record)
            if failure.input in numbers:
                number, record, after = numbers[failure.input], failure.place, None
            shown = _FILE if inputs[number].format == "zip" else column  # an image is known by its name
            found.setdefault(inputs[number], []).append((Cell(record, shown, after), failure))
    return found
