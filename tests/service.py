"""The service inside the test process: a client of the ASGI app, and access to its stored data."""

import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import orjson
import pandas as pd
import polars as pl
import postgres
import pytest
from sklearn.compose import make_column_transformer
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sqlalchemy import select
from starlette.testclient import TestClient

from batchserve.app import create_app
from batchserve.conversion import convert
from batchserve.db.connect import Database
from batchserve.db.tables import contents
from batchserve.settings import Settings
from batchserve.storage import key_in_storage

QUICK: dict[str, Any] = {"processes": 1, "process_nice": 0, "poll": 0.05, "rescue": 0.5, "free_bytes": 0}
"""Settings of a service that reacts at once."""
URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Api:
    http: TestClient
    settings: Settings

    def upload(self, body: bytes | str, **query: Any) -> dict[str, Any]:
        """A new job in state uploaded."""
        job: dict[str, Any] = ok(self.http.post("/v1/upload", content=body, params=query), 201)
        return job

    def run(self, body: bytes | str, model: str, **options: Any) -> dict[str, Any]:
        """A job that has ended, in whatever state. It never reuses an earlier result, unless `reuse` is given."""
        params = {"model": model, "reuse": False, **options}
        answer = self.http.post("/v1/predict", content=body, params=params, headers={"prefer": "wait=30"})
        job: dict[str, Any] = ok(answer, 200)
        return job

    def job(self, job_id: str) -> dict[str, Any]:
        job: dict[str, Any] = ok(self.http.get(f"/v1/jobs/{job_id}"))
        return job

    def finished(self, job_id: str) -> dict[str, Any]:
        """The job when it has ended, within 20 seconds."""
        deadline = time.monotonic() + 20
        while (job := self.job(job_id))["state"] in ("uploaded", "queued", "running"):
            assert time.monotonic() < deadline, job
            time.sleep(0.02)
        return job

    def result(self, job: Mapping[str, Any], **query: Any) -> httpx2.Response:
        answer = self.http.get(job["links"]["result"], params=query)
        assert answer.status_code == 200, answer.text
        return answer

    def errors(self, job: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.http.get(job["links"]["errors"]).content.splitlines()]

    def register(self, name: str, model: bytes | Path) -> dict[str, Any]:
        data = model.read_bytes() if isinstance(model, Path) else model
        answer = self.http.put(f"/v1/models/{name}", content=data)
        assert answer.is_success, answer.text
        registered: dict[str, Any] = answer.json()
        return registered

    def stored(self) -> set[str]:
        """The keys of everything in storage, and in rows."""
        home = Path(self.settings.storage)
        # Unlike Path.rglob, it passes over a folder that a worker removes meanwhile.
        names = {(Path(at) / name).relative_to(home).as_posix() for at, _, files in os.walk(home) for name in files}
        with closing(Database(self.settings.database_url)) as database, database.read() as connection:
            in_rows = connection.scalars(select(contents.c.key)).all()
        return {name for name in names if not name.startswith("batchserve.db")} | set(map(key_in_storage, in_rows))

    def kept(self) -> tuple[object, ...]:
        """The state that a refused request must not change: objects, the newest job, models. Not parts, which a worker
        removes after the end of a job."""
        newest = self.http.get("/v1/jobs", params={"limit": 1}).json()
        for job in newest["jobs"]:
            job.pop("queue_position")  # an estimate that is made anew at times
        stored = {key for key in self.stored() if not key.startswith("parts/")}
        return (stored, newest, self.http.get("/v1/models").json())

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Asserts that the block leaves no object, job or model, and that the service continues to work."""
        before = self.kept()
        yield
        assert self.kept() == before
        assert self.http.get("/readyz").json()["status"] == "ok"


@contextmanager
def running(folder: Path, *, worker: bool = True, **settings: Any) -> Iterator[Api]:
    default = {} if "database" in settings else postgres.chosen_database(folder)
    chosen = Settings(**{"storage": str(folder), **QUICK, **default, **settings})
    with TestClient(create_app(chosen, worker=worker), base_url=URL) as http:
        yield Api(http, chosen)


def encoded(frame: pl.DataFrame, format: str) -> bytes:
    """A table as a file of any format; the arrays hold its numbers as one float32 matrix."""
    target = io.BytesIO()
    matrix = frame.to_numpy().astype(np.float32) if format in ("npy", "npz") else np.empty(0)
    writers: dict[str, Callable[[io.BytesIO], object]] = {
        "csv": frame.write_csv,
        "jsonl": frame.write_ndjson,
        "json": frame.write_json,
        "parquet": frame.write_parquet,
        "arrow": frame.write_ipc,
        "arrows": frame.write_ipc_stream,
        "npy": lambda file: np.save(file, matrix),
        "npz": lambda file: np.savez(file, input=matrix),
    }
    writers[format](target)
    return target.getvalue()


def decoded(content: bytes, format: str) -> pl.DataFrame:
    readers: dict[str, Callable[[bytes], pl.DataFrame]] = {
        "csv": pl.read_csv,
        "jsonl": pl.read_ndjson,
        "json": pl.read_json,
        "parquet": pl.read_parquet,
        "arrow": pl.read_ipc,
        "arrows": pl.read_ipc_stream,
    }
    return readers[format](content)


def ok(answer: httpx2.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    return answer.json()


def problem(answer: httpx2.Response, status: int, code: str) -> dict[str, Any]:
    """The problem in a response, after a check of the fields that all problems have."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["status"], body["code"], body["type"]) == (status, code, f"/problems/{code}")
    assert body["detail"]
    for secret in ("Traceback", 'File "', "sqlalchemy", "SELECT ", "INSERT ", "site-packages", "batchserve/", ".py"):
        assert secret not in answer.text, answer.text
    return body


