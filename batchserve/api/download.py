"""GET /v1/download/{job_id}: results, or 404 until they exist."""

import base64
import csv
import functools
import io
import os
import re
import secrets
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import RedirectResponse
from starlette.concurrency import run_in_threadpool

from batchserve.api import conditional
from batchserve.api.auth import caller_of
from batchserve.api.bodies import require_space
from batchserve.api.deps import OwnJob, ServiceDep, finished, leaving, own_job, served, wait_for
from batchserve.api.elsewhere import require_own_input, require_own_result
from batchserve.api.file_responses import FAILED_RECORDS, FILE, INPUT_FILE
from batchserve.api.files import File, InMemory, Remote, Stream, attachment, blocks_of, named_after
from batchserve.api.head import listed
from batchserve.api.plain import plain
from batchserve.domain import Chunk, ChunkLimits, Dialect, Job, JobState, Result
from batchserve.errors import Gone, InvalidOptions, NotAcceptable, ResultNotReady, UnreadableRow
from batchserve.formats import FORMATS, RESULT_FORMATS, by_media_type, get_format
from batchserve.formats.csv import escape_formula
from batchserve.formats.protocol import Format, Part
from batchserve.jobs import contents, plan
from batchserve.scoring.assembly import assembled_pieces, stored_parts
from batchserve.scoring.conversion import ConvertTask, convert_chunk
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import Planned, PlanTask, plan_chunks
from batchserve.service import Service
from batchserve.service.turns import Lane, Place
from batchserve.storage import Span, delete_objects, is_in_row, local_path

router = APIRouter(tags=["download"])

_TABLES = [format for format in RESULT_FORMATS.values() if format.holds == "table"]

JobFormat = Annotated[
    str | None,
    Query(description=f"Convert: {', '.join(format.name for format in _TABLES)}.", examples=["parquet"]),
]
Partial = Annotated[
    bool, Query(description="Return the finished rows of a job that is not completed: a prefix of the result.")
]
CsvEscape = Annotated[
    bool, Query(description="CSV for spreadsheets: an apostrophe before each text that would be read as a formula.")
]
Redirect = Annotated[
    bool | None,
    Query(
        description="Redirect to a URL of the object store that is valid for 15 minutes; without one, no effect. "
        "Default: BATCHSERVE_REDIRECT_DOWNLOADS."
    ),
]
Wait = Annotated[float, Query(ge=0, le=60, description="Seconds to wait for the result before responding 404.")]
_QUALITY = re.compile(r"0(\.\d{0,3})?|1(\.0{0,3})?")


async def accepted(request: Request) -> str | None:
    """What the client accepts."""
    return listed(request.scope, b"accept")


Accept = Annotated[str | None, Depends(accepted)]


async def _download(request: Request) -> Response | None:
    if request.scope["query_string"]:
        return None
    job_id = await own_job(request.path_params["job_id"], request)
    return await download(job_id, request, served(request), accept=await accepted(request))


@router.head("/v1/download/{job_id}", include_in_schema=False)
@router.get(
    "/v1/download/{job_id}", response_class=Response, responses=FILE,
    operation_id="download", summary="Download the result",
)  # fmt: skip
@plain(_download)
async def download(
    job_id: OwnJob,
    request: Request,
    service: ServiceDep,
    format: JobFormat = None,
    partial: Partial = False,
    csv_escape: CsvEscape = False,
    wait: Wait = 0.0,
    redirect: Redirect = None,
    accept: Accept = None,
) -> Response:
    """404 `result-not-ready` until the job is completed; then always the same bytes; 410 once expired.

    The result comes in the format of the job; `format` or Accept converts it on the way, as a stream.
    """
    if wait:
        await wait_for(request, service, job_id, wait, finished)
    database = service.runtime.database
    job, content = await database.fetch_one(lambda connection: contents.get_with_result(connection, job_id))
    if job.state is JobState.EXPIRED:
        raise Gone(f"the result of job {job_id} was removed when it expired")
    if job.options is None:
        raise _not_ready(job)
    own = get_format(job.options.format)
    wanted = _negotiate(own, format, accept)
    if csv_escape and wanted.has_types:
        raise InvalidOptions(f"csv_escape is for CSV, and the result is in {wanted.name}: request format=csv")
    if job.state is not JobState.COMPLETED or job.result is None:
        if not partial:
            raise _not_ready(job)
        if wanted is not own or csv_escape:
            raise InvalidOptions(f"a partial result is not converted; it has the format of the job, {own.name}")
        return await _partial_result(service, job, own)
    require_own_result(job)
    if job.options.archive:
        return await _archive(request, service, job, job.result, redirect, is_converted=wanted is not own or csv_escape)
    if wanted is not own or csv_escape:
        return await _converted(request, service, job, job.result, _Conversion(own, wanted, csv_escape))
    result = _Object(job.result.key, job.result.bytes, job.result.sha256, job.finished_at or job.created_at)
    shown = _Shown(own.media_type, named_after(job, "predictions", own.suffix), redirect)
    return await _file(request, service, job, result, shown, content)


