"""End to end, from a query into a table, with real processes that are killed: each row is there once, or none is."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import httpx2
import psycopg
import pytest
from commands import FAST, Service
from waiting import until
from warehouse import COLUMNS, Warehouse

pytestmark = [pytest.mark.slow, pytest.mark.postgres, pytest.mark.timeout(240)]

ROWS = 60_000


@pytest.fixture
def plants(warehouse: Warehouse) -> None:
    measures = ", ".join(f'random() * 7 AS "{name}"' for name in COLUMNS)
    numbers = f"generate_series(1, {ROWS}) AS n"
    warehouse(f"CREATE TABLE plants AS SELECT n AS plant, {measures} FROM {numbers}")  # noqa: S608
    fields = ", ".join(f"probability_{name} real" for name in ("setosa", "versicolor", "virginica"))
    warehouse(f"CREATE TABLE scores (plant int, prediction text, {fields})")


@contextmanager
def serving(folder: Path, warehouse: Warehouse) -> Iterator[Service]:
    """A service, killed at the end."""
    tables = json.dumps({"*": {"warehouse": warehouse.address}})
    settings = {**FAST, "BATCHSERVE_TABLES": tables, "BATCHSERVE_CRASHES": "20"}
    service = Service(folder, "serve", "--port", "0", settings=settings)
    try:
        service.url = service.wait_for(r" at (http://\S+) ")[1]
        yield service
    finally:
        service.end(signal.SIGKILL)


def submitted(service: Service, model: Path, mode: str) -> str:
    httpx2.put(f"{service.url}/v1/models/iris", content=model.read_bytes(), timeout=60).raise_for_status()
    body = {
        "input": {"query": "SELECT plants.* FROM plants, pg_sleep(1) ORDER BY plant", "connection": "warehouse"},
        "output": {"table": "warehouse.public.scores", "mode": mode},
        "model": "iris",
        "passthrough": ["plant"],
    }
    answer = httpx2.post(f"{service.url}/v1/jobs", json=body, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def has_done(service: Service, job_id: str, chunks: int) -> bool:
    job = httpx2.get(f"{service.url}/v1/jobs/{job_id}", timeout=30).raise_for_status().json()
    assert job["state"] in ("queued", "running"), job
    return bool(job["chunks"]["done"] >= chunks)


@pytest.mark.usefixtures("plants")
@pytest.mark.parametrize("mode", ["append", "replace"])
def test_a_service_that_is_killed_at_every_stage_puts_each_row_into_the_table_once(
    tmp_path: Path, warehouse: Warehouse, iris_onnx: Path, mode: str
) -> None:
    warehouse("INSERT INTO scores (plant) VALUES (0)")
    sleeps = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"
    waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'scores'::regclass"
    with serving(tmp_path, warehouse) as service:  # killed while it waits for the rows of the query
        job_id = submitted(service, iris_onnx, mode)
        until(lambda: warehouse(sleeps) != [(0,)], 120)
    for chunks in (1, 3, 6):
        with serving(tmp_path, warehouse) as service:
            until(partial(has_done, service, job_id, chunks), 60)
    with psycopg.connect(warehouse.address) as other:
        other.execute("LOCK TABLE scores IN SHARE MODE")
        for _ in range(2):
            with serving(tmp_path, warehouse):  # killed when all rows are staged
                until(lambda: warehouse(waits) != [(0,)], 120)
                assert warehouse("SELECT count(*) FROM scores") == [(1,)]
                assert warehouse.staging() == [job_id]
    with serving(tmp_path, warehouse):  # killed when the rows are visible
        until(lambda: warehouse("SELECT count(*) FROM batchserve_jobs") == [(1,)], 120)
    with serving(tmp_path, warehouse) as service:
        until(lambda: httpx2.get(f"{service.url}/v1/jobs/{job_id}").json()["state"] == "completed", 120)
    zero = 1 if mode == "append" else 0
    count = "SELECT count(*), count(DISTINCT plant), count(prediction), min(plant), max(plant) FROM scores"
    assert warehouse(count) == [(ROWS + zero, ROWS + zero, ROWS, 1 - zero, ROWS)]
    assert warehouse.staging() == []
