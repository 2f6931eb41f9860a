"""Results that go into tables of PostgreSQL."""

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import polars as pl
import postgres
import pytest
from service import Api, encoded, ok, problem, running
from warehouse import Warehouse, allowed, flowers

from batchserve.domain import TableTarget
from batchserve.errors import InvalidOptions, LocationRefused
from batchserve.postgres import Place, place_of
from batchserve.postgres.load import load
from batchserve.settings import Settings

pytestmark = pytest.mark.postgres

Site = tuple[Api, Path, Warehouse]
SCORES = {"table": "warehouse.s.scores"}
TARGET = TableTarget("warehouse", "s", "scores")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, postgres_server: postgres.Server, iris_onnx: Path) -> Iterator[Site]:
    """A service, a folder that it may read, and a database that it may use."""
    folder = tmp_path_factory.mktemp("tables")
    with (
        postgres_server.apart() as address,
        closing(Warehouse(address)) as warehouse,
        running(folder / "store", **allowed(folder, warehouse)) as api,
    ):
        api.register("iris", iris_onnx)
        yield api, folder, warehouse


@pytest.fixture
def api(site: Site) -> Api:
    return site[0]


@pytest.fixture
def lake(site: Site) -> Path:
    return site[1]


@pytest.fixture
def warehouse(site: Site) -> Warehouse:
    """The same database, without what an earlier test has left."""
    site[2]("DROP TABLE IF EXISTS batchserve_jobs; DROP SCHEMA IF EXISTS s CASCADE; CREATE SCHEMA s")
    return site[2]


def asked(folder: Path, frame: pl.DataFrame, **more: Any) -> dict[str, Any]:
    (folder / "lake").mkdir(exist_ok=True)
    (folder / "lake" / "a.parquet").write_bytes(encoded(frame, "parquet"))
    return {"input": {"urls": [f"file://{folder}/lake/a.parquet"]}, "model": "iris", "output": SCORES, **more}


def submitted(api: Api, request: dict[str, Any]) -> dict[str, Any]:
    return api.finished(ok(api.http.post("/v1/jobs", json=request), 202)["id"])


def completed(api: Api, request: dict[str, Any]) -> dict[str, Any]:
    job = submitted(api, request)
    assert job["state"] == "completed", job["error"]
    return job


def failed(api: Api, request: dict[str, Any], code: str) -> str:
    job = submitted(api, request)
    assert (job["state"], job["error"]["code"]) == ("failed", code)
    return str(job["error"]["message"])


# --- through the API ---


def test_a_result_goes_into_a_new_table_with_the_types_of_its_columns(
    api: Api, lake: Path, warehouse: Warehouse
) -> None:
    frame = flowers(230)
    job = completed(api, asked(lake, frame))
    kept = api.run(encoded(frame, "parquet"), "iris")
    expected = pl.read_parquet(io.BytesIO(api.result(kept).content))
    found = pl.DataFrame(warehouse("SELECT * FROM s.scores ORDER BY plant"), schema=expected.schema, orient="row")
    assert found.equals(expected.sort("plant"))
    assert job["chunks"]["total"] > 1
    assert (job["output"]["table"], job["output"]["mode"]) == ("warehouse.s.scores", "append")
    assert warehouse.staging() == []
    assert "warehouse.s.scores" in problem(api.http.get(job["links"]["result"]), 409, "elsewhere")["detail"]


def test_rows_are_added_to_a_table_or_replace_all_of_its_rows(api: Api, lake: Path, warehouse: Warehouse) -> None:
    completed(api, asked(lake, flowers(60, 1)))
    completed(api, asked(lake, flowers(70, 2)))
    assert warehouse("SELECT count(*), count(DISTINCT plant) FROM s.scores") == [(130, 130)]
    completed(api, asked(lake, flowers(20, 3), output={**SCORES, "mode": "replace"}))
    assert warehouse("SELECT count(*), min(left(plant, 2)), max(left(plant, 2)) FROM s.scores") == [(20, "3-", "3-")]


def test_an_equal_job_adds_its_rows_as_well(api: Api, lake: Path, warehouse: Warehouse) -> None:
    for _ in range(2):
        assert completed(api, asked(lake, flowers(10)))["reused_from"] is None
    assert warehouse("SELECT count(*) FROM s.scores") == [(20,)]


