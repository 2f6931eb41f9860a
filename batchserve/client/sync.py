"""The blocking client: every method runs its counterpart in `core` to completion."""

import builtins
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

import httpx2

from batchserve.client.aio import settings_of
from batchserve.client.core import (
    AsyncJob,
    AsyncJobs,
    AsyncModels,
    Core,
)
from batchserve.client.errors import FilesFailed, JobError
from batchserve.client.lists import JobFilters
from batchserve.client.many import FilesReport, Inputs, predict_files
from batchserve.client.options import (
    FilesOptions,
    JobOptions,
    LocatedOptions,
    OnlineOptions,
    PredictOptions,
    ReadOptions,
    ValidateOptions,
)
from batchserve.client.quotas import AsyncQuotas, Quotas
from batchserve.client.results import AsyncResult
from batchserve.client.schedules import Schedules
from batchserve.client.transport import BlockingWire, OnUpload, Transport, each_now, now
from batchserve.client.views import JobView, Model, Queued
from batchserve.client.webhooks import Webhooks

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import polars as pl
    import pyarrow as pa

    from batchserve.client.data import Data, Paths

T = TypeVar("T")


class Result:
    """The result of a job. Downloaded on demand."""

    def __init__(self, twin: AsyncResult) -> None:
        self._twin = twin

    def iter_bytes(self, *, format: str | None = None) -> Iterator[bytes]:
        """The bytes as they come, at most some MiB at a time."""
        return each_now(self._twin.iter_bytes(format=format))

    def iter_rows(self) -> Iterator[dict[str, Any]]:
        """One mapping per record, in input order, without holding the result in memory."""
        return each_now(self._twin.iter_rows())

    def read(self, *, format: str | None = None) -> bytes:
        """The whole result."""
        return now(self._twin.read(format=format))

    def save(
        self, path: str | os.PathLike[str] = ".", *, on_download: Callable[[int, int | None], None] | None = None
    ) -> Path:
        """Writes the result to `path`, in the format of its suffix; or into a folder, as
        `<input>.predictions.<suffix>`. The file appears when it is complete."""
        return now(self._twin.save(path, on_download=on_download))

    def iter_frames(self) -> "Iterator[pl.DataFrame]":
        """The records in order, some thousands at a time as frames of polars, without holding the result in memory."""
        return each_now(self._twin.iter_frames())

    def to_polars(self) -> "pl.DataFrame":
        return now(self._twin.to_polars())

    def to_pandas(self) -> "pd.DataFrame":
        return now(self._twin.to_pandas())

    def to_arrow(self) -> "pa.Table":
        """A table of pyarrow, which must be installed."""
        return now(self._twin.to_arrow())

    def to_numpy(self) -> "np.ndarray[Any, Any]":
        """A structured array [rows] with a field for each column; the result of an npy job as it is."""
        return now(self._twin.to_numpy())

    def to_arrays(self) -> dict[str, "np.ndarray[Any, Any]"]:
        """The result of an npz job: one array for each output of the model, under its name."""
        return now(self._twin.to_arrays())

    def _repr_html_(self) -> str:
        return self._twin._repr_html_()

    @property
    def suffix(self) -> str:
        """The suffix of a file with this result, with the dot."""
        return self._twin.suffix


class Job(JobView):
    """A job on the server. Its properties hold the last response; `refresh` updates them."""

    def __init__(self, twin: AsyncJob) -> None:
        super().__init__({})
        self._twin = twin

    @property
    def data(self) -> dict[str, Any]:
        return self._twin.data

    def refresh(self) -> Self:
        now(self._twin.refresh())
        return self

    def wait(self, timeout: float | None = None, *, on_progress: Callable[[JobView], None] | None = None) -> Self:
        """Returns when the job is completed. `on_progress` is called a few times a second, and once at least.

        Raises JobFailed, JobCancelled, or WaitTimeout after `timeout` seconds; the job goes on then.
        """
        _settled(self._twin.wait(timeout, on_progress=on_progress))
        return self

    def cancel(self) -> Self:
        """Requests cancellation. Finished chunks stay; the state follows within seconds."""
        now(self._twin.cancel())
        return self

    def retry(self) -> Self:
        """Resumes the unfinished chunks of a failed or cancelled job."""
        now(self._twin.retry())
        return self

    def retry_failed_rows(self) -> "Job":
        """A new job that scores the failed records of this completed one again; its result is the merged one."""
        return Job(now(self._twin.retry_failed_rows()))

    def errors(self) -> list[dict[str, Any]]:
        """The records that could not be scored so far: number (from 0), column, code and message of each."""
        return now(self._twin.errors())

    def save_errors(self, path: str | os.PathLike[str]) -> Path:
        """Writes the same as lines of JSON. The file appears when it is complete."""
        return now(self._twin.save_errors(path))

    def delete(self) -> None:
        """Removes the job with its input and result."""
        now(self._twin.delete())

    def result(self, format: str | None = None, *, partial: bool = False) -> Result:
        """The result, by default in the format of the job. `partial`: the rows finished so far."""
        return Result(self._twin.result(format, partial=partial))