@router.head("/v1/download/{job_id}/errors", include_in_schema=False)
@router.get(
    "/v1/download/{job_id}/errors", response_class=Response, responses=FAILED_RECORDS,
    operation_id="download_errors", summary="Download the list of failed records",
)  # fmt: skip
async def download_errors(
    job_id: OwnJob,
    request: Request,
    service: ServiceDep,
    partial: Partial = False,
    csv_escape: CsvEscape = False,
    accept: Accept = None,
) -> Response:
    """NDJSON, or CSV by Accept: record number (from 0), column, code and message. Empty when no record failed."""
    job = await service.read_job(job_id)
    if job.state is JobState.EXPIRED:
        raise Gone(f"the errors of job {job_id} were removed when it expired")
    if job.state is not JobState.COMPLETED and not partial:
        raise _not_ready(job)
    ranges = _media_ranges(accept or "")
    is_table = _quality(ranges, get_format("csv")) > _quality(ranges, get_format("jsonl"))
    headers = _as_file(named_after(job, "errors", ".csv" if is_table else ".jsonl"))
    if job.state is JobState.COMPLETED and job.result is not None:  # from now on it is what it is
        variant = f"errors{'-csv' if is_table else ''}{'-escaped' if csv_escape else ''}"
        headers["etag"] = _derived_tag(job.result, variant)
    if (known := conditional.answered(request, headers.get("etag"), headers)) is not None:
        return known
    parts = await run_in_threadpool(stored_errors, service, job)
    opened = functools.partial(contents.opened, service.runtime.database, service.runtime.storage)
    blocks = blocks_of(opened, (Span(part.key, 0, part.bytes) for part in parts))
    if is_table:
        return Stream(_errors_csv(blocks, csv_escape), "text/csv", headers)
    return Stream(blocks, "application/x-ndjson", headers)


@router.head("/v1/download/{job_id}/input", include_in_schema=False)
@router.get(
    "/v1/download/{job_id}/input", response_class=Response, responses=INPUT_FILE,
    operation_id="download_input", summary="Download the input",
)  # fmt: skip
async def download_input(job_id: OwnJob, request: Request, service: ServiceDep, redirect: Redirect = None) -> Response:
    """The bytes as they were stored at upload (decompressed)."""
    job = await service.read_job(job_id)
    if job.input_removed_at is not None:
        raise Gone(f"the input of job {job_id} was removed at the end of its retention")
    stored = job.input
    require_own_input(job)
    format = get_format(stored.format)
    name = stored.filename or f"{job_id}-input.{format.suffix.lstrip('.')}"
    input = _Object(stored.key, stored.bytes or 0, stored.sha256, job.created_at)
    return await _file(request, service, job, input, _Shown(format.media_type, name, redirect))


async def _archive(
    request: Request, service: Service, job: Job, result: Result, redirect: bool | None, *, is_converted: bool
) -> Response:
    """The ZIP of the results of all inputs."""
    if is_converted:
        raise InvalidOptions(f"the results of job {job.id} are in a ZIP, and are not converted")
    stored = _Object(result.key, result.bytes, result.sha256, job.finished_at or job.created_at)
    return await _file(request, service, job, stored, _Shown(FORMATS["zip"].media_type, f"{job.id}.zip", redirect))


