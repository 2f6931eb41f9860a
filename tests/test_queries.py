"""Inputs that are the rows of a query."""

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import graphs
import polars as pl
import postgres
import pytest
from bench import Bench, HandWorker, opened
from commands import clean_environment
from hand import HandEngine
from service import Api, ok, problem, running
from uuid_utils import uuid7
from warehouse import COLUMNS, Warehouse, allowed, flowers

from batchserve.client import Client
from batchserve.domain import JobState, Query, StoredInput
from batchserve.errors import LocationRefused, PayloadTooLarge, QueryRefused
from batchserve.postgres.query import columns_of_query, rows_of_query
from batchserve.scoring.tables import QueryTask, read_query
from batchserve.storage import query_key
from batchserve.upkeep.objects import named_objects

pytestmark = pytest.mark.postgres

Site = tuple[Api, Path, Warehouse]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, postgres_server: postgres.Server, iris_onnx: Path) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("queries")
    with (
        postgres_server.apart() as address,
        closing(Warehouse(address)) as warehouse,
        running(folder / "store", **allowed(folder, warehouse)) as api,
    ):
        api.register("iris", iris_onnx)
        fields = ", ".join(f'"{name}" float8' for name in COLUMNS)
        warehouse(f"CREATE TABLE plants ({fields}, plant text)")
        warehouse.copy("plants", flowers(130))
        yield api, folder, warehouse


@pytest.fixture
def api(site: Site) -> Api:
    return site[0]


@pytest.fixture
def warehouse(site: Site) -> Warehouse:
    return site[2]


def asked(query: str, **more: Any) -> dict[str, Any]:
    return {"input": {"query": query, "connection": "warehouse"}, "model": "iris", **more}


def completed(api: Api, request: dict[str, Any]) -> dict[str, Any]:
    job = api.finished(ok(api.http.post("/v1/jobs", json=request), 202)["id"])
    assert job["state"] == "completed", job["error"]
    return job


def result(api: Api, job: dict[str, Any]) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(api.result(job).content))


# --- jobs ---


def test_the_rows_of_a_query_are_an_input_in_its_order(api: Api) -> None:
    query = "SELECT * FROM plants ORDER BY substr(plant, 3)::int DESC"
    job = completed(api, asked(query))
    frame = flowers(130).reverse()
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    assert result(api, job).equals(result(api, api.run(buffer.getvalue(), "iris")))
    assert (job["input"]["query"], job["input"]["connection"], job["input"]["url"]) == (query, "warehouse", None)
    assert job["input"]["rows"] == 130
    stored = api.http.get(job["links"]["input"])
    assert pl.read_parquet(io.BytesIO(stored.content)).equals(frame)


def test_a_query_without_rows_gives_an_empty_result(api: Api) -> None:
    job = completed(api, asked("SELECT * FROM plants WHERE false"))
    assert job["rows"] == {"total": 0, "ok": 0, "failed": 0}
    assert "prediction" in result(api, job).columns


def test_rows_go_from_a_query_into_a_table_of_the_same_database(api: Api, warehouse: Warehouse) -> None:
    warehouse("DROP TABLE IF EXISTS scores")
    output = {"table": "warehouse.public.scores"}
    completed(api, asked("SELECT * FROM plants;", output=output, passthrough=["plant"]))
    joined = "SELECT count(*), count(prediction) FROM scores JOIN plants USING (plant)"
    assert warehouse(joined) == [(130, 130)]


def test_the_result_of_an_equal_query_is_not_reused(api: Api) -> None:
    query = "SELECT * FROM plants ORDER BY plant"
    assert [completed(api, asked(query))["reused_from"] for _ in range(2)] == [None, None]


def test_the_stored_rows_are_predicted_by_another_model_as_well(api: Api, iris_onnx: Path) -> None:
    api.register("again", iris_onnx)
    job = completed(api, asked("SELECT * FROM plants ORDER BY plant"))
    answer = api.http.post(f"/v1/predict/{job['id']}", params={"model": "again"}, headers={"prefer": "wait=30"})
    assert result(api, ok(answer)).equals(result(api, job))


