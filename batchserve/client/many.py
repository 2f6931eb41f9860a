"""Many files into a folder: each is one job, several are in progress at a time, and a run continues where an earlier
one ended."""

import base64
import errno
import functools
import hashlib
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from batchserve.client.bars import Bars
from batchserve.client.core import AsyncJob, AsyncJobs, AsyncModels, Core
from batchserve.client.data import content_of
from batchserve.client.errors import (
    APIError,
    AuthenticationFailed,
    ConnectionFailed,
    FilesFailed,
    JobCancelled,
    WaitTimeout,
)
from batchserve.client.inputs import Found, InputFile, LeftOut, find_inputs, require_distinct
from batchserve.client.ledger import Entry, Ledger, bytes_of
from batchserve.client.names import errors_name, result_name
from batchserve.client.transport import Request, Transport, Wire, pause_before, query
from batchserve.client.views import FilesProgress, JobView, Model
from batchserve.client.writing import remove_parts
from batchserve.errors import (
    BatchserveError,
    DigestMismatch,
    Gone,
    IdempotencyInProgress,
    IdempotencyMismatch,
    InsufficientStorage,
    InvalidInput,
    JobConflict,
    JobNotFound,
    TooManyRequests,
    Unavailable,
)

__all__ = ["FileOutcome", "FilesReport", "Inputs", "predict_files"]

T = TypeVar("T")
Inputs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Found

_IN_FLIGHT = 8
_UPLOADS = 2
"""Files that are sent at a time: more would share the same connection, and all arrive late."""
_PATIENCE = 300.0
"""Seconds for which a call is repeated that the server does not answer: a restart takes less, and so does a short
outage of the network."""
_READS = 3
"""How often a file is read that changes meanwhile."""
_PASSING = (ConnectionFailed, Unavailable, TooManyRequests, InsufficientStorage, IdempotencyInProgress)
_GATEWAY = (502, 503, 504)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_QUEUEING = frozenset({"priority", "run_after", "metadata", "reuse"})
"""Options that do not change a result."""


@dataclass(frozen=True, slots=True)
class FileOutcome:
    """What became of one file."""

    path: Path
    state: str
    """completed; unchanged: an earlier run has completed it, and nothing has changed since; submitted: it is queued;
    unfinished: the time was over; cancelled; failed."""
    job: str | None = None
    result: Path | None = None
    """Where its result is. Of a failed file, an earlier one, of other bytes, another model or other options."""
    errors: Path | None = None
    """The list of its records that could not be scored."""
    rows: int = 0
    failed: int = 0
    """Rows that could not be scored."""
    error: BatchserveError | OSError | None = None
    """Why it failed."""


