"""The clients, written once, as coroutines. `AsyncClient` uses them directly, `Client` without an event loop."""

import builtins
import functools
import json
import math
import os
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from batchserve.client import elsewhere
from batchserve.client.bars import Bars
from batchserve.client.data import (
    bytes_content,
    content_of,
    holds_arrays,
    library_of,
    path_of,
    paths_of,
    require_format,
)
from batchserve.client.errors import ConnectionFailed, JobCancelled, JobFailed, WaitTimeout
from batchserve.client.extras import require_polars
from batchserve.client.graphs import content_of_model
from batchserve.client.lists import JobFilters, each_item, jobs_query
from batchserve.client.names import is_folder, placed, require_other
from batchserve.client.options import (
    JobOptions,
    LocatedOptions,
    OnlineOptions,
    PredictOptions,
    ReadOptions,
    ValidateOptions,
)
from batchserve.client.results import AsyncResult, beside
from batchserve.client.schedules import AsyncSchedules
from batchserve.client.tables import origins_of, table_of
from batchserve.client.transport import OnUpload, Request, Transport, query, segment
from batchserve.client.uploads import parts_of, with_digest
from batchserve.client.views import JobView, Model, Queued
from batchserve.client.webhooks import AsyncWebhooks
from batchserve.client.writing import write_whole
from batchserve.errors import BatchserveError, Unavailable

if TYPE_CHECKING:
    from batchserve.client.data import Data, Paths

T = TypeVar("T")

_LONG_POLL = 30.0
_PROGRESS = 0.3
_OUTAGE = 30.0
"""Seconds for which a waiting client tolerates a server that does not answer: a restart takes less."""
_ADMISSION = 300.0
_COLLECTIVE = 300.0
"""Seconds that a server may take to check thousands of inputs."""
_VERIFICATION = 1800.0
"""Seconds that a server may take to read a direct upload."""
_PAGE = 200
_TYPED = frozenset({"arrow", "arrows", "parquet"})
"""Formats of results that keep the types of columns that pass through."""
_OF_UPLOAD = frozenset({"model", "columns", "inputs", *ReadOptions.__annotations__})
"""Options of a prediction that the completion of its direct upload takes, to check the input."""


