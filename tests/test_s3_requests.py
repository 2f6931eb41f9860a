"""How many requests and bytes the plan of an input in a bucket costs, and each of its chunks."""

import io
import random
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import polars as pl
import pytest
import seaweed
from proxy import Counted, Proxy
from service import decoded

from batchserve.domain import Chunk, ChunkLimits, Dialect
from batchserve.formats import get_format
from batchserve.formats.protocol import Part
from batchserve.scoring import inputs
from batchserve.scoring.assembly import AssembleTask, assemble_result
from batchserve.scoring.inputs import Input
from batchserve.scoring.planning import PlanTask, plan_chunks
from batchserve.storage import open_storage, part_key

pytestmark = pytest.mark.s3

MB = 2**20
RECORDS = 400_000


@pytest.fixture
def proxy(s3_server: seaweed.Server, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:  # noqa: ARG001
    with closing(Proxy(s3_server.port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@cache
def table() -> pl.DataFrame:
    chance = np.random.default_rng(1)
    return pl.DataFrame({f"c{number}": chance.normal(size=RECORDS).astype(np.float32) for number in range(10)})


def parquet(rows: int) -> bytes:
    file = io.BytesIO()
    table().write_parquet(file, row_group_size=rows)
    return file.getvalue()


def arrow() -> bytes:
    file = io.BytesIO()
    table().write_ipc(file, record_batch_size=50_000)
    return file.getvalue()


def csv() -> bytes:
    file = io.BytesIO()
    table().write_csv(file, float_precision=4)
    return file.getvalue()


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(table().to_numpy()))
    return file.getvalue()


def images() -> bytes:
    chance, file = random.Random(2), io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        for number in range(1000):
            members.writestr(f"{number:04d}.jpg", chance.randbytes(5500))
    return file.getvalue()


@dataclass(frozen=True)
class Case:
    data: bytes
    format: str
    limits: ChunkLimits
    columns: tuple[str, ...] | None
    plan: int
    """Most requests of the plan."""
    share: float
    """Most bytes of all chunks, as a share of the file's."""
    each: float
    """Most requests of a chunk, on average."""


CASES = {
    "parquet": lambda: Case(parquet(50_000), "parquet", ChunkLimits(bytes=4 * MB), None, 2, 1.1, 1.1),
    "two columns": lambda: Case(parquet(50_000), "parquet", ChunkLimits(bytes=4 * MB), ("c1", "c5"), 2, 0.25, 4.1),
    "one row group": lambda: Case(parquet(RECORDS), "parquet", ChunkLimits(bytes=4 * MB), None, 2, 1.1, 1.1),
    "arrow": lambda: Case(arrow(), "arrow", ChunkLimits(bytes=4 * MB), None, 10, 1.3, 5.1),
    "csv": lambda: Case(csv(), "csv", ChunkLimits(bytes=6 * MB), None, 9, 1.2, 1.5),
    "npy": lambda: Case(npy(), "npy", ChunkLimits(bytes=4 * MB), None, 1, 1.2, 1.5),
    "images": lambda: Case(images(), "zip", ChunkLimits(records=250), None, 2, 1.2, 2.1),
}


@pytest.mark.parametrize("name", CASES)
def test_plan_and_chunks_fetch_what_they_need_in_few_requests(proxy: Proxy, s3_address: str, name: str) -> None:
    case = CASES[name]()
    for key in ("inputs/planned", "inputs/read"):  # the same, as if by other processes
        open_storage(s3_address).compose(key, [case.data])
    inputs.storage_at.cache_clear()
    source = Input(s3_address, "inputs/planned", case.format, Dialect())
    with proxy.counted() as planned:
        chunks = plan_chunks(PlanTask(source, None, case.limits, 1000)).chunks
    assert len(chunks) >= 3
    assert len(planned.requests) <= case.plan
    inputs.storage_at.cache_clear()
    source = replace(source, key="inputs/read")
    read = [_read(proxy, source, chunk, case.columns) for chunk in chunks]
    requests = [len(counted.requests) for counted in read]
    # The first one of a process opens the input, and reads what all of them need.
    assert sum(requests[1:]) / len(requests[1:]) <= case.each, requests
    assert requests[0] <= 8
    assert sum(counted.sent for counted in read) <= case.share * len(case.data) + 2 * MB


def _read(proxy: Proxy, source: Input, chunk: Chunk, columns: tuple[str, ...] | None) -> Counted:
    with proxy.counted() as counted, source.open() as file:
        source.reader.read(file, chunk, {}, columns)
    return counted


@pytest.mark.parametrize("format", ["parquet", "csv", "arrow", "jsonl"])
def test_a_result_takes_one_request_for_each_of_its_small_parts(proxy: Proxy, s3_address: str, format: str) -> None:
    rows = 20_000
    frames = [table()[start : start + rows] for start in range(0, RECORDS, rows)]
    whole, parts = get_format(format), []
    for number, frame in enumerate(frames):
        key, content = part_key("job", number * rows, 1), whole.write(frame)
        open_storage(s3_address).compose(key, [content])
        parts.append(Part(key, len(content), rows))
    assert all(part.bytes < 4 * MB for part in parts)
    inputs.storage_at.cache_clear()
    with proxy.counted() as counted:
        result = assemble_result(AssembleTask(s3_address, "job", 1, format, Dialect(), tuple(parts), ()))
    gets = sum(request.startswith("GET") for request in counted.requests)
    assert len(frames) <= gets <= len(frames) + 2
    with open_storage(s3_address).open(result.key) as source:
        assert decoded(source.read(), format).cast(pl.Float32).equals(pl.concat(frames))