class Jobs:
    """The jobs of the server, as `client.jobs`."""

    def __init__(self, twin: AsyncJobs) -> None:
        self._twin = twin

    def get(self, id: str) -> Job:
        return Job(now(self._twin.get(id)))

    def delete(self, id: str) -> None:
        """Removes a job with its input and result, even if it cannot be shown any more."""
        now(self._twin.delete(id))

    def list(self, *, sort: str | None = None, order: str | None = None, **wanted: Unpack[JobFilters]) -> Iterator[Job]:
        """All matching jobs, the latest first; further pages are fetched on demand. By the time at which they finished,
        `sort="finished"`, only jobs that have."""
        return map(Job, each_now(self._twin.list(sort=sort, order=order, **wanted)))

    def count(self, **wanted: Unpack[JobFilters]) -> int:
        """The number of matching jobs."""
        return now(self._twin.count(**wanted))


class Models:
    """The models of the server, as `client.models`."""

    def __init__(self, twin: AsyncModels) -> None:
        self._twin = twin

    def add(self, model: Any, sample: Any = None, *, name: str, on_upload: OnUpload | None = None) -> Model:
        """Registers a model as the newest version of `name`. Equal bytes return the existing version.

        `model`: the path or the bytes of an ONNX file or a zip bundle, a ModelProto, a Conversion; or a fitted
        estimator or the path of its pickle, which is converted here and takes its `sample`, as `convert` does.
        """
        return now(self._twin.add(model, sample, name=name, on_upload=on_upload))

    def get(self, name: str) -> Model:
        """The newest version of `name`, or exactly `name@version`."""
        return now(self._twin.get(name))

    def list(self, *, q: str | None = None) -> "builtins.list[Model]":
        """The newest version of every model, or of those with `q` in their names."""
        return now(self._twin.list(q=q))

    def remove(self, name: str) -> None:
        """Removes the version `name@version`. Raises ModelInUse while an unfinished job needs it."""
        now(self._twin.remove(name))

    def predict(self, name: str, data: "Data", **options: Unpack[OnlineOptions]) -> "builtins.list[dict[str, Any]]":
        """Predicts synchronously, without a job, up to one chunk of records. One that could not be scored holds
        nulls."""
        return now(self._twin.predict(name, data, **options))

    def validate(self, name: str, data: "Data", **options: Unpack[ValidateOptions]) -> dict[str, Any]:
        """Whether a sample fits the model. Raises SchemaMismatch with every difference."""
        return now(self._twin.validate(name, data, **options))