def stored_errors(service: Service, job: Job) -> tuple[Part, ...]:
    """The objects of a job's errors list, in order: of a completed one, or of the finished chunks of another."""
    if job.result is not None and job.result.errors_key is not None:
        return (Part(job.result.errors_key, job.result.errors_bytes, job.rows_failed),)
    return _stored_parts(service, job)[1]


def _as_file(name: str) -> dict[str, str]:
    """Headers that make a browser save uploaded content instead of showing it."""
    return {"vary": "accept", "content-disposition": attachment(name)}


def _not_ready(job: Job) -> ResultNotReady:
    hints = {
        JobState.UPLOADED: f"POST /v1/predict/{job.id}?model=<name> starts it",
        JobState.FAILED: "partial=true gives the finished rows, the job's `error` has the reason",
        JobState.CANCELLED: "partial=true gives the finished rows",
    }
    hint = hints.get(job.state, "try again later, or wait with ?wait=30")
    detail = f"job {job.id} is {job.state}: there is no result; {hint}"
    if job.state.finished:
        return ResultNotReady(detail, state=job.state.value)
    return ResultNotReady(detail, state=job.state.value, progress=job.progress, retry_after=1)


def _negotiate(own: Format, format: str | None, accept: str | None) -> Format:
    """The format of the response: `format` before Accept before the job's own. Raises NotAcceptable."""
    tables = _TABLES if own.holds == "table" else []
    there = [own, *(table for table in tables if table is not own)]
    if format is not None:
        if get_format(format) not in there:
            names = ", ".join(found.name for found in there)
            raise NotAcceptable(f"a result in {own.name} is not available as {format}; it is available as {names}")
        return get_format(format)
    if accept is None:
        return own
    ranges = _media_ranges(accept)
    best = max(there, key=lambda found: _quality(ranges, found))  # the first of equals: the job's own
    if not _quality(ranges, best):
        types = ", ".join(found.media_type for found in there)
        raise NotAcceptable(f"the result is not available as {accept[:200]!r}; it is available as {types}")
    return best


def _media_ranges(accept: str) -> dict[str, float]:
    """The ranges of an Accept header, each with its quality; known aliases are replaced by the canonical media type."""
    ranges: dict[str, float] = {}
    for part in accept.split(","):
        name, *parameters = (text.strip().lower() for text in part.split(";"))
        quality = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        known = by_media_type(name)
        ranges[known.media_type if known else name] = float(quality) if _QUALITY.fullmatch(quality) else 0.0
    return ranges


def _quality(ranges: Mapping[str, float], format: Format) -> float:
    """The quality of a format, 0 to 1; the most specific range counts."""
    names = (format.media_type, f"{format.media_type.partition('/')[0]}/*", "*/*")
    return next((ranges[name] for name in names if name in ranges), 0.0)


@dataclass(frozen=True, slots=True)
class _Object:
    """A stored object as described by its row. `made_at`: seconds since the epoch."""

    key: str
    bytes: int
    sha256: str | None
    made_at: float

    def headers(self) -> dict[str, str]:
        headers = {"etag": f'"{_identity(self.key, self.sha256)}"', "cache-control": "private, immutable"}
        if self.sha256 is not None:
            digest = base64.b64encode(bytes.fromhex(self.sha256)).decode()
            headers["repr-digest"] = f"sha-256=:{digest}:"
        return headers

    def status(self) -> os.stat_result:
        """The stat result of a file of this length and age."""
        return os.stat_result((0, 0, 0, 0, 0, 0, self.bytes, 0, int(self.made_at), 0))


def _identity(key: str, sha256: str | None) -> str:
    """The identity of a stored object: its digest or, where that is unknown, its key, whose bytes never change
    either."""
    return sha256 or key.replace("/", "-")


def _derived_tag(result: Result, what: str) -> str:
    """The ETag of a representation derived from a result: a conversion, or its errors."""
    return f'"{_identity(result.key, result.sha256)}-{what}"'


