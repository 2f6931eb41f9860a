"""How many requests and bytes the plan of an input in a bucket costs, and each of its chunks."""

from collections.abc import Iterator
from contextlib import closing

import polars as pl
import pytest
import seaweed
from proxy import Proxy
from service import decoded

from batchserve.domain import Dialect
from batchserve.formats import get_format
from batchserve.formats.protocol import Part
from batchserve.scoring import inputs
from batchserve.scoring.assembly import AssembleTask, assemble_result
from batchserve.storage import open_storage, part_key
from benchmarks import buckets
from benchmarks.buckets import Case, Count

pytestmark = pytest.mark.s3

MB = 2**20
RECORDS = 400_000


@pytest.fixture
def proxy(s3_server: seaweed.Server, s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:  # noqa: ARG001
    with closing(Proxy(s3_server.port)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.mark.parametrize("case", buckets.CASES, ids=lambda case: case.title)
def test_plan_and_chunks_fetch_what_they_need_in_few_requests(proxy: Proxy, s3_address: str, case: Case) -> None:
    data = case.make(buckets.table(RECORDS))
    found = buckets.fetched(s3_address, case, data, lambda: Count(len(proxy.requests), proxy.sent))
    assert len(found.chunks) >= 3
    assert found.plan.requests <= case.plan
    assert found.each <= case.each, found.chunks
    assert found.chunks[0].requests <= 8
    assert found.bytes <= 1.2 * case.taken * len(data) + 2 * MB


@pytest.mark.parametrize("format", ["parquet", "csv", "arrow", "jsonl"])
def test_a_result_takes_one_request_for_each_of_its_small_parts(proxy: Proxy, s3_address: str, format: str) -> None:
    rows, frame = 20_000, buckets.table(RECORDS)
    frames = [frame[start : start + rows] for start in range(0, RECORDS, rows)]
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