class Client:
    """A client of a batchserve server.

    `url` and `api_key` default to BATCHSERVE_URL (else http://127.0.0.1:8000) and BATCHSERVE_API_KEY. Transient
    failures are retried up to `max_retries` times; `timeout` is in seconds for each read, write and connect.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        max_retries: int = 2,
        timeout: float = 60.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        url, headers = settings_of(url, api_key)
        wire = BlockingWire(httpx2.Client(headers=headers, transport=transport))
        self._transport = Transport(wire, url, max_retries=max_retries, timeout=timeout)
        self._twin = Core(self._transport)
        self.jobs = Jobs(self._twin.jobs)
        self.models = Models(self._twin.models)
        self.schedules = Schedules(self._twin.schedules)
        self.webhooks = Webhooks(self._twin.webhooks)
        self.quotas = Quotas(AsyncQuotas(self._transport))

    @property
    def url(self) -> str:
        return self._twin.url

    def upload(
        self,
        data: "Data",
        *,
        direct: bool = False,
        on_upload: OnUpload | None = None,
        **options: Unpack[ReadOptions],
    ) -> Job:
        """Stores an input; `submit(job, model=...)` predicts it later.

        `direct`: sends it to the object store of the server, which then only verifies it. Raises
        DirectUploadUnsupported where the server stores in a folder, and ConnectionFailed where the store cannot be
        reached from here.
        """
        return Job(now(self._twin.upload(data, direct=direct, on_upload=on_upload, **options)))

    def submit(
        self,
        data: "Data | JobView",
        model: str,
        *,
        direct: bool = False,
        on_upload: OnUpload | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[JobOptions],
    ) -> Job:
        """Starts a prediction and returns its job at once. `data`: what `predict` takes, or an uploaded job. `direct`:
        as of `upload`. `idempotency_key`: a call with the key of an earlier one returns its job; raises
        IdempotencyMismatch if it had other data or options, and BadRequest for what is not 1 to 255 printable ASCII
        characters."""
        return Job(
            now(
                self._twin.submit(
                    data, model, direct=direct, on_upload=on_upload, idempotency_key=idempotency_key, **options
                )
            )
        )

    def submit_urls(
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
    ) -> Job:
        """Starts a prediction of inputs that the server reads where they are, and returns its job at once. `urls`:
        addresses or patterns, `file:///...` or `s3://...`. `output`: the address of the result, with `{stem}` one for
        each input; by default the server keeps it. `archive`: one for each input, in a ZIP. See docs/locations.md.
        `idempotency_key`: as of `submit`."""
        return Job(
            now(
                self._twin.submit_urls(
                    urls,
                    model,
                    output=output,
                    overwrite=overwrite,
                    archive=archive,
                    input_file=input_file,
                    idempotency_key=idempotency_key,
                    **options,
                )
            )
        )

    def submit_query(
        self,
        query: str,
        model: str,
        *,
        connection: str,
        idempotency_key: str | None = None,
        **options: Unpack[LocatedOptions],
    ) -> Job:
        """Starts a prediction of the rows of a query in a database that an administrator has named `connection`, and
        returns its job at once. docs/tables.md explains it. `idempotency_key`: as of `submit`."""
        twin = self._twin.submit_query(query, model, connection=connection, idempotency_key=idempotency_key, **options)
        return Job(now(twin))

    def predict_uploaded(self, model: str, **options: Unpack[JobOptions]) -> Queued[Job]:
        """Queues all inputs that wait in state uploaded, but for those that were uploaded for another model."""
        queued = now(self._twin.predict_uploaded(model, **options))
        return Queued([Job(job) for job in queued.jobs], queued.completed, queued.refused)

    @overload
    def predict(self, data: "Paths", model: str, **options: Unpack[PredictOptions]) -> Path: ...

    @overload
    def predict(self, data: T, model: str, **options: Unpack[PredictOptions]) -> T: ...

    def predict(self, data: Any, model: str, **options: Unpack[PredictOptions]) -> Any:
        """Predicts and waits. Returns the type of its input: a DataFrame for a DataFrame (with its index), a structured
        array for an array, arrays for arrays, records for records, bytes for bytes; for a path or a list of paths, the
        path of the saved result (`output`, or `<name>.predictions.<suffix>` in that folder, or next to the data).

        Raises JobFailed, JobCancelled or WaitTimeout. Rows that could not be scored hold nulls, and a warning says so.
        """
        return _settled(self._twin.predict(data, model, **options))

    def predict_files(
        self, paths: Inputs, model: str, output: str | os.PathLike[str], **options: Unpack[FilesOptions]
    ) -> FilesReport:
        """Predicts many files, each as one job, into a folder: `<name>.predictions.<suffix>` for each, and
        `<name>.errors.jsonl` for its failed records. `paths`: files, and folders, of which all tables are taken.

        A call continues where an earlier one ended, for whatever reason: a file is sent and scored again only if it has
        changed, or the model, the options or its result have. Raises FilesFailed, with a report, when some failed and
        all others are done.
        """
        try:
            return now(predict_files(self._transport, paths, model, output, options))
        except FilesFailed as error:
            for file in error.report.failed:
                _settle(file.error)
            raise

    def close(self) -> None:
        now(self._twin.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _settled(waiting: Coroutine[Any, Any, T]) -> T:
    """The value of `waiting`; the job of an error becomes one with blocking methods."""
    try:
        return now(waiting)
    except JobError as error:
        _settle(error)
        raise


def _settle(error: Exception | None) -> None:
    if isinstance(error, JobError) and isinstance(error.job, AsyncJob):
        error.extra["job"] = Job(error.job)
