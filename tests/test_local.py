"""A server of one's own, from a program or a notebook: `batchserve.local()`."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

import batchserve
from batchserve.errors import ConversionFailed, InvalidInput, PayloadTooLarge, Unavailable


@pytest.fixture(scope="module")
def pipeline(iris: pd.DataFrame) -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression()).fit(iris, load_iris().target)


def answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5.0).is_success
    except httpx2.TransportError:
        return False


def test_three_lines_lead_from_an_estimator_to_predictions(pipeline: Pipeline, iris: pd.DataFrame) -> None:
    with batchserve.local() as client:
        client.models.add(pipeline, iris, name="iris")
        out = client.predict(iris, model="iris")
        url = client.url
    assert (out["prediction"].to_numpy() == pipeline.predict(iris)).all()
    assert not answers(url)


@pytest.mark.slow
def test_a_named_storage_outlives_its_server_and_takes_settings(
    pipeline: Pipeline, iris: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHSERVE_DATABASE", "sqlite:///elsewhere.db")
    client = batchserve.local(storage="kept", processes=1, upload_bytes=100_000)
    try:
        client.models.add(pipeline, iris, name="iris")
        with pytest.raises(PayloadTooLarge):
            client.upload(b"x,y\n" * 50_000)
    finally:
        client.close()
    with batchserve.local(storage="kept") as again:
        assert [model.name for model in again.models.list()] == ["iris"]
    assert not (tmp_path / "elsewhere.db").exists()


def test_models_are_added_in_every_form_that_they_have(
    pipeline: Pipeline, iris: pd.DataFrame, server: str, tmp_path: Path
) -> None:
    conversion = batchserve.convert(pipeline, iris)
    path = conversion.save(tmp_path / "iris.onnx")
    forms: list[object] = [conversion, conversion.onnx, path, str(path), onnx.load(path)]
    with batchserve.Client(server) as client:
        added = [client.models.add(form, name="every-form") for form in forms]
        fitted = client.models.add(pipeline, iris, name="every-form")
        assert {model.digest for model in added} == {fitted.digest}
        with pytest.raises(InvalidInput, match=r"add\(model, X, name="):
            client.models.add(pipeline, name="every-form")


def test_a_folder_of_mlflow_is_added_with_its_sample(
    pipeline: Pipeline, iris: pd.DataFrame, server: str, tmp_path: Path
) -> None:
    columns = json.dumps([{"name": name, "type": "double", "required": True} for name in iris.columns])
    (tmp_path / "MLmodel").write_text(
        f"flavors:\n  sklearn:\n    pickled_model: model.pkl\nsignature:\n  inputs: '{columns}'\n"
    )
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(pipeline))
    with batchserve.Client(server) as client:
        client.models.add(tmp_path, iris, name="folder")
        scored = client.predict(iris, model="folder")
        assert scored["prediction"].tolist() == pipeline.predict(iris).tolist()
        with pytest.raises(ConversionFailed, match="Pass a sample"):
            client.models.add(tmp_path, name="folder")


@pytest.mark.slow
def test_a_server_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    program = "import batchserve, time; client = batchserve.local(); print(client.url, flush=True); time.sleep(100)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert answers(url)
        os.kill(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while answers(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(url)


@pytest.mark.parametrize(
    ("name", "close"),
    [("proceses", r" \(close: 'processes'"), ("PROCESSES", r" \(close: 'processes'"), ("port", "; docs/settings.md")],
)
def test_a_setting_that_does_not_exist_is_refused_before_a_server_starts(
    name: str, close: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)  # nothing is started
    with pytest.raises(TypeError, match=rf"local\(\) has no setting '{name}'{close}"):
        batchserve.local(None, **{name: 2})


@pytest.mark.slow
def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(Unavailable, match="did not start"):
        batchserve.local(storage=tmp_path / "file")
    with pytest.raises(Unavailable, match="BATCHSERVE_PROCESSES"):
        batchserve.local(processes=-1)


@pytest.mark.slow
def test_the_example_of_a_chain_runs_and_answers_as_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parent.parent / "docs" / "python.md").read_text(encoding="utf-8")
    example = page.partition("### Graphs of several parts")[2].partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(example, names)  # noqa: S102 - the page's own example
    expected = names["model"].predict_proba(names["scaler"].transform(names["X"]))
    given = names["scored"].filter(like="probability").to_numpy()
    assert np.allclose(given, expected, atol=1e-5)
    assert (tmp_path / "whole.onnx").exists()