def test_columns_are_matched_by_their_names_and_others_get_their_defaults(
    api: Api, lake: Path, warehouse: Warehouse
) -> None:
    completed(api, asked(lake, flowers(1)))
    of_table = "FROM pg_attribute WHERE attrelid = 's.scores'::regclass AND attnum > 0"
    types = dict(warehouse(f"SELECT attname, format_type(atttypid, atttypmod) {of_table} ORDER BY attnum DESC"))
    warehouse("DROP TABLE s.scores")
    fields = ", ".join(f'"{name}" {kind}' for name, kind in types.items())
    own = "id bigint GENERATED ALWAYS AS IDENTITY", "at timestamptz NOT NULL DEFAULT now()", "note text"
    warehouse(f"CREATE TABLE s.scores ({', '.join(own)}, {fields})")
    completed(api, asked(lake, flowers(120)))
    assert warehouse(
        "SELECT count(*), count(DISTINCT id), count(at), count(note), count(prediction) FROM s.scores"
    ) == [(120, 120, 120, 0, 120)]


def test_failed_records_are_rows_of_nulls(api: Api, lake: Path, warehouse: Warehouse) -> None:
    frame = flowers(10).with_columns(
        pl.when(pl.int_range(10) == 3).then(None).otherwise(pl.col("petal width (cm)")).alias("petal width (cm)")
    )
    job = completed(api, asked(lake, frame))
    assert job["rows"]["failed"] == 1
    assert warehouse("SELECT plant FROM s.scores WHERE prediction IS NULL") == [("0-3",)]
    detail = problem(api.http.post(f"/v1/jobs/{job['id']}/retry", json={"rows": "failed"}), 409, "job-conflict")[
        "detail"
    ]
    assert "would add all of them again" in detail


def test_a_csv_goes_into_a_table_with_the_types_that_its_job_gives_it(
    api: Api, lake: Path, warehouse: Warehouse
) -> None:
    frame = flowers(120).with_columns(count=pl.int_range(120))
    (lake / "lake").mkdir(exist_ok=True)
    (lake / "lake" / "a.csv").write_bytes(encoded(frame, "csv"))
    request = {"input": {"urls": [f"file://{lake}/lake/a.csv"]}, "model": "iris", "output": SCORES}
    completed(api, request)
    assert warehouse("SELECT count(*), sum(count::int) FROM s.scores") == [(120, sum(range(120)))]
    assert (
        "have no format csv"
        in problem(api.http.post("/v1/jobs", json={**request, "format": "csv"}), 422, "invalid-options")["detail"]
    )


def test_no_record_gives_an_empty_table(api: Api, lake: Path, warehouse: Warehouse) -> None:
    completed(api, asked(lake, flowers(0)))
    assert warehouse("SELECT count(*) FROM s.scores") == [(0,)]
    assert warehouse.staging() == []


@pytest.mark.parametrize(
    ("table", "code", "said"),
    [
        ("(plant text)", "table-mismatch", "has no column 'prediction'"),
        ("(plant text, prediction text, {values}, day date NOT NULL)", "table-mismatch", "requires a value for 'day'"),
        (
            "(plant int, prediction text, {values})",
            "table-mismatch",
            "column 'plant' of the result is String; found integer",
        ),
        (
            "(plant varchar(3), prediction text, {values})",
            "table-mismatch",
            "'plant' has a text longer than the 3 characters",
        ),
        ("(plant text PRIMARY KEY, prediction text, {values})", "table-mismatch", "already exists"),
        (
            "(plant text CHECK (plant <> '7-5'), prediction text, {values})",
            "table-mismatch",
            "violates check constraint",
        ),
        ("(plant text GENERATED ALWAYS AS ('x') STORED, prediction text, {values})", "table-mismatch", "'plant'"),
    ],
)
def test_what_a_table_does_not_take_is_named_and_no_row_is_visible(
    api: Api, lake: Path, warehouse: Warehouse, table: str, code: str, said: str
) -> None:
    values = ", ".join(f'"probability_{name}" real' for name in ("setosa", "versicolor", "virginica"))
    warehouse(f"CREATE TABLE s.scores {table.replace('{values}', values)}")
    frame = pl.concat([flowers(60, 7), flowers(60, 7)])
    assert said in failed(api, asked(lake, frame, passthrough=["plant"]), code)
    assert warehouse("SELECT count(*) FROM s.scores") == [(0,)]