def test_the_client_submits_a_query_and_names_a_table(
    start_server: Callable[..., AbstractContextManager[str]], tmp_path: Path, warehouse: Warehouse, iris_onnx: Path
) -> None:
    warehouse("DROP TABLE IF EXISTS scores")
    named = tmp_path / "tables"
    named.write_text(json.dumps({"*": {"warehouse": warehouse.address}}))
    to = "warehouse.public.scores"
    prefixes = json.dumps({"*": [f"file://{tmp_path}/lake/"]})
    (tmp_path / "lake").mkdir()
    flowers(20, 9).write_parquet(tmp_path / "lake" / "a.parquet")
    environment = {"BATCHSERVE_TABLES_FILE": str(named), "BATCHSERVE_INPUT_PREFIXES": prefixes}
    with start_server(tmp_path, **environment) as url, Client(url) as client:
        client.models.add(iris_onnx, name="iris")
        assert (
            client.submit_query("TABLE plants", "iris", connection="warehouse", table=to).wait(30).state == "completed"
        )
        client.submit_urls(f"file://{tmp_path}/lake/*", "iris", table=to).wait(30)
        assert warehouse("SELECT count(*) FROM scores") == [(150,)]
        client.submit_query("TABLE plants", "iris", connection="warehouse", table=to, mode="replace").wait(30)
        kept = client.submit_query("SELECT * FROM plants LIMIT 5", "iris", connection="warehouse").wait(30)
        assert kept.result().to_polars().height == 5
        assert warehouse("SELECT count(*) FROM scores") == [(130,)]
        query = ["--query", "SELECT * FROM plants LIMIT 7", "--connection", "warehouse"]
        done = created(url, *query, "--table", to, "--mode", "replace")
        assert (done.returncode, json.loads(done.stdout)["rows"]["ok"]) == (0, 7), done.stderr
        assert f"written to {to}" in done.stderr.replace("\n", " ")
    assert warehouse("SELECT count(*) FROM scores") == [(7,)]