class AsyncJob(JobView):
    """A job on the server. Its properties hold the last response; `refresh` updates them."""

    def __init__(self, transport: Transport, data: Mapping[str, Any]) -> None:
        super().__init__(data)
        self._transport = transport

    async def refresh(self) -> Self:
        return await self._ask(Request(method="GET", path=_job_path(self.id)))

    async def wait(
        self,
        timeout: float | None = None,  # noqa: ASYNC109 - it has an error of its own, and Client has no asyncio.timeout
        *,
        on_progress: Callable[[JobView], None] | None = None,
    ) -> Self:
        """Returns when the job is completed. `on_progress` is called a few times a second, and once at least.

        Raises JobFailed, JobCancelled, or WaitTimeout after `timeout` seconds; the job goes on then.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        heard = time.monotonic()
        if on_progress is not None and self.finished:
            on_progress(self)
        while not self.finished:
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(f"job {self.id} is {self.state} after {timeout:g} s and continues", job=self)
            asked, state = time.monotonic(), self.state
            seconds = min(left, _PROGRESS if on_progress else _LONG_POLL)
            try:
                await self._ask(
                    Request(method="GET", path=_job_path(self.id), params={"wait": seconds}, patience=seconds)
                )
                heard = time.monotonic()
            except (ConnectionFailed, Unavailable):
                if time.monotonic() - heard > _OUTAGE:
                    raise
            if on_progress is not None:
                on_progress(self)
            if self.state == state and not self.finished:
                await self._transport.wire.sleep(max(0.0, 0.25 - (time.monotonic() - asked)))
        return self._completed()

    async def cancel(self) -> Self:
        """Requests cancellation. Finished chunks stay; the state follows within seconds."""
        return await self._ask(Request(method="POST", path=f"{_job_path(self.id)}/cancel"))

    async def retry(self) -> Self:
        """Resumes the unfinished chunks of a failed or cancelled job."""
        return await self._ask(Request(method="POST", path=f"{_job_path(self.id)}/retry"))

    async def retry_failed_rows(self) -> "AsyncJob":
        """A new job that scores the failed records of this completed one again; its result is the merged one."""
        request = Request(
            method="POST",
            path=f"{_job_path(self.id)}/retry",
            content=bytes_content(b'{"rows":"failed"}', "application/json"),
        )
        return AsyncJob(self._transport, await self._transport.json(request))

    async def errors(self) -> list[dict[str, Any]]:
        """The records that could not be scored so far: number (from 0), column, code and message of each."""
        content = b"".join([block async for block in self._transport.download(self._errors())])
        return [json.loads(line) for line in content.splitlines() if line.strip()]

    async def save_errors(self, path: str | os.PathLike[str]) -> Path:
        """Writes the same as lines of JSON. The file appears when it is complete."""
        blocks = self._transport.download(self._errors())
        await write_whole(self._transport.wire, Path(path), blocks)
        return Path(path)

    async def delete(self) -> None:
        """Removes the job with its input and result."""
        await self._transport.json(Request(method="DELETE", path=_job_path(self.id)))

    def _errors(self) -> Request:
        return Request(
            method="GET",
            path=f"/v1/download/{segment(self.id)}/errors",
            params=query({"partial": None if self.state == "completed" else True}),
            headers={"Accept": "application/x-ndjson"},
        )

    def result(self, format: str | None = None, *, partial: bool = False) -> AsyncResult:
        """The result, by default in the format of the job. `partial`: the rows finished so far."""
        return AsyncResult(self._transport, self, format=format, partial=partial)

    def _completed(self) -> Self:
        if self.state == "failed":
            error = self.error or {}
            message = error.get("message") or error.get("detail") or "no reason given"
            raise JobFailed(f"job {self.id} failed: {message}", errors=error.get("errors") or (), job=self)
        if self.state == "cancelled":
            raise JobCancelled(f"job {self.id} was cancelled", job=self)
        return self

    async def _ask(self, request: Request) -> Self:
        self._data = await self._transport.json(request)
        return self


class AsyncJobs:
    """The jobs of the server, as `client.jobs`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def get(self, id: str) -> AsyncJob:
        return await AsyncJob(self._transport, {"id": id}).refresh()

    async def delete(self, id: str) -> None:
        """Removes a job with its input and result, even if it cannot be shown any more."""
        await AsyncJob(self._transport, {"id": id}).delete()

    async def list(
        self, *, sort: str | None = None, order: str | None = None, **wanted: Unpack[JobFilters]
    ) -> AsyncGenerator[AsyncJob]:
        """All matching jobs, the latest first; further pages are fetched on demand. By the time at which they finished,
        `sort="finished"`, only jobs that have."""
        params = jobs_query({**wanted, "sort": sort, "order": order, "limit": _PAGE})
        async for data in each_item(self._transport, "/v1/jobs", params, "jobs"):
            yield AsyncJob(self._transport, data)

    async def count(self, **wanted: Unpack[JobFilters]) -> int:
        """The number of matching jobs."""
        params = jobs_query({**wanted, "total": True, "limit": 1})
        return int((await self._transport.json(Request(method="GET", path="/v1/jobs", params=params)))["total"])


