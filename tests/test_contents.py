"""Small inputs and results are in rows of the database: written with the job, removed with the last one that needs
them."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import polars as pl
import pytest
from selection import quick_first
from service import Api, encoded, ok, problem, running
from sqlalchemy import delete, select, update

from batchserve.db.connect import Database
from batchserve.db.tables import contents
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.upkeep.backup import back_up, restore
from batchserve.upkeep.inspection import inspect_objects
from batchserve.upkeep.retention import expire

HEADER = "sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n"
ROW = "5.1,3.5,1.4,0.2\n"
CSV = HEADER + ROW
SOME_FAIL = HEADER + ROW * 3 + ",,,\n"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    with running(tmp_path_factory.mktemp("rows")) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture
def database(service: Api) -> Iterator[Database]:
    with closing(Database(service.settings.database_url)) as opened:
        yield opened


def in_rows(database: Database) -> set[str]:
    with database.read() as connection:
        return set(connection.scalars(select(contents.c.key)))


def files(api: Api) -> set[str]:
    return {entry.key for entry in open_storage(api.settings.storage).list("") if entry.key[0] in "ipr"}


def test_small_inputs_and_results_take_no_files(service: Api, database: Database) -> None:
    before = files(service)
    job = service.run(SOME_FAIL, "iris")
    assert (job["state"], job["rows"]["failed"]) == ("completed", 1)
    name = job["id"]
    of_job = {key for key in in_rows(database) if name in key}
    assert of_job == {f"rows/inputs/{name}", f"rows/results/{name}-1", f"rows/results/{name}-1.errors"}
    assert files(service) == before
    assert service.http.get(job["links"]["input"]).content == SOME_FAIL.encode()
    assert [error["record"] for error in service.errors(job)] == [3]
    assert service.result(job).content.count(b"\n") == 5


@pytest.mark.parametrize(("size", "is_in_row"), [(65536, True), (65537, False)])
def test_an_input_is_in_a_row_up_to_the_limit(service: Api, database: Database, size: int, is_in_row: bool) -> None:
    body = HEADER + ROW * 4000
    body += "1" * (size - len(body) - 1) + "\n"
    job = service.upload(body)
    assert (f"rows/inputs/{job['id']}" in in_rows(database)) is is_in_row
    assert service.http.get(job["links"]["input"]).text == body


@pytest.fixture(scope="module")
def of_files(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service that keeps no bytes in rows."""
    with running(tmp_path_factory.mktemp("files"), inline_bytes=0) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.mark.parametrize("format", ["csv", "parquet", "jsonl", "arrow"])
def test_results_in_rows_and_in_files_have_the_same_bytes(
    service: Api, of_files: Api, flowers: pl.DataFrame, format: str
) -> None:
    body = encoded(flowers, "csv")
    in_files = of_files.run(body, "iris", format=format)
    expected = of_files.result(in_files)
    job = service.run(body, "iris", format=format)
    answer = service.result(job)
    assert answer.content == expected.content
    ours = {name: answer.headers[name] for name in ("etag", "repr-digest", "content-type", "accept-ranges")}
    assert ours == {name: expected.headers[name] for name in ours}
    assert job["result"] == in_files["result"]


def test_ranges_and_conversions_of_a_result_in_a_row(service: Api) -> None:
    job = service.run(HEADER + ROW * 20, "iris")
    whole = service.result(job).content
    part = service.http.get(job["links"]["result"], headers={"range": "bytes=10-29"})
    assert (part.status_code, part.content) == (206, whole[10:30])
    known = service.http.get(job["links"]["result"], headers={"if-none-match": part.headers["etag"]})
    assert known.status_code == 304
    converted = pl.read_parquet(service.result(job, format="parquet").content)
    assert converted.height == 20


def test_contents_are_removed_with_the_last_job_that_needs_them(service: Api, database: Database) -> None:
    first = service.run(CSV, "iris")
    other = ok(service.http.post(f"/v1/predict/{first['id']}", params={"model": "iris", "format": "jsonl"}), 202)
    again = service.run(CSV, "iris", reuse=True)
    assert again["reused_from"] is not None
    service.finished(other["id"])
    assert service.http.delete(first["links"]["self"]).status_code == 204
    left = {key for key in in_rows(database) if first["id"] in key}
    assert f"rows/inputs/{first['id']}" in left
    assert service.http.get(other["links"]["input"]).text == CSV
    assert service.result(again).content
    for job in (other, again):
        assert service.http.delete(job["links"]["self"]).status_code == 204
    assert not {key for key in in_rows(database) if other["id"] in key or again["id"] in key}
    assert f"rows/inputs/{first['id']}" not in in_rows(database)