def created(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`batchserve jobs create`."""
    command = [sys.executable, "-m", "batchserve", "jobs", "create", "-m", "iris", "--json", *arguments]
    environment = clean_environment() | {"BATCHSERVE_URL": url}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name what to score: addresses, or a --query"),
        (["--query", "TABLE plants"], "a query needs the name of its database: --connection"),
        (["file:///a.csv", "--connection", "warehouse"], "it names the database of a query: add --query"),
        (["--query", "TABLE a", "--connection", "b", "file:///a.csv"], "a query does not go with addresses"),
        (["--query", "TABLE a", "--connection", "b", "--archive"], "a query does not go with --archive"),
    ],
)
def test_the_command_says_which_of_its_options_do_not_go_together(arguments: list[str], said: str) -> None:
    done = created("http://127.0.0.1:9", *arguments)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT plant FROM plants", "the query: "),
        ("SELECT *, 1 AS plant FROM plants", "two columns 'plant'"),
        ("SELECT *, plant::int4range AS r FROM plants", "column 'r' of the query is int4range"),
        ("SELECT *, avg(1) OVER () AS a FROM plants", "column 'a' of the query is numeric"),
        ("SELECT", "has no columns"),
        ("SELECT nothing FROM plants", 'column "nothing" does not exist'),
        ("SELECT 1; SELECT 2", "syntax error"),
        ("SELECT 1) AS a; SELECT * FROM (SELECT 2", "cannot insert multiple commands"),
        ("DROP TABLE plants", "syntax error"),
        ("INSERT INTO plants SELECT * FROM plants RETURNING *", "syntax error"),
        ("WITH gone AS (DELETE FROM plants RETURNING *) SELECT * FROM gone", "must be at the top level"),
        ("SELECT * INTO copy FROM plants", "INTO"),
        ("EXPLAIN SELECT 1", "syntax error"),
        ("COPY plants TO STDOUT", "syntax error"),
        ("", "at least 1 character"),
    ],
)
def test_what_is_no_query_for_the_model_is_refused_when_it_is_submitted(
    api: Api, warehouse: Warehouse, query: str, said: str
) -> None:
    with api.unchanged():
        answer = api.http.post("/v1/jobs", json=asked(query))
    assert answer.status_code == 422, answer.text
    assert answer.json()["code"] in ("query-refused", "schema-mismatch", "invalid-options")
    assert said in json.dumps(answer.json(), ensure_ascii=False).replace('\\"', '"')
    assert warehouse("SELECT count(*) FROM plants") == [(130,)]


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("SELECT 1 AS x) AS a, (SELECT 2 AS y", "syntax error"),
        ("SELECT nextval('numbers')::float8", "read-only transaction"),
        ("SELECT set_config('transaction_read_only', 'off', false), nextval('numbers')", "read-write mode"),
        ("SELECT 1 / (1 - n) FROM generate_series(1, 1) AS n", "division by zero"),
        ("SELECT pg_sleep(60)::text", "may take 0.5 s"),
        ("SELECT 'infinity'::timestamp AS t", "infinity"),
        ("SELECT 'NaN'::numeric(5, 2) AS n", "'n' of the query has a value that is not read"),
        ("SELECT ARRAY[[1, 2], [3, 4]] AS a", "'a' of the query has a value that is not read"),
    ],
)
def test_a_query_that_fails_when_it_runs_is_refused_and_changes_nothing(
    warehouse: Warehouse, query: str, said: str
) -> None:
    warehouse("CREATE SEQUENCE IF NOT EXISTS numbers")
    with pytest.raises(QueryRefused) as raised, rows_of_query(warehouse.place(), query, 0.5) as rows:
        list(rows.frames)
    assert said in str(raised.value)
    assert warehouse("SELECT is_called FROM numbers") == [(False,)]


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        ({"query": "TABLE plants"}, 422, "invalid-options"),
        ({"connection": "warehouse"}, 422, "invalid-options"),
        ({"query": "TABLE plants", "connection": "warehouse", "urls": ["file:///x"]}, 422, "invalid-options"),
        ({"query": "TABLE plants", "connection": "warehouse", "delimiter": ","}, 422, "invalid-options"),
        ({"query": "TABLE plants\0", "connection": "warehouse"}, 422, "invalid-options"),
        ({"query": "TABLE plants", "connection": "elsewhere"}, 403, "location-refused"),
        ({"query": "TABLE plants", "connection": "file:///x"}, 403, "location-refused"),
    ],
)
def test_a_request_of_another_form_is_refused(api: Api, given: dict[str, Any], status: int, code: str) -> None:
    problem(api.http.post("/v1/jobs", json={"input": given, "model": "iris"}), status, code)


def test_a_database_that_is_away_is_a_503(tmp_path: Path, iris_onnx: Path) -> None:
    with running(tmp_path, tables={"*": {"warehouse": "postgresql://me:hush@127.0.0.1:9/x"}}) as api:
        api.register("iris", iris_onnx)
        answer = api.http.post("/v1/jobs", json=asked("SELECT 1"))
        assert "does not respond" in problem(answer, 503, "unavailable")["detail"]
        assert "hush" not in answer.text


# --- types and memory ---


def test_each_type_has_its_values(warehouse: Warehouse) -> None:
    values = {
        "b": ("true::bool", True),
        "i": ("(-32768)::int2", -32768),
        "j": ("2147483647::int4", 2**31 - 1),
        "k": ("9223372036854775807::int8", 2**63 - 1),
        "f": ("0.1::float4", 0.10000000149011612),
        "d": ("0.1::float8", 0.1),
        "n": ("12.30::numeric(5, 2)", Decimal("12.30")),
        "t": ("'é\n\"'::text", 'é\n"'),
        "e": ("''::varchar(3)", ""),
        "c": ("'a'::char(3)", "a  "),
        "u": ("'0a0a0a0a-0000-0000-0000-000000000001'::uuid", "0a0a0a0a-0000-0000-0000-000000000001"),
        "s": ("'{\"b\":  1}'::json", '{"b":  1}'),
        "x": ("'\\x00ff'::bytea", b"\x00\xff"),
        "y": ("'2026-11-30'::date", date(2026, 11, 30)),
        "z": ("'23:59:59.999999'::time", time(23, 59, 59, 999999)),
        "m": ("'2026-11-30 01:02:03.000004'::timestamp", datetime.fromisoformat("2026-11-30T01:02:03.000004")),
        "o": ("'2026-11-30 01:02:03+02'::timestamptz", datetime(2026, 11, 29, 23, 2, 3, tzinfo=ZoneInfo("UTC"))),
        "l": ("ARRAY[0.5, NULL]::float8[]", [0.5, None]),
        "w": ("ARRAY['a', NULL, '']::text[]", ["a", None, ""]),
        "nan": ("'NaN'::float8", float("nan")),
        "inf": ("'-Infinity'::float8", float("-inf")),
    }
    listed = ", ".join(f'{expression} AS "{name}"' for name, (expression, _) in values.items())
    warehouse(f"DROP TABLE IF EXISTS typed; CREATE TABLE typed AS SELECT {listed}; INSERT INTO typed DEFAULT VALUES")
    with rows_of_query(warehouse.place(), "TABLE typed", 10) as rows:
        (frame,) = rows.frames
    assert repr(frame.row(0)) == repr(tuple(value for _, value in values.values()))
    assert frame.row(1) == (None,) * len(values)
    assert dict(frame.schema) == rows.schema == columns_of_query(warehouse.place(), f"SELECT {listed}", 10)


def test_rows_come_in_frames_of_bounded_size(warehouse: Warehouse) -> None:
    with rows_of_query(warehouse.place(), "SELECT n FROM generate_series(1, 120000) AS n", 30) as rows:
        heights = [frame.height for frame in rows.frames]
    assert (sum(heights), max(heights)) == (120_000, 50_000)
    wide = "SELECT repeat('x', 1000000) AS text FROM generate_series(1, 40)"
    with rows_of_query(warehouse.place(), wide, 30) as rows:
        assert max(frame.height for frame in rows.frames) < 12


def test_all_rows_are_of_one_state_and_stored_as_one_table(warehouse: Warehouse, tmp_path: Path) -> None:
    warehouse("DROP TABLE IF EXISTS moving; CREATE TABLE moving AS SELECT n FROM generate_series(1, 120000) AS n")
    query = "SELECT n FROM moving ORDER BY n"
    with rows_of_query(warehouse.place(), query, 30) as rows:
        frames = [next(rows.frames)]
        warehouse("DELETE FROM moving WHERE n > 60000; INSERT INTO moving SELECT generate_series(1, 5)")
        frames += rows.frames
    assert pl.concat(frames)["n"].to_list() == list(range(1, 120_001))
    task = QueryTask(str(tmp_path), "inputs/x", warehouse.place(), query, 30, 2**30)
    stored = read_query(task)
    assert pl.read_parquet(tmp_path / "inputs" / "x")["n"].to_list() == [
        *sorted([1, 2, 3, 4, 5] * 2),
        *range(6, 60_001),
    ]
    assert (stored.bytes, [path.name for path in tmp_path.iterdir()]) == (
        (tmp_path / "inputs" / "x").stat().st_size,
        ["inputs"],
    )


def test_more_bytes_than_an_input_may_have_are_refused_and_leave_nothing(warehouse: Warehouse, tmp_path: Path) -> None:
    query = "SELECT md5(n::text) AS text FROM generate_series(1, 200000) AS n"
    with pytest.raises(PayloadTooLarge, match="more than 1000000 bytes"):
        read_query(QueryTask(str(tmp_path), "inputs/x", warehouse.place(), query, 30, 1_000_000))
    assert not list(tmp_path.iterdir())


def test_what_a_user_may_not_read_is_refused(warehouse: Warehouse) -> None:
    name = f"reader_{uuid7().hex[-8:]}"
    warehouse(f"CREATE ROLE {name} LOGIN")
    try:
        with pytest.raises(LocationRefused, match="permission denied for table plants"):
            columns_of_query(warehouse.place(name), "SELECT * FROM plants", 10)
    finally:
        warehouse(f"DROP ROLE {name}")


# --- one reading ---


@pytest.fixture
def bench(database_url: str, tmp_path: Path, warehouse: Warehouse) -> Iterator[Bench]:
    tables = {"default": {"warehouse": warehouse.address}}
    with opened(database_url, tmp_path / "store", HandEngine(), chunk_records=10, tables=tables) as bench:
        yield bench


def queued(bench: Bench, text: str) -> str:
    job_id, model = str(uuid7()), bench.register("busy", graphs.busy())
    query = Query("warehouse", text)
    return bench.queue(job_id, model, [StoredInput(query_key(job_id), "parquet")], format="parquet", query=query)


def works(warehouse: Warehouse, last: int) -> str:
    warehouse("DROP TABLE IF EXISTS works")
    numbers = f"generate_series(1, {last}) AS n"
    warehouse(f"CREATE TABLE works AS SELECT n::text AS id, n::float4 AS work FROM {numbers}")  # noqa: S608
    return "SELECT * FROM works ORDER BY work"


def taking_over(bench: Bench, seconds: float = 120.0) -> HandWorker:
    """A worker that rescues the job of another one."""
    worker = bench.by_hand()
    worker.calls()  # it has just begun, and lets others renew their leases
    worker.clock.advance(seconds)
    return worker


def ids(bench: Bench, job_id: str) -> list[str]:
    return pl.read_parquet(io.BytesIO(bench.result(job_id)))["id"].to_list()


def test_a_job_that_is_resumed_reads_the_same_rows(bench: Bench, warehouse: Warehouse) -> None:
    job_id = queued(bench, works(warehouse, 25))
    first = bench.by_hand()
    calls = first.chunks()
    calls[0].run()
    first.calls()
    works(warehouse, 40)
    second = taking_over(bench)
    second.work()
    assert (bench.get(job_id).state, bench.get(job_id).attempt) == (JobState.COMPLETED, 2)
    assert ids(bench, job_id) == [str(n) for n in range(1, 26)]


def test_rows_that_a_lost_attempt_has_read_are_not_those_of_the_job(bench: Bench, warehouse: Warehouse) -> None:
    job_id = queued(bench, works(warehouse, 25))
    first = bench.by_hand()
    (read,) = first.calls()
    works(warehouse, 40)
    second = taking_over(bench)
    second.chunks()
    works(warehouse, 7)
    read.run()  # too late
    first.calls()
    taking_over(bench, 600).work()
    assert ids(bench, job_id) == [str(n) for n in range(1, 41)]


def test_the_rows_of_a_query_that_was_not_read_are_in_no_list_of_objects_and_are_not_predicted(
    bench: Bench, warehouse: Warehouse
) -> None:
    job_id = queued(bench, works(warehouse, 5))
    assert [key for key, _ in named_objects(bench.database) if "models/" not in key] == []
    bench.by_hand().work()
    assert len([key for key, _ in named_objects(bench.database) if key.startswith("inputs/")]) == 1
    assert ids(bench, job_id) == ["1", "2", "3", "4", "5"]


def test_what_asks_for_rows_that_are_not_read_yet_is_told_so(
    tmp_path: Path, warehouse: Warehouse, iris_onnx: Path
) -> None:
    with running(tmp_path, worker=False, **allowed(tmp_path, warehouse)) as api:
        api.register("iris", iris_onnx)
        job = ok(api.http.post("/v1/jobs", json=asked("SELECT * FROM plants")), 202)
        assert job["input"]["bytes"] is None
        problem(api.http.get(job["links"]["input"]), 404, "result-not-ready")
        problem(api.http.post(f"/v1/predict/{job['id']}", params={"model": "iris", "top_k": 1}), 409, "job-conflict")
        for page in ("", "/records"):
            assert api.http.get(f"/jobs/{job['id']}{page}").status_code in (200, 404)
        ok(api.http.post(f"/v1/jobs/{job['id']}/cancel"), 202)
        assert api.http.delete(f"/v1/jobs/{job['id']}").status_code == 204