class AsyncModels:
    """The models of the server, as `client.models`."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def add(self, model: Any, sample: Any = None, *, name: str, on_upload: OnUpload | None = None) -> Model:
        """Registers a model as the newest version of `name`. Equal bytes return the existing version.

        `model`: the path or the bytes of an ONNX file or a zip bundle, a ModelProto, a Conversion; or a fitted
        estimator or the path of its pickle, which is converted here and takes its `sample`, as `convert` does.
        """
        content = await self._transport.wire.call(functools.partial(content_of_model, model, sample))
        request = Request(
            method="PUT", path=_model_path(name), content=content, patience=_ADMISSION, on_upload=on_upload
        )
        return Model(await self._transport.json(request))

    async def get(self, name: str) -> Model:
        """The newest version of `name`, or exactly `name@version`."""
        return Model(await self._transport.json(Request(method="GET", path=_model_path(name))))

    async def list(self, *, q: str | None = None) -> "builtins.list[Model]":
        """The newest version of every model, or of those with `q` in their names."""
        params = query({"q": q, "limit": _PAGE})
        return [Model(data) async for data in each_item(self._transport, "/v1/models", params, "models")]

    async def remove(self, name: str) -> None:
        """Removes the version `name@version`. Raises ModelInUse while an unfinished job needs it."""
        name, _, version = name.partition("@")
        await self._transport.json(Request(method="DELETE", path=f"{_model_path(name)}/versions/{segment(version)}"))

    async def predict(
        self, name: str, data: "Data", **options: Unpack[OnlineOptions]
    ) -> "builtins.list[dict[str, Any]]":
        """Predicts synchronously, without a job, up to one chunk of records. One that could not be scored holds
        nulls."""
        answer = await self._transport.json(_online_request(name, "predict", data, options))
        return list(answer["prediction"])

    async def validate(self, name: str, data: "Data", **options: Unpack[ValidateOptions]) -> dict[str, Any]:
        """Whether a sample fits the model. Raises SchemaMismatch with every difference."""
        return dict(await self._transport.json(_online_request(name, "validate", data, options)) or {})


def _online_request(name: str, verb: str, data: "Data", options: Mapping[str, Any]) -> Request:
    return Request(method="POST", path=f"{_model_path(name)}/{verb}", params=query(options), content=content_of(data))


class Core:
    """The methods of a client."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self.jobs = AsyncJobs(transport)
        self.models = AsyncModels(transport)
        self.schedules = AsyncSchedules(transport)
        self.webhooks = AsyncWebhooks(transport)

    @property
    def url(self) -> str:
        return self._transport.url

    async def upload(
        self,
        data: "Data",
        *,
        direct: bool = False,
        on_upload: OnUpload | None = None,
        **options: Unpack[ReadOptions],
    ) -> AsyncJob:
        """Stores an input; `submit(job, model=...)` predicts it later.

        `direct`: sends it to the object store of the server, which then only verifies it. Raises
        DirectUploadUnsupported where the server stores in a folder, and ConnectionFailed where the store cannot be
        reached from here.
        """
        if direct:
            return await self._send_directly(data, options, on_upload)
        return await self._send("/v1/upload", data, options, on_upload)

    async def submit(
        self,
        data: "Data | JobView",
        model: str,
        *,
        direct: bool = False,
        on_upload: OnUpload | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> AsyncJob:
        """Starts a prediction and returns its job at once. `data`: what `content_of` takes, or an uploaded job.
        `direct`: as of `upload`. `idempotency_key`: a call with the key of an earlier one returns its job; raises
        IdempotencyMismatch if it had other data or options, and BadRequest for what is not 1 to 255 printable ASCII
        characters."""
        params = {"model": model, **options}
        if direct and idempotency_key is not None:
            raise ValueError("a direct upload takes no idempotency_key: pass its job, which is queued once")
        if direct and not isinstance(data, JobView):
            of_upload = {name: value for name, value in params.items() if name in _OF_UPLOAD}
            data = await self._send_directly(data, of_upload, on_upload)
            params = {name: value for name, value in params.items() if name not in ReadOptions.__annotations__}
        if isinstance(data, JobView):
            path = f"/v1/predict/{segment(data.id)}"
            request = Request(method="POST", path=path, params=query(params), idempotency_key=idempotency_key)
            return AsyncJob(self._transport, await self._transport.json(request))
        return await self._send("/v1/predict", data, params, on_upload, idempotency_key)

    async def submit_urls(
        self,
        urls: str | Sequence[str],
        model: str,
        *,
        output: str | None = None,
        overwrite: bool = False,
        archive: bool = False,
        input_file: bool = False,
        idempotency_key: str | None = None,
        **options: Unpack[LocatedOptions],
    ) -> AsyncJob:
        """Starts a prediction of inputs that the server reads where they are, and returns its job at once. `urls`:
        addresses or patterns, `file:///...` or `s3://...`. `output`: the address of the result, with `{stem}` one for
        each input; by default the server keeps it. `archive`: one for each input, in a ZIP. See docs/locations.md.
        `idempotency_key`: as of `submit`."""
        given = {"input_file": input_file, **options}
        body = elsewhere.of_urls(urls, model, output, given, overwrite=overwrite, archive=archive)
        return await self._create(body, idempotency_key)

    async def submit_query(
        self,
        query: str,
        model: str,
        *,
        connection: str,
        idempotency_key: str | None = None,
        **options: Unpack[LocatedOptions],
    ) -> AsyncJob:
        """Starts a prediction of the rows of a query in a database that an administrator has named `connection`, and
        returns its job at once. docs/tables.md explains it. `idempotency_key`: as of `submit`."""
        return await self._create(elsewhere.of_query(query, connection, model, options), idempotency_key)

    async def predict_uploaded(self, model: str, **options: Unpack[JobOptions]) -> Queued[AsyncJob]:
        """Queues all inputs that wait in state uploaded, but for those that were uploaded for another model."""
        params = query({"model": model, **options})
        answer = await self._transport.json(
            Request(method="POST", path="/v1/jobs/predict", params=params, patience=_COLLECTIVE)
        )
        jobs = [AsyncJob(self._transport, {"id": id, "state": "queued"}) for id in answer["jobs"]]
        return Queued(jobs, answer["completed"], answer["refused"])

    @overload
    async def predict(self, data: "Paths", model: str, **options: Unpack[PredictOptions]) -> Path: ...

    @overload
    async def predict(self, data: T, model: str, **options: Unpack[PredictOptions]) -> T: ...

    async def predict(
        self,
        data: Any,
        model: str,
        *,
        output: str | os.PathLike[str] | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - see `wait`
        progress: bool | None = None,
        direct: bool = False,
        **options: Unpack[JobOptions],
    ) -> Any:
        """Predicts and waits. Returns the type of its input: a DataFrame for a DataFrame (with its index), a structured
        array for an array, arrays for arrays, records for records, bytes for bytes; for a path or a list of paths, the
        path of the saved result (`output`, or `<name>.predictions.<suffix>` in that folder, or next to the data).

        Raises JobFailed, JobCancelled or WaitTimeout. Rows that could not be scored hold nulls, and a warning says so.
        """
        if output is not None and not is_folder(os.fspath(output)):
            require_other(os.fspath(output), paths_of(data))
            require_format(Path(output))
        table = table_of(data)
        if library_of(data) == "numpy":
            require_polars("an array, whose result is a structured one,")
            options.setdefault("format", "arrows")  # npy has no names for columns, and no text
        with Bars(progress) as bars:
            job = await self.submit(table or data, model, direct=direct, on_upload=bars.upload, **options)
            await job.wait(timeout, on_progress=bars.scoring)
            if failed := job.rows.get("failed"):
                warnings.warn(
                    f"{failed:,} of {job.rows['total']:,} rows could not be scored and hold nulls; "
                    f"jobs.get({job.id!r}).errors() gives the reasons",
                    stacklevel=2,
                )
            result = job.result()
            if (path := path_of(data)) is not None:
                target = beside(path, result.suffix)
                if output is not None:
                    target = placed(os.fspath(output), target.name)
                return await result.save(target, on_download=bars.download)
            if table is not None:
                frame = await result.to_polars()
                return table.restored(frame, await self._origins(job, frame.columns, table.names))
            return await _alike(data, result)

    async def _origins(self, job: AsyncJob, columns: Sequence[str], names: Sequence[str]) -> dict[str, str]:
        """The columns of a result that passed through, each with its name in the input."""
        options = job.data.get("options") or {}
        if options.get("format") not in _TYPED:
            return {}  # texts, of which some cannot have the types of the input again
        origins = origins_of(columns, names, options.get("passthrough", "unused"), options.get("key"))
        if origins and options.get("passthrough") == "unused" and job.model is not None:
            # One that the model takes does not travel, and one of the result may be called alike.
            given = (await self.models.get(job.model)).data["result_columns"]
            return {name: own for name, own in origins.items() if name != own or name not in given}
        return origins

    async def close(self) -> None:
        await self._transport.wire.close()

    async def _create(self, body: dict[str, Any], idempotency_key: str | None) -> AsyncJob:
        request = replace(_json_request("/v1/jobs", body), idempotency_key=idempotency_key)
        return AsyncJob(self._transport, await self._transport.json(request))

    async def _send(
        self,
        path: str,
        data: "Data",
        params: Mapping[str, Any],
        on_upload: OnUpload | None,
        idempotency_key: str | None = None,
    ) -> AsyncJob:
        content = content_of(data)
        request = Request(
            method="POST",
            path=path,
            params=query({**params, "filename": content.filename}),
            content=content,
            on_upload=on_upload,
            patience=60.0,
            idempotency_key=idempotency_key,
        )
        return AsyncJob(self._transport, await self._transport.json(request))

    async def _send_directly(self, data: "Data", params: Mapping[str, Any], on_upload: OnUpload | None) -> AsyncJob:
        with ExitStack() as files:
            content, sha256 = await self._transport.wire.call(functools.partial(with_digest, content_of(data), files))
            begun = await self._transport.json(_json_request("/v1/uploads", {"bytes": content.length}))
            try:
                parts = parts_of(content, begun, on_upload)
                while (part := await self._transport.wire.call(functools.partial(next, parts, None))) is not None:
                    await self._transport.put(*part)
                named = query({**params, "filename": content.filename})
                request = _json_request(begun["links"]["complete"], {"sha256": sha256}, named, _VERIFICATION)
                return AsyncJob(self._transport, await self._transport.json(request))
            except BatchserveError:
                with suppress(BatchserveError):  # otherwise it expires
                    await self._transport.json(Request(method="DELETE", path=begun["links"]["self"]))
                raise


def _json_request(path: str, body: Any, params: Mapping[str, Any] | None = None, patience: float = 0.0) -> Request:
    content = bytes_content(json.dumps(body).encode(), "application/json")
    return Request(method="POST", path=path, params=params or {}, content=content, patience=patience)


def _job_path(id: str) -> str:
    return f"/v1/jobs/{segment(id)}"


def _model_path(reference: str) -> str:
    return f"/v1/models/{segment(reference, safe='@')}"


async def _alike(data: Any, result: AsyncResult) -> Any:
    if library_of(data) == "numpy":
        return await result.to_numpy()
    if holds_arrays(data):
        return await result.to_arrays()
    if isinstance(data, bytes | bytearray | memoryview):
        return await result.read()
    return [row async for row in result.iter_rows()]