@pytest.fixture(scope="session")
def people_onnx() -> bytes:
    """A classifier of mixed columns: age (may be missing), city (text), visits (integers)."""
    ages, cities = [20, 25, 31, 38, 45, 52, 60, 71], ["Bern", "Biel", "Genf", "Bern"]
    people = pd.DataFrame(
        {
            "age": [float(ages[i % 8]) if i % 9 else float("nan") for i in range(240)],
            "city": [cities[i % 4] for i in range(240)],
            "visits": [(7 * i) % 12 for i in range(240)],
        }
    )
    regular = ["regular" if visits > 5 else "rare" for visits in people["visits"]]
    columns = make_column_transformer(
        (make_pipeline(SimpleImputer(), StandardScaler()), ["age"]),
        (OneHotEncoder(), ["city"]),
        ("passthrough", ["visits"]),
    )
    return convert(make_pipeline(columns, LogisticRegression(max_iter=1000)).fit(people, regular), people).onnx


@pytest.fixture(scope="session")
def reviews_onnx() -> bytes:
    """A classifier of one column of text."""
    texts = ["good film", "great good story", "bad film", "awful bad story", "great cast", "awful cast"] * 5
    reviews = pd.DataFrame({"text": texts})
    praise = ["good" in text or "great" in text for text in texts]
    columns = make_column_transformer((TfidfVectorizer(), "text"))
    return convert(make_pipeline(columns, LogisticRegression()).fit(reviews, praise), reviews).onnx


@pytest.fixture(scope="session")
def petals_onnx(iris: pd.DataFrame) -> bytes:
    """A regressor that predicts the width of a petal from three other measures."""
    columns = list(iris.columns[:3])
    return convert(Ridge().fit(iris[columns], iris[iris.columns[3]]), iris[columns]).onnx


@pytest.fixture(scope="session")
def api(
    tmp_path_factory: pytest.TempPathFactory,
    iris_onnx: Path,
    people_onnx: bytes,
    reviews_onnx: bytes,
    petals_onnx: bytes,
) -> Iterator[Api]:
    """The whole service in this process, with four models: iris, people, reviews, petals. A chunk has 100 records."""
    with running(tmp_path_factory.mktemp("api"), processes=2, chunk_records=100) as api:
        for name, model in (
            ("iris", iris_onnx),
            ("people", people_onnx),
            ("reviews", reviews_onnx),
            ("petals", petals_onnx),
        ):
            api.register(name, model)
        yield api


@pytest.fixture(scope="session")
def flowers(iris: pd.DataFrame) -> pl.DataFrame:
    """A table with the columns of the model iris, and one that it does not take."""
    return pl.from_pandas(iris).with_row_index("flower")


@pytest.fixture(scope="session")
def idle_api(tmp_path_factory: pytest.TempPathFactory, iris_onnx: Path) -> Iterator[Api]:
    """A service without a worker, with the model iris: queued jobs stay queued."""
    with running(tmp_path_factory.mktemp("idle"), worker=False) as api:
        api.register("iris", iris_onnx)
        yield api


@pytest.fixture
def own_api(tmp_path: Path) -> Iterator[Api]:
    """A service of this test alone, without a worker and models."""
    with running(tmp_path, worker=False) as api:
        yield api


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def database_settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The settings of a service that the tests of a module share, on every kind of database."""
    if request.param == "sqlite":
        return {"database": ""}
    server: postgres.Server = request.getfixturevalue("postgres_server")
    return {"database": server.migrated()}


def emptied(api: Api) -> None:
    """Removes all jobs and quotas of the tenant."""
    for quota in ok(api.http.get("/v1/quotas"))["quotas"]:
        api.http.delete(f"/v1/quotas/{quota['tenant']}")
    while jobs := ok(api.http.get("/v1/jobs", params={"limit": 200}))["jobs"]:
        for job in jobs:
            if job["state"] in ("queued", "running"):
                api.http.post(job["links"]["cancel"])
                api.finished(job["id"])
            api.http.delete(job["links"]["self"])