def test_a_view_and_a_schema_that_is_missing_are_refused_by_name(api: Api, lake: Path, warehouse: Warehouse) -> None:
    warehouse("CREATE VIEW s.scores AS SELECT 1 AS one")
    assert "is not a table" in failed(api, asked(lake, flowers(3)), "table-mismatch")
    missing = {"table": "warehouse.nowhere.scores"}
    assert "no schema 'nowhere'" in failed(api, asked(lake, flowers(3), output=missing), "location-refused")


def test_a_job_goes_on_from_its_chunks_when_its_table_was_corrected(api: Api, lake: Path, warehouse: Warehouse) -> None:
    warehouse("CREATE TABLE s.scores (plant text)")
    job = submitted(api, asked(lake, flowers(120)))
    warehouse("DROP TABLE s.scores")
    ok(api.http.post(f"/v1/jobs/{job['id']}/retry"), 202)
    again = api.finished(job["id"])
    assert (again["state"], again["attempt"]) == ("completed", 2)
    assert warehouse("SELECT count(*) FROM s.scores") == [(120,)]


@pytest.mark.parametrize(
    ("output", "status", "code"),
    [
        ({"table": "warehouse.scores"}, 422, "invalid-options"),
        ({"table": "warehouse.s.a.b"}, 422, "invalid-options"),
        ({"table": "other.public.scores"}, 403, "location-refused"),
        ({"table": "warehouse.s.scores", "mode": "upsert"}, 422, "invalid-options"),
        ({"table": "warehouse.s.scores", "overwrite": True}, 422, "invalid-options"),
        ({"table": "warehouse.s.scores", "url": "file:///x.csv"}, 422, "invalid-options"),
        ({"url": "file:///x.csv", "mode": "replace"}, 422, "invalid-options"),
        ({}, 422, "invalid-options"),
    ],
)
def test_a_target_of_another_form_is_refused(
    api: Api, lake: Path, output: dict[str, Any], status: int, code: str
) -> None:
    with api.unchanged():
        problem(api.http.post("/v1/jobs", json=asked(lake, flowers(2), output=output)), status, code)


# --- who may ---


def test_a_database_is_named_by_an_administrator_for_each_tenant() -> None:
    own, every = "postgresql://own@host/x", "postgresql://every@host/x"
    settings = Settings(tables={"a": {"dwh": own}, "*": {"dwh": every, "more": every}})

    def of(tenant: str) -> dict[str, str]:
        return {name: value.get_secret_value() for name, value in settings.connections_of(tenant).items()}

    assert of("a") == {"dwh": own, "more": every}
    assert of("b") == {"dwh": every, "more": every}
    with pytest.raises(LocationRefused, match="an administrator names some"):
        place_of("dwh", {})


def test_a_password_is_shown_nowhere(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(tables={"*": {"dwh": "postgresql://me:hush@host/x"}})
    place = place_of("dwh", {"dwh": "postgresql://me:hush@host/x"})
    for shown in (repr(settings), str(settings.in_force()), settings.model_dump_json(), repr(place)):
        assert "hush" not in shown
    for wrong in ({"dwh": "mysql://me:hush@host/x"}, {"d w": "postgresql://me:hush@host/x"}):
        with pytest.raises(ValueError, match="expected") as raised:
            Settings(tables={"*": wrong})
        assert "hush" not in str(raised.value)
    with pytest.raises(InvalidOptions) as refused:
        load(Place("dwh", "postgresql://me:hush@[::1]x/y"), TARGET, "j", {}, [], lambda _: pl.DataFrame())
    assert "hush" not in f"{refused.value!r}{refused.value.__cause__!r}"
    monkeypatch.setenv("BATCHSERVE_TABLES", '{"*": {"dwh": "postgresql://me:hush@host/x"}}')
    assert Settings().connections_of("b")["dwh"].get_secret_value() == "postgresql://me:hush@host/x"
    assert "hush" not in "".join(capfd.readouterr())