def _opened(path: Path) -> os.stat_result:
    """The status of a file, opened once before the response starts: later it is too late for a 503."""
    with path.open("rb") as file:
        return os.fstat(file.fileno())


async def _content(service: Service, job: Job, key: str) -> bytes:
    """An object in a row. Raises Gone when it was removed with its job meanwhile."""
    try:
        return await service.runtime.database.fetch_one(lambda connection: contents.find(connection, key))
    except FileNotFoundError:
        raise await _missing(service, job) from None


async def _missing(service: Service, job: Job) -> Exception:
    """The error for a missing object: a fault, unless its job has released it meanwhile. Raises JobNotFound."""
    now = await service.read_job(job.id)
    if (now.state, now.input_removed_at) == (job.state, job.input_removed_at):
        return FileNotFoundError(f"an object of job {job.id} is missing")
    return Gone(f"the bytes of job {job.id} were just removed")


@dataclass(frozen=True, slots=True)
class _Shown:
    """How an object is presented to a client."""

    media_type: str
    name: str
    redirect: bool | None

    def is_elsewhere(self, request: Request, service: Service) -> bool:
        """Whether the client is to fetch it from the store, if it can: by GET, for which URLs are signed."""
        wanted = service.runtime.settings.redirect_downloads if self.redirect is None else self.redirect
        return wanted and request.method == "GET"


async def _file(
    request: Request, service: Service, job: Job, stored: _Object, shown: _Shown, content: bytes | None = None
) -> Response:
    """A stored object with ranges: a file of this host, a stream from the store, or a redirect to its URL there.
    `content`: of an object in a row, if it was read."""
    storage = service.runtime.storage
    headers = {**stored.headers(), "vary": "accept"}
    path, status = None, stored.status()
    if is_in_row(stored.key):
        content = await _content(service, job, stored.key) if content is None else content
    elif (path := local_path(storage, stored.key)) is not None:
        try:
            status = await run_in_threadpool(_opened, path)
        except FileNotFoundError:
            raise await _missing(service, job) from None
    modified = datetime.fromtimestamp(int(status.st_mtime), UTC)  # as Last-Modified says it, which has no fractions
    if (known := conditional.answered(request, headers["etag"], headers, modified)) is not None:
        return known
    how: dict[str, Any] = {"media_type": shown.media_type, "filename": shown.name}
    how |= {"headers": headers, "stat_result": status}
    if content is not None:
        return InMemory(content, stored.key, **how)
    if path is None:
        elsewhere = shown.is_elsewhere(request, service)
        if elsewhere and (url := await run_in_threadpool(storage.url, stored.key)) is not None:
            return RedirectResponse(url, 307, {"cache-control": "no-store"})
        missing = functools.partial(_missing, service, job)
        return Remote(storage, stored.key, missing, **how)
    return File(path, **how)


# --- partial results -------------------------------------------------------------------------------------------------


def _stored_parts(service: Service, job: Job) -> tuple[tuple[Part, ...], tuple[Part, ...]]:
    """The parts of done chunks without a gap from the first record, and the errors of all done chunks: the one that
    stopped the job may be after a gap."""
    with service.runtime.database.read() as connection:
        done = plan.done_chunks(connection, job.id)
    prefix, expected = [], 0
    for committed in done:
        if committed.chunk.first_record != expected:
            break
        prefix.append(committed)
        expected += committed.chunk.records
    return stored_parts(job.id, prefix)[0], stored_parts(job.id, done)[1]


async def _partial_result(service: Service, job: Job, own: Format) -> Response:
    parts, _ = await run_in_threadpool(_stored_parts, service, job)
    if not parts:
        raise _not_ready(job)
    rows = sum(part.records for part in parts)
    total = str(job.rows_planned) if job.planned else "*"
    pieces = assembled_pieces(service.runtime.storage, own.name, job.dialect, parts)
    headers = {
        "batchserve-incomplete": f"rows 0-{rows - 1}/{total}",
        "content-disposition": attachment(named_after(job, "partial", own.suffix)),
    }
    return Stream(blocks_of(service.runtime.storage.open, pieces), own.media_type, headers)


