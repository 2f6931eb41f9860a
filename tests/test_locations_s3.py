"""Jobs over objects that are read in a bucket, and results that are written there."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from service import Api, encoded, ok, problem, running
from test_locations import flowers

from batchserve.domain import Target
from batchserve.errors import TargetExists
from batchserve.scoring.targets import write_object
from batchserve.storage import Storage, open_storage

pytestmark = [pytest.mark.s3, pytest.mark.timeout(180)]


@pytest.fixture
def bucket(s3_address: str) -> Storage:
    """The whole bucket, with the prefix of this test below it."""
    return open_storage(s3_address)


@pytest.fixture
def api(tmp_path: Path, bucket: Storage, iris_onnx: Path) -> Iterator[Api]:
    allowed: dict[str, Any] = {
        "input_prefixes": {"*": [f"{bucket.address}/in/"]},
        "output_prefixes": {"*": [f"{bucket.address}/out/"]},
    }
    with running(tmp_path / "store", **allowed) as api:
        api.register("iris", iris_onnx)
        yield api


def put(bucket: Storage, key: str, content: bytes) -> None:
    with bucket.create(key) as writer:
        writer.write(content)
        writer.commit()


def fill(bucket: Storage, format: str, files: int) -> pl.DataFrame:
    frames = [flowers(30 + number, number) for number in range(files)]
    for number, frame in enumerate(frames):
        put(bucket, f"in/{number:02}.{format}", encoded(frame, format))
    return pl.concat(frames)


def asked(bucket: Storage, pattern: str, **more: Any) -> dict[str, Any]:
    return {"input": {"urls": [f"{bucket.address}/in/{pattern}"]}, "model": "iris", **more}


def completed(api: Api, request: dict[str, Any]) -> dict[str, Any]:
    job = api.finished(ok(api.http.post("/v1/jobs", json=request), 202)["id"])
    assert job["state"] == "completed", job["error"]
    return job


@pytest.mark.parametrize("format", ["parquet", "csv", "jsonl"])
def test_a_job_over_objects_has_the_rows_of_one_over_their_concatenation(
    api: Api, bucket: Storage, format: str
) -> None:
    every = fill(bucket, format, 6)
    put(bucket, "in/deeper/x.csv", b"not read")
    job = completed(api, asked(bucket, f"*.{format}"))
    whole = api.run(encoded(every, format), "iris")
    assert job["input"]["files"] == 6
    if format == "parquet":  # which has a row group for each chunk
        results = [pl.read_parquet(io.BytesIO(api.result(one).content)) for one in (job, whole)]
        assert results[0].equals(results[1])
    else:
        assert api.result(job).content == api.result(whole).content


def test_an_object_that_changes_after_its_job_is_queued_fails_it_by_name(
    tmp_path: Path, bucket: Storage, iris_onnx: Path
) -> None:
    fill(bucket, "csv", 3)
    allowed: dict[str, Any] = {"input_prefixes": {"*": [f"{bucket.address}/in/"]}}
    with running(tmp_path / "store", worker=False, **allowed) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/jobs", json=asked(bucket, "*")), 202)
    put(bucket, "in/01.csv", encoded(flowers(31, 7), "csv"))
    with running(tmp_path / "store", **allowed) as api:
        ended = api.finished(job["id"])
        assert (ended["state"], ended["error"]["code"]) == ("failed", "input-changed")
        assert f"{bucket.address}/in/01.csv" in ended["error"]["message"]
        again = completed(api, asked(bucket, "*"))
        plants = pl.read_csv(io.BytesIO(api.result(again).content))["plant"].to_list()
        assert plants[30:32] == ["7-0", "7-1"]


def test_results_are_written_to_the_bucket_one_for_each_input(api: Api, bucket: Storage) -> None:
    fill(bucket, "csv", 3)
    output = {"url": f"{bucket.address}/out/{{date}}/{{stem}}.csv"}
    job = completed(api, asked(bucket, "*", output=output))
    written = [entry.key for entry in bucket.list("out/")]
    assert [key.rpartition("/")[2] for key in written] == ["00.csv", "01.csv", "02.csv"]
    assert re.fullmatch(r"out/\d{4}-\d\d-\d\d/00\.csv", written[0])
    with bucket.open(written[1]) as result:
        assert pl.read_csv(result.read()).height == 31
    problem(api.http.post("/v1/jobs", json=asked(bucket, "*", output=output)), 409, "target-exists")
    assert api.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
    assert [entry.key for entry in bucket.list("out/")] == written


@pytest.mark.parametrize("size", [4, 20 * 2**20])
def test_of_two_results_for_one_address_that_are_written_at_once_one_is_refused(bucket: Storage, size: int) -> None:
    """Also where it is sent in parts."""
    url, root = f"{bucket.address}/out/x.csv", f"{bucket.address}/out/"

    def interrupted(others: bytes) -> Iterator[bytes]:
        yield bytes(size)
        write_object(Target(url, root), url, [others])

    with pytest.raises(TargetExists, match=r"x\.csv exists"):
        write_object(Target(url, root), url, interrupted(b"theirs"))
    with bucket.open("out/x.csv") as result:
        assert result.read() == b"theirs"
    bucket.delete("out/x.csv")
    assert write_object(Target(url, root), url, interrupted(bytes(size))).bytes == size


def test_what_is_not_there_and_what_is_not_allowed_is_named(api: Api, bucket: Storage) -> None:
    problem(api.http.post("/v1/jobs", json=asked(bucket, "*.csv")), 404, "input-not-found")
    problem(api.http.post("/v1/jobs", json=asked(bucket, "a.csv")), 404, "input-not-found")
    elsewhere = {"input": {"urls": [f"{bucket.address}/out/a.csv"]}, "model": "iris"}
    problem(api.http.post("/v1/jobs", json=elsewhere), 403, "location-refused")
