"""Registering, submitting and reading in a process without a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from service import running

from batchserve.direct import Direct
from batchserve.domain import JobState, Options
from batchserve.errors import (
    InvalidInput,
    InvalidOptions,
    ModelNotFound,
    ModelRefused,
    ResultNotReady,
    SchemaMismatch,
    UnsupportedMedia,
)
from batchserve.settings import Settings
from batchserve.storage import open_storage
from batchserve.submission import Queueing

CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(storage=str(tmp_path / "storage"))


@pytest.fixture
def direct(settings: Settings) -> Iterator[Direct]:
    with Direct.open(settings) as direct:
        yield direct


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "new.csv"
    file.write_bytes(CSV)
    return file


def stored(settings: Settings) -> list[str]:
    keys = [entry.key for entry in open_storage(settings.storage).list("")]
    return [key for key in keys if not key.startswith("batchserve.db")]


def test_a_file_that_is_submitted_directly_has_the_result_that_the_api_gives(
    tmp_path: Path, iris_onnx: Path, table: Path
) -> None:
    with running(tmp_path / "site") as api, Direct.open(api.settings) as direct:
        model = direct.register("iris", iris_onnx)
        job_id = direct.submit(table, model, Options("jsonl"))
        done = api.finished(job_id)
        assert (done["state"], done["input"]["filename"], done["options"]["format"]) == (
            "completed",
            "new.csv",
            "jsonl",
        )
        with direct.result(job_id) as result:
            assert result.read() == api.result(api.run(CSV, "iris", format="jsonl", reuse=False)).content


def test_a_direct_submission_reuses_the_result_of_an_equal_job(tmp_path: Path, iris_onnx: Path, table: Path) -> None:
    with running(tmp_path / "site") as api, Direct.open(api.settings) as direct:
        direct.register("iris", iris_onnx)
        earlier = api.run(CSV, "iris")
        job = direct.job(direct.submit(table, "iris"))
        assert (job.state, job.reused_from) == (JobState.COMPLETED, earlier["id"])
        again = direct.job(direct.submit(table, "iris", queueing=Queueing(reuse=False, priority=3)))
        assert (again.reused_from, again.priority) == (None, 3)


def test_equal_bytes_are_one_version_of_a_model(direct: Direct, iris_onnx: Path) -> None:
    first = direct.register("iris", iris_onnx)
    assert direct.register("iris", iris_onnx.read_bytes()) == first
    assert first.reference == "iris@1"


def test_a_model_that_is_refused_or_has_no_name_leaves_nothing(
    direct: Direct, settings: Settings, iris_onnx: Path
) -> None:
    with pytest.raises(ModelRefused):
        direct.register("iris", b"no model")
    with pytest.raises(InvalidOptions, match="name"):
        direct.register("no/name", iris_onnx)
    assert stored(settings) == []


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", InvalidInput),
        (b"other,columns\n1,2\n", SchemaMismatch),
        (b"%PDF-1.7", UnsupportedMedia),
    ],
)
def test_an_input_that_does_not_fit_its_model_leaves_nothing(
    direct: Direct, settings: Settings, iris_onnx: Path, tmp_path: Path, content: bytes, error: type[Exception]
) -> None:
    direct.register("iris", iris_onnx)
    before = stored(settings)
    (tmp_path / "odd").write_bytes(content)
    with pytest.raises(error):
        direct.submit(tmp_path / "odd", "iris")
    assert stored(settings) == before


def test_a_submission_for_a_missing_model_leaves_nothing(direct: Direct, settings: Settings, table: Path) -> None:
    with pytest.raises(ModelNotFound):
        direct.submit(table, "iris")
    assert stored(settings) == []


def test_a_queued_job_has_no_result_yet(direct: Direct, iris_onnx: Path, table: Path) -> None:
    direct.register("iris", iris_onnx)
    job_id = direct.submit(table, "iris@1")
    assert direct.job(job_id).state is JobState.QUEUED
    with pytest.raises(ResultNotReady, match=f"{job_id} is queued"):
        direct.result(job_id)