# --- conversion ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Conversion:
    own: Format
    wanted: Format
    escape: bool

    def dialect(self, job: Job) -> Dialect:
        return job.dialect if self.wanted is self.own else Dialect()

    def task(self, job: Job, source: Input, chunk: Chunk, key: str) -> ConvertTask:
        """The task of one chunk, written under `key`. Raises UnreadableRow where the job's model cannot be read."""
        if job.model is None or job.options is None:
            raise UnreadableRow(f"the model of job {job.id} cannot be read: its result comes as {self.own.name} only")
        dialect = self.dialect(job)
        return ConvertTask(source, chunk, job.model, job.options.top_k, self.wanted.name, dialect, key, self.escape)


async def _converted(request: Request, service: Service, job: Job, result: Result, conversion: _Conversion) -> Response:
    """The result in another format, converted chunk by chunk in scoring processes while it is sent."""
    wanted = conversion.wanted
    headers = {
        "etag": _derived_tag(result, f"{wanted.name}{'-escaped' if conversion.escape else ''}"),
        "vary": "accept",
        "content-disposition": attachment(named_after(job, "predictions", wanted.suffix)),
    }
    if (known := conditional.answered(request, headers["etag"], headers)) is not None:
        return known
    if request.method == "HEAD":
        head = Response(headers=headers, media_type=wanted.media_type)
        del head.headers["content-length"]  # of the bytes of a GET, unknown before they are converted
        return head
    await run_in_threadpool(require_space, service.runtime)  # holds its parts while they are sent
    content = await _content(service, job, result.key) if is_in_row(result.key) else None
    source = Input(service.runtime.settings.storage, result.key, conversion.own.name, job.dialect, content)
    settings = service.runtime.settings
    task = PlanTask(source, None, ChunkLimits(settings.chunk_bytes, settings.chunk_records), 2**62)
    with ExitStack() as held:
        place = held.enter_context(service.calls.place(caller_of(request).tenant, Lane.LONG))
        async with service.calls.long_turn(place, settings.online_wait):
            seconds = settings.chunk_timeout
            planned = await service.calls.run(place, plan_chunks, task, seconds=seconds, leaving=leaving(request))
            blocks = _convert(service, place, source, planned, job, conversion)
            first = await run_in_threadpool(next, blocks, b"")  # an error here is a problem, not a broken body
        return Stream(blocks, wanted.media_type, headers, first, lambda: service.calls.long_turn(place), held.pop_all())


def _convert(
    service: Service, place: Place, source: Input, planned: Planned, job: Job, conversion: _Conversion
) -> Generator[bytes]:
    folder = f"conversions/{secrets.token_hex(8)}/"
    storage = service.runtime.storage
    parts = _converted_parts(service, place, source, planned, job, conversion, folder)
    wanted = get_format(conversion.wanted.name, conversion.dialect(job))
    try:
        yield from blocks_of(storage.open, wanted.assemble(parts, storage.open, job.rows_done))
    finally:
        parts.close()
        delete_objects(storage, [stored.key for stored in storage.list(folder)])


def _converted_parts(
    service: Service,
    place: Place,
    source: Input,
    planned: Planned,
    job: Job,
    conversion: _Conversion,
    folder: str,
) -> Generator[Part]:
    """Each part after the previous one was sent: a conversion uses one scoring process, never all."""
    seconds = service.runtime.settings.chunk_timeout
    for chunk in planned.chunks:
        task = conversion.task(job, source, chunk, f"{folder}{chunk.first_record:015d}")
        yield service.calls.run_from_thread(place, convert_chunk, task, seconds=seconds)


def _errors_csv(blocks: Iterator[bytes], escape: bool) -> Generator[bytes]:
    buffer = io.StringIO()
    rows = csv.writer(buffer, lineterminator="\n")
    rows.writerow(["record", "key", "column", "code", "message"])
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            error = orjson.loads(line)
            cells = [error.get(name) for name in ("record", "key", "column", "code", "message")]
            rows.writerow([escape_formula(cell) if escape and isinstance(cell, str) else cell for cell in cells])
        yield buffer.getvalue().encode()
        buffer.seek(0)
        buffer.truncate()
    yield buffer.getvalue().encode()
