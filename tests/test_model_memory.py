"""A model that needs much memory for each record is admitted with as few at a time as the limit allows."""

import sys
from collections.abc import Iterator

import numpy as np
import polars as pl
import pytest
from onnx import parser
from service import Api, problem, running

LIMIT = 700 * 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")


def hungry(mebibytes: int, shape: str = "N,4") -> bytes:
    """The sum of a record, by way of that many MiB for each record at a time."""
    values = mebibytes * 2**18 // 4
    return bytes(
        parser.parse_model(
            f"""<ir_version: 8, opset_import: ["":17]> hungry (float[{shape}] x) => (float[M,1] y) {{
            wide = Constant<value_ints=[1,{values}]>() many = Tile(x, wide) large = Identity(many) last = Exp(large)
            start = Constant<value_ints=[0]>() end = Constant<value_ints=[4]>() axis = Constant<value_ints=[1]>()
            few = Slice(last, start, end, axis) y = ReduceSum<keepdims=1>(few, axis) }}"""
        ).SerializeToString()
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("small"), process_memory=LIMIT, processes=1) as api:
        yield api


RECORDS = np.random.default_rng(0).standard_normal((20, 4), dtype=np.float32)
CSV = pl.DataFrame(RECORDS, schema=list("abcd")).write_csv()


@pytest.mark.parametrize(
    ("mebibytes", "mode", "most"),
    [
        pytest.param(24, "rows", 12, id="sixteen are too many"),
        pytest.param(110, "fixed", 1, id="three are too many", marks=pytest.mark.slow),
    ],
)
def test_records_are_scored_as_few_at_a_time_as_memory_allows(small: Api, mebibytes: int, mode: str, most: int) -> None:
    shown = small.register(f"hungry{mebibytes}", hungry(mebibytes))
    assert shown["mode"] == mode
    assert 1 <= shown["batch"] <= most
    notes = " ".join(shown["notes"])
    for part in (
        f"{LIMIT:,} bytes of BATCHSERVE_PROCESS_MEMORY",
        f"'many', takes {mebibytes * 2**20:,} bytes in a run",
    ):
        assert (part in notes) == (mode == "fixed")
    job = small.run(CSV, f"hungry{mebibytes}", format="parquet")
    assert (job["state"], job["rows"]["failed"]) == ("completed", 0), job
    got = pl.read_parquet(small.result(job).content)["y"].to_numpy()
    np.testing.assert_allclose(got, np.exp(RECORDS).sum(axis=1), rtol=1e-5)


def test_a_smaller_size_is_tried_where_the_graph_takes_any(small: Api) -> None:
    """It compares all pixels with all others: an image of 224 by 224, which is tried first, takes 30 GB."""
    graph = parser.parse_model(
        """<ir_version: 8, opset_import: ["":17]> g (float[N,3,T,T] x) => (float[N,1] y) {
        four = Constant<value_ints=[0,1,-1,1]>() column = Reshape(x, four) flat = Constant<value_ints=[0,1,1,-1]>()
        row = Reshape(x, flat) pairs = Mul(column, row) axes = Constant<value_ints=[2,3]>()
        sums = ReduceSum<keepdims=0>(pairs, axes) y = Neg(sums) }"""
    )
    entry = graph.metadata_props.add()
    entry.key, entry.value = "batchserve.image", "{}"
    shown = small.register("pairs", graph.SerializeToString())
    assert shown["mode"] == "rows"


@pytest.mark.parametrize("shape", ["N,4", "1,4"])
def test_a_model_that_needs_too_much_for_a_single_record_is_refused_with_limit_need_and_setting(
    small: Api, shape: str
) -> None:
    body = problem(small.http.put("/v1/models/greedy", content=hungry(1000, shape)), 422, "model-refused")
    assert f"more memory than the {LIMIT:,} bytes of BATCHSERVE_PROCESS_MEMORY" in body["detail"]
    assert "'many', takes 1,048,576,000 bytes in a run of a single record" in body["detail"]
