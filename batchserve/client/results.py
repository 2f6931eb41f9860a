"""Results: downloaded as bytes, into a file, or as a table, when they are asked for."""

import json
import os
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchserve.client.data import arrays_of, arrow_of, format_of, numpy_of, pandas_of, polars_of, require_format
from batchserve.client.extras import require_polars
from batchserve.client.ipc import frames_of
from batchserve.client.names import partial_name, placed, result_name, safe_name, stem_of
from batchserve.client.notebook import facts_html
from batchserve.client.transport import Request, Transport, query, segment
from batchserve.client.views import JobView
from batchserve.client.writing import write_whole

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import polars as pl
    import pyarrow as pa


class AsyncResult:
    """The result of a job. Downloaded on demand."""

    def __init__(self, transport: Transport, job: JobView, *, format: str | None, partial: bool) -> None:
        self._transport = transport
        self._job = job
        self._format = format
        self._partial = partial

    async def iter_bytes(self, *, format: str | None = None) -> AsyncGenerator[bytes]:
        """The bytes as they come, at most some MiB at a time."""
        params = {"format": format or self._format, "partial": True if self._partial else None}
        request = Request(
            method="GET", path=f"/v1/download/{segment(self._job.id)}", params=query(params), headers={"Accept": "*/*"}
        )
        async for block in self._transport.download(request):
            yield block

    async def iter_rows(self) -> AsyncGenerator[dict[str, Any]]:
        """One mapping per record, in input order, without holding the result in memory."""
        rest = b""
        async for block in self.iter_bytes(format="jsonl"):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield json.loads(line)
        if rest.strip():
            yield json.loads(rest)

    async def read(self, *, format: str | None = None) -> bytes:
        """The whole result."""
        return b"".join([block async for block in self.iter_bytes(format=format)])

    async def save(
        self, path: str | os.PathLike[str] = ".", *, on_download: Callable[[int, int | None], None] | None = None
    ) -> Path:
        """Writes the result to `path`, in the format of its suffix; or into a folder, as
        `<input>.predictions.<suffix>`. The file appears when it is complete."""
        target = placed(os.fspath(path), self._name)
        if not (self._job.data.get("options") or {}).get("archive"):
            require_format(target)
        format = self._format or format_of(target)
        stored = self._job.data.get("result") or {}
        total = stored.get("bytes") if format in (None, self._stored_format) else None
        report = None if on_download is None else lambda done: on_download(done, total)
        await write_whole(self._transport.wire, target, self.iter_bytes(format=format), report)
        return target

    async def iter_frames(self) -> "AsyncGenerator[pl.DataFrame]":
        """The records in order, some thousands at a time as frames of polars, without holding the result in memory."""
        require_polars("a result as a table")
        if self._own_format == "arrow":
            yield polars_of(await self.read(format="arrow"))
            return
        async for frame in frames_of(self.iter_bytes(format="arrows")):
            yield frame

    async def to_polars(self) -> "pl.DataFrame":
        require_polars("a result as a table")
        import polars as pl

        return pl.concat([frame async for frame in self.iter_frames()], rechunk=False)

    async def to_pandas(self) -> "pd.DataFrame":
        return pandas_of(await self.to_polars())

    async def to_arrow(self) -> "pa.Table":
        """A table of pyarrow, which must be installed."""
        return arrow_of(await self.to_polars())

    async def to_numpy(self) -> "np.ndarray[Any, Any]":
        """A structured array [rows] with a field for each column; the result of an npy job as it is."""
        if self._stored_format == "npy":
            return numpy_of(await self.read(format="npy"))
        return (await self.to_polars()).to_numpy(structured=True)

    async def to_arrays(self) -> dict[str, "np.ndarray[Any, Any]"]:
        """The result of an npz job: one array for each output of the model, under its name."""
        return arrays_of(await self.read(format="npz"))

    def _repr_html_(self) -> str:
        stored, rows = self._job.data.get("result") or {}, self._job.rows
        size = f"{stored['bytes']:,}" if stored.get("bytes") is not None else None
        facts = {"rows": rows.get("total"), "failed": rows.get("failed"), "format": self._own_format, "bytes": size}
        return facts_html(f"Result of job {self._job.id}", facts)

    @property
    def suffix(self) -> str:
        """The suffix of a file with this result, with the dot."""
        return f".{self._own_format or 'bin'}"

    @property
    def _name(self) -> str:
        """Of its file in a folder: after the input, or after the job where that has no name or there are several."""
        given = self._job.data.get("input") or {}
        name = safe_name(given.get("filename")) if given.get("files", 1) == 1 else None
        if name is None:
            return f"{self._job.id}{'-partial' if self._partial else ''}{self.suffix}"
        return (partial_name if self._partial else result_name)(name, self.suffix)

    @property
    def _own_format(self) -> str | None:
        """In which the job writes it, also while it is not completed."""
        return self._format or self._stored_format or (self._job.data.get("options") or {}).get("format")

    @property
    def _stored_format(self) -> str | None:
        return (self._job.data.get("result") or {}).get("format")


def beside(path: Path, suffix: str) -> Path:
    """Default path for the result of a file or of a folder of images: `<name>.predictions<suffix>` next to it."""
    path = path if path.name else path.resolve()  # `.` and `..` have no name
    return path.with_name(f"{path.name if path.is_dir() else stem_of(path.name)}.predictions{suffix}")
