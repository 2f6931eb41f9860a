"""What an input in a bucket costs: the requests and bytes of its plan and of each chunk, counted by a proxy in front of
an S3 server. They do not depend on the machine."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import numpy as np
import polars as pl

from batchserve.domain import Chunk, ChunkLimits, Dialect
from batchserve.scoring import inputs
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import PlanTask, plan_chunks
from batchserve.storage import open_storage
from benchmarks.environments import Unavailable
from benchmarks.paths import Bench
from benchmarks.results import MB, Measurement

TITLE = "S3"
RECORDS = 1_000_000
SPEED = 1_000
"""Records per second of the model: so slow that it does not limit the chunks."""
_SERVER = Path(__file__).resolve().parent.parent / "tests" / "seaweed.py"
_CHUNK = ChunkLimits(bytes=4 * 2**20)


@dataclass(frozen=True, slots=True)
class Count:
    """What has passed a proxy: all requests so far, and the bytes of their answers."""

    requests: int
    bytes: int

    def since(self, before: "Count") -> "Count":
        return Count(self.requests - before.requests, self.bytes - before.bytes)


@dataclass(frozen=True, slots=True)
class Case:
    """An input, and how it is read."""

    title: str
    make: Callable[[pl.DataFrame], bytes]
    format: str
    plan: int
    """Most requests of the plan."""
    each: float
    """Most requests of a chunk, on average, after the first one of a process."""
    limits: ChunkLimits = _CHUNK
    columns: tuple[str, ...] | None = None
    taken: float = 1.0
    """The share of its bytes that the chunks take."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What was fetched for the plan, and by one process for each chunk."""

    plan: Count
    chunks: list[Count]

    @property
    def each(self) -> float:
        """Requests of a chunk after the first one, which opens the input and reads what all of them need."""
        return sum(count.requests for count in self.chunks[1:]) / len(self.chunks[1:])

    @property
    def bytes(self) -> int:
        """Of all chunks."""
        return sum(count.bytes for count in self.chunks)


def table(records: int) -> pl.DataFrame:
    chance = np.random.default_rng(1)
    return pl.DataFrame({f"c{number}": chance.normal(size=records).astype(np.float32) for number in range(10)})


def fetched(address: str, case: Case, data: bytes, count: Callable[[], Count]) -> Fetched:
    """Plans an input and reads its chunks, as two processes would."""
    for key in ("inputs/planned", "inputs/read"):  # the same: a plan leaves nothing to the reader
        open_storage(address).compose(key, [data])
    inputs.storage_at.cache_clear()
    before = count()
    planned = Input(address, "inputs/planned", case.format, Dialect())
    chunks = plan_chunks(PlanTask(planned, None, case.limits, SPEED)).chunks
    plan = count().since(before)
    inputs.storage_at.cache_clear()
    source = Input(address, "inputs/read", case.format, Dialect())
    return Fetched(plan, [_read(source, chunk, case, count) for chunk in chunks])


def _read(source: Input, chunk: Chunk, case: Case, count: Callable[[], Count]) -> Count:
    before = count()
    with source.open() as file:
        source.reader.read(file, chunk, {}, case.columns)
    return count().since(before)


def measure(bench: Bench) -> Iterator[Measurement]:
    """Raises Unavailable."""
    frame = table(RECORDS)
    with bucket() as (address, count):
        for number, case in enumerate(CASES):
            data = case.make(frame)
            name = f"{TITLE}, {case.title}, {len(data) / MB:.0f} MB"
            bench.say(name)
            found = fetched(f"{address}/{number}", case, data, count)
            needed = case.taken * len(data)
            yield Measurement(f"{name}: requests of the plan / {case.plan}", found.plan.requests, case.plan, "requests")
            yield Measurement(f"{name}: requests of a chunk / {case.each}", found.each, case.each, "requests")
            yield Measurement(f"{name}: bytes of all chunks / those taken", found.bytes / MB, needed / MB, "MB")


@contextmanager
def bucket() -> Iterator[tuple[str, Callable[[], Count]]]:
    """The address of a storage without objects, and what has passed the proxy in front of it. Raises Unavailable."""
    if find_spec("obstore") is None:
        raise Unavailable("the extra s3 is not installed")
    with subprocess.Popen(
        [sys.executable, str(_SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        requests, answers = server.stdin, server.stdout

        def count() -> Count:
            requests.write("\n")
            requests.flush()
            return Count(**json.loads(answers.readline()))

        try:
            if not (began := answers.readline()):
                raise Unavailable("no S3 server starts here")
            address, environment = json.loads(began)
            with patch.dict(os.environ, environment):
                yield address, count
        finally:
            requests.close()  # by which it ends


def _parquet(rows: int) -> Callable[[pl.DataFrame], bytes]:
    """In row groups of so many rows."""

    def write(frame: pl.DataFrame) -> bytes:
        file = io.BytesIO()
        frame.write_parquet(file, row_group_size=rows)
        return file.getvalue()

    return write


def _arrow(frame: pl.DataFrame) -> bytes:
    file = io.BytesIO()
    frame.write_ipc(file, record_batch_size=100_000)
    return file.getvalue()


def _csv(frame: pl.DataFrame) -> bytes:
    return frame.write_csv(float_precision=4).encode()


def _ndjson(frame: pl.DataFrame) -> bytes:
    return frame.select("c0", "c1").write_ndjson().encode()


def _npy(frame: pl.DataFrame) -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(frame.to_numpy()))
    return file.getvalue()


def _images(_: pl.DataFrame) -> bytes:
    chance, file = np.random.default_rng(2), io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for number in range(1000):
            members.writestr(f"{number:04d}.jpg", chance.bytes(5500))
    return file.getvalue()


CASES = (
    Case("Parquet, a row group for each chunk", _parquet(100_000), "parquet", 2, 1.1),
    Case("Parquet, 2 of 10 columns", _parquet(100_000), "parquet", 2, 2.1, columns=("c1", "c5"), taken=0.2),
    Case("Parquet, one row group", _parquet(2**30), "parquet", 2, 1.1),
    Case("Arrow", _arrow, "arrow", 12, 2.1),
    Case("CSV", _csv, "csv", 20, 1.9, ChunkLimits(bytes=6 * 2**20)),
    Case("NDJSON of 2 columns", _ndjson, "jsonl", 20, 1.9, ChunkLimits(bytes=6 * 2**20)),
    Case("npy", _npy, "npy", 1, 1.5),
    Case("images", _images, "zip", 2, 2.1, ChunkLimits(records=250)),
)