@dataclass(frozen=True, slots=True)
class FilesReport:
    """What became of all files."""

    model: str
    """`name@version`, which scored them all."""
    files: list[FileOutcome]
    left_out: list[LeftOut]
    """Files and folders that are not inputs, each with the reason."""
    notes: list[str]

    @property
    def failed(self) -> list[FileOutcome]:
        return [file for file in self.files if file.error is not None]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def rows_failed(self) -> int:
        return sum(file.failed for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """How files are predicted: what `FilesOptions` says, and the options of their jobs."""

    wait: bool = True
    timeout: float | None = None
    direct: bool = False
    in_flight: int = _IN_FLIGHT
    progress: bool | None = None
    options: Mapping[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        names = {field.name for field in fields(cls)}
        own = {name: value for name, value in given.items() if name in names}
        return cls(**own, options={name: value for name, value in sorted(given.items()) if name not in own})


async def predict_files(
    transport: Transport, paths: Inputs, model: str, output: str | os.PathLike[str], options: Mapping[str, Any]
) -> FilesReport:
    """Raises FilesFailed, with the report, when all others are done; and at once what would fail every file."""
    call = transport.wire.call
    plan, folder = _Plan.of(options), Path(output)
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    found = several if isinstance(several, Found) else await call(functools.partial(find_inputs, several))
    if found.images is not None:
        raise InvalidInput("images are one job with one result: predict them by themselves")
    require_distinct(found.files)
    version = await AsyncModels(transport).get(model)
    with Ledger.opened(folder) as ledger, Bars(plan.progress) as bars:
        own = ledger.among(file.path for file in found.files)
        files = [file for file in found.files if file.path not in own]
        run = _Run(transport, ledger, folder, version, plan, files, _Tally(files, bars.files))
        notes, left_out = run.notes(), [LeftOut(path, "a result") for path in sorted(own)]
        report = FilesReport(run.model, await run.outcomes(), found.left_out + left_out, notes)
    if failed := report.failed:
        faults = [{"file": str(file.path), "message": str(file.error)} for file in failed]
        raise FilesFailed(f"{len(failed):,} of {len(report.files):,} files failed", errors=faults, report=report)
    return report


class _Halted(Exception):
    """The run has ended while this file was in progress."""


class _Patience:
    """Calls are repeated while the server is away or has no room, until the time is over or the run has ended."""

    def __init__(self, wire: Wire, timeout: float | None) -> None:
        self._wire = wire
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._halted = False

    async def call(self, call: Callable[[], Coroutine[Any, Any, T]]) -> T:
        first, tries = math.inf, 0
        while True:
            self.require_going()
            try:
                return await call()
            except BatchserveError as error:
                first = min(first, time.monotonic())
                if not _is_passing(error) or time.monotonic() > min(first + _PATIENCE, self._deadline):
                    raise
            await self._wire.sleep(pause_before(tries, None))
            tries += 1

    def left(self) -> float | None:
        """Seconds, if they are limited."""
        return None if self._deadline == math.inf else max(0.0, self._deadline - time.monotonic())

    def halt(self) -> None:
        self._halted = True

    def require_going(self, *_: int | None) -> None:
        """Raises _Halted. May be called while bytes are sent and received."""
        if self._halted:
            raise _Halted


class _Tally:
    """The outcomes so far, and how far the files are that are in progress."""

    def __init__(self, files: Sequence[InputFile], on_progress: Callable[[FilesProgress], None]) -> None:
        self.outcomes: dict[str, FileOutcome] = {}
        self._sizes = {file.name: max(file.bytes, 1) for file in files}
        self._all = sum(self._sizes.values())
        self._shares = dict.fromkeys(self._sizes, 0.0)
        self._progress = FilesProgress(0, len(files), 0, 0, 0.0)
        self._on_progress = on_progress
        self._lock = threading.Lock()

    def note(self, file: InputFile, share: float, outcome: FileOutcome | None = None) -> None:
        with self._lock:
            more = self._sizes[file.name] * (share - self._shares[file.name]) / self._all
            self._shares[file.name] = share
            progress = replace(self._progress, share=self._progress.share + more)
            if outcome is not None:
                self.outcomes[file.name] = outcome
                rows, failed = progress.rows + outcome.rows, progress.failed + outcome.failed
                progress = replace(progress, done=progress.done + 1, rows=rows, failed=failed)
            self._progress = progress
            self._on_progress(progress)


class _Run:
    """One run over files. Its methods are called from several threads, or from several tasks of one."""

    def __init__(
        self,
        transport: Transport,
        ledger: Ledger,
        output: Path,
        model: Model,
        plan: _Plan,
        files: list[InputFile],
        tally: _Tally,
    ) -> None:
        self._transport, self._ledger, self._output, self._plan = transport, ledger, output, plan
        self.model = f"{model.name}@{model.version}"
        self._asked = _digest_of(self.model, model.digest, plan.options)
        self._uploads = transport.wire.gate(_UPLOADS)
        self._patience = _Patience(transport.wire, plan.timeout)
        self._files, self._tally = files, tally

    async def outcomes(self) -> list[FileOutcome]:
        """Of all files, in their order."""
        for folder in {(self._output / file.name).parent for file in self._files}:
            await self._transport.wire.call(functools.partial(remove_parts, folder))
        calls = [functools.partial(self._file, file) for file in self._files]
        await self._transport.wire.each(calls, max(1, self._plan.in_flight), self._patience.halt)
        return [self._tally.outcomes[file.name] for file in self._files]

    def notes(self) -> list[str]:
        """That results are of another version, which is why their files are scored again."""
        models: dict[str, int] = {}
        for file in self._files:
            entry = self._ledger.get(file.name)
            if entry is not None and entry.saved is not None and entry.model != self.model:
                models[entry.model] = models.get(entry.model, 0) + 1
        return [
            f"{count:,} {'result is' if count == 1 else 'results are'} of {model}: {self.model} scores the inputs again"
            for model, count in sorted(models.items())
        ]

    async def _file(self, file: InputFile) -> None:
        try:
            outcome = await self._outcome(file)
        except (BatchserveError, OSError) as error:
            if _is_fatal(error):
                raise
            outcome = await self._failed(file, error)
        self._tally.note(file, 1.0, outcome)

    async def _failed(self, file: InputFile, error: BatchserveError | OSError) -> FileOutcome:
        entry = self._ledger.get(file.name)
        result = self._output / entry.result if entry is not None and entry.result else None
        # False for a name that is too long, where Path.exists raises
        is_there = result is not None and await self._transport.wire.call(functools.partial(os.path.exists, result))
        older = result if is_there else None
        states: dict[type[Exception], str] = {WaitTimeout: "unfinished", JobCancelled: "cancelled"}
        return FileOutcome(
            file.path, states.get(type(error), "failed"), entry.job if entry else None, older, error=error
        )

    async def _outcome(self, file: InputFile) -> FileOutcome:
        if file.fault is not None:
            raise InvalidInput(f"the file {file.fault}")
        for _ in range(_READS):
            entry = await self._entry(file)
            if entry.saved is not None:
                return self._of(file, entry, "unchanged")
            try:
                job = await self._job(file, entry)
            except DigestMismatch:
                continue  # it has changed since it was read
            if not self._plan.wait:
                return FileOutcome(file.path, "submitted", job.id)
            return await self._saved(file, job)
        raise InvalidInput("the file changes while it is read")

    async def _entry(self, file: InputFile) -> Entry:
        """The entry of the file as it is now: that of an earlier run, if it asked the same, or a new one. It has
        `saved` if its result is there, whole."""
        call, known = self._transport.wire.call, self._ledger.get(file.name)
        read = await call(functools.partial(bytes_of, file.path, known.input if known else None))
        if known is None or (known.input.sha256, known.asked) != (read.sha256, self._asked):
            # The earlier result stays until there is another one in its place.
            entry = Entry(
                read,
                self.model,
                self._asked,
                str(uuid.uuid4()),
                result=known.result if known else None,
                errors=known.errors if known else None,
            )
        elif known.saved is not None and not await call(functools.partial(self._is_whole, known)):
            entry = replace(known, input=read, saved=None)
        else:
            entry = replace(known, input=read)
        if entry != known:
            self._ledger.put(file.name, entry)
        return entry

    def _is_whole(self, entry: Entry) -> bool:
        assert entry.result is not None
        try:
            read = bytes_of(self._output / entry.result, entry.saved)
        except OSError:
            return False
        has_errors = entry.errors is None or (self._output / entry.errors).is_file()
        return entry.saved is not None and read.sha256 == entry.saved.sha256 and has_errors

    async def _job(self, file: InputFile, entry: Entry) -> AsyncJob:
        """The job of a file, which an earlier run has sent, or this one sends. Raises DigestMismatch."""
        if (known := entry.job) is not None:
            if (job := await self._patience.call(lambda: self._known(known))) is not None:
                return job
            entry = self._with_new_key(file, entry)
        async with self._uploads:
            if self._patience.left() == 0:
                raise WaitTimeout("the time was over before the file was sent", job=None)
            try:
                job = await self._patience.call(lambda: self._sent(file, entry))
            except (
                IdempotencyMismatch,
                JobNotFound,
                Gone,
            ):  # its key is of a job that was deleted, or of other options
                entry = self._with_new_key(file, entry)
                job = await self._patience.call(lambda: self._sent(file, entry))
        self._ledger.put(file.name, replace(entry, job=job.id))
        return job

    def _with_new_key(self, file: InputFile, entry: Entry) -> Entry:
        entry = replace(entry, key=str(uuid.uuid4()), job=None)
        self._ledger.put(file.name, entry)
        return entry

    async def _known(self, id: str) -> AsyncJob | None:
        """A job of an earlier run, which goes on if it was stopped. None where it has no result to wait for."""
        try:
            job = await AsyncJobs(self._transport).get(id)
            if job.state in ("failed", "cancelled"):
                await job.retry()
        except (JobNotFound, Gone, JobConflict):
            return None
        return None if job.state in ("expired", "uploaded") else job

    async def _sent(self, file: InputFile, entry: Entry) -> AsyncJob:
        if self._plan.direct:
            core, report = Core(self._transport), self._patience.require_going
            job = await core.submit(file.path, self.model, direct=True, on_upload=report, **self._plan.options)
            now = await self._transport.wire.call(functools.partial(bytes_of, file.path, entry.input))
            if now.sha256 != entry.input.sha256:
                raise DigestMismatch("the file has changed while it was sent")
            return job
        content = await self._transport.wire.call(functools.partial(content_of, file.path))
        digest = base64.b64encode(bytes.fromhex(entry.input.sha256)).decode()
        request = Request(
            method="POST",
            path="/v1/predict",
            params=query({"model": self.model, **self._plan.options, "filename": content.filename}),
            headers={"Idempotency-Key": entry.key, "Content-Digest": f"sha-256=:{digest}:"},
            content=content,
            on_upload=self._patience.require_going,
            patience=60.0,
        )
        return AsyncJob(self._transport, await self._transport.json(request))

    async def _saved(self, file: InputFile, job: AsyncJob) -> FileOutcome:
        """Waits for a job, and saves its result. Raises JobFailed, JobCancelled, WaitTimeout."""
        await self._patience.call(
            lambda: job.wait(self._patience.left(), on_progress=functools.partial(self._seen, file))
        )
        rows, failed = job.rows.get("total") or 0, job.rows.get("failed") or 0
        result, entry = job.result(), self._ledger.get(file.name)
        assert entry is not None
        folder = Path(file.name).parent
        name = (folder / result_name(file.path.name, result.suffix)).as_posix()
        errors = (folder / errors_name(file.path.name)).as_posix() if failed else None
        if entry.errors is not None and errors is None:
            await self._transport.wire.call(functools.partial((self._output / entry.errors).unlink, missing_ok=True))
        entry = replace(entry, result=name, errors=errors, rows=rows, failed=failed)
        self._ledger.put(file.name, entry)  # its results are known as such before they are there
        target = self._output / name
        await self._transport.wire.call(functools.partial(target.parent.mkdir, parents=True, exist_ok=True))
        if errors is not None:
            await self._patience.call(lambda: job.save_errors(self._output / errors))
        await self._patience.call(lambda: result.save(target, on_download=self._patience.require_going))
        saved = await self._transport.wire.call(functools.partial(bytes_of, target, settled=0.0))
        entry = replace(entry, saved=saved)
        await self._transport.wire.call(functools.partial(self._ledger.put, file.name, entry, durable=True))
        return self._of(file, entry, "completed")

    def _of(self, file: InputFile, entry: Entry, state: str) -> FileOutcome:
        result = self._output / entry.result if entry.result else None
        errors = self._output / entry.errors if entry.errors else None
        return FileOutcome(file.path, state, entry.job, result, errors, entry.rows, entry.failed)

    def _seen(self, file: InputFile, job: JobView) -> None:
        self._patience.require_going()
        self._tally.note(file, 0.99 * job.progress)


def _digest_of(model: str, digest: str, options: Mapping[str, Any]) -> str:
    chosen = {name: value for name, value in options.items() if name not in _QUEUEING}
    return hashlib.sha256(json.dumps([model, digest, chosen], sort_keys=True).encode()).hexdigest()


def _is_passing(error: BatchserveError) -> bool:
    """Whether the same call may succeed later."""
    return isinstance(error, _PASSING) or (isinstance(error, APIError) and error.http_status in _GATEWAY)


def _is_fatal(error: BatchserveError | OSError) -> bool:
    """Whether it would fail all files: the server is away or refuses the key, or the disk is full."""
    if isinstance(error, BatchserveError):
        return isinstance(error, AuthenticationFailed) or _is_passing(error)
    return error.errno in _FULL