def test_failed_records_of_an_input_in_a_row_are_scored_again(service: Api) -> None:
    job = service.run(SOME_FAIL, "iris")
    again = ok(service.http.post(f"/v1/jobs/{job['id']}/retry", json={"rows": "failed"}), 202)
    assert service.finished(again["id"])["rows"]["failed"] == 1
    assert service.result(again).content == service.result(job).content


def test_a_large_result_of_a_small_input_is_a_file(service: Api, database: Database) -> None:
    long = "x" * 40
    head = HEADER.strip() + ",name\n"
    body = head + "".join(f"5.1,3.5,1.4,0.2,{long}\n" for _ in range(1100))
    assert len(body) <= 65536
    job = service.run(body, "iris", passthrough="all")
    assert job["result"]["bytes"] > 65536
    assert f"rows/inputs/{job['id']}" in in_rows(database)
    assert f"results/{job['id']}-1" in files(service)
    assert service.result(job).content.count(long.encode()) == 1100


@pytest.mark.slow
@pytest.mark.sqlite  # that of a server is its own
def test_a_backup_has_contents_with_their_rows(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path / "live") as api:
        api.register("iris", iris_onnx)
        job = api.run(SOME_FAIL, "iris")
        waiting = api.upload(CSV)
        expected = api.result(job).content
        with closing(Database(api.settings.database_url)) as database:
            report = back_up(database, open_storage(api.settings.storage), tmp_path / "backup")
    assert (report.objects, report.damaged) == (1, ())  # the model
    restored = restore(tmp_path / "backup", open_storage(str(tmp_path / "new")), tmp_path / "new" / "batchserve.db")
    assert restored.damaged == ()
    with running(tmp_path / "new") as api:
        assert api.result(job).content == expected
        assert len(api.errors(job)) == 1
        done = api.http.post(f"/v1/predict/{waiting['id']}", params={"model": "iris"}, headers={"prefer": "wait=30"})
        assert done.json()["state"] == "completed"


@pytest.mark.parametrize("harm", quick_first(["changed", "removed"], 1))
def test_damage_in_rows_is_found_and_hides_nothing_else(tmp_path: Path, iris_onnx: Path, harm: str) -> None:
    with running(tmp_path) as api:
        api.register("iris", iris_onnx)
        job, other = api.run(CSV, "iris"), api.run(SOME_FAIL, "iris")
        key = f"rows/results/{job['id']}-1"
        with closing(Database(api.settings.database_url)) as database:
            with database.write() as connection:
                its = contents.c.key == key
                if harm == "removed":
                    connection.execute(delete(contents).where(its))
                else:
                    content = connection.scalar(select(contents.c.content).where(its))
                    assert content is not None
                    connection.execute(update(contents).where(its).values(content=content[:-1] + b" "))
            found = inspect_objects(database, open_storage(api.settings.storage), most_bytes=2**30, seconds=60)
        assert [fault.place for fault in found.faults] == [f"{key} of job {job['id']}"]
        assert api.result(other).content
        if harm == "removed":
            problem(api.http.get(job["links"]["result"]), 500, "internal-error")


def test_contents_end_with_their_retention(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path) as api, closing(Database(api.settings.database_url)) as database:
        api.register("iris", iris_onnx)
        job, waiting = api.run(CSV, "iris"), api.upload(CSV)
        storage = open_storage(api.settings.storage)
        kept = Settings(storage=api.settings.storage, keep_inputs="7d", keep_results="30d")
        day = 86400.0
        expire(database, storage, kept, time.time() + 8 * day)
        assert in_rows(database) == {f"rows/results/{job['id']}-1"}
        problem(api.http.get(waiting["links"]["input"]), 410, "expired")
        expire(database, storage, kept, time.time() + 31 * day)
        assert in_rows(database) == set()
        problem(api.http.get(job["links"]["result"]), 410, "expired")
