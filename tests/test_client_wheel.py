"""The client as a package of its own: what a program gets that only calls a server."""

import json
import shutil
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from environments import CLIENT, client_wheel, install, new_environment, run
from packaging.requirements import Requirement
from sklearn.datasets import load_iris

import batchserve
from batchserve.client import Client, extras

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 50 * 2**20
"""Bytes of the client with its dependencies."""


def test_the_client_alone_needs_what_the_service_needs_of_it() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    whole = {requirement.name: requirement for requirement in map(Requirement, metadata.requires("batchserve") or [])}
    extra = project["optional-dependencies"]["tables"]
    for requirement in map(Requirement, [*project["dependencies"], *extra]):
        assert requirement.specifier == whole[requirement.name].specifier
    assert project["requires-python"] == metadata.metadata("batchserve")["Requires-Python"]


def test_without_polars_a_table_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"a table needs polars: pip install 'batchserve-client\[tables\]'"):
        extras.require_polars("a table")
    with pytest.raises(ImportError, match="a server needs the whole service, and only its client is installed"):
        batchserve.local()
    with pytest.raises(ImportError, match=r"batchserve\.convert needs the whole service"):
        _ = batchserve.convert


# --- the wheel, in an empty environment ------------------------------------------------------------------------------

RECORDS = """
import batchserve, json, sys
from pathlib import Path

assert not {"polars", "numpy", "fastapi", "onnxruntime"} & set(sys.modules)
url, folder = sys.argv[1], Path(sys.argv[2])
with batchserve.Client(url) as client:
    client.models.add(folder / "iris.onnx", name="iris")
    rows = [json.loads(line) for line in (folder / "iris.jsonl").read_text().splitlines()]
    out = client.predict(rows, model="iris")
    assert [row["prediction"] for row in out] == json.loads((folder / "labels.json").read_text())
    target = client.predict(folder / "iris.csv", model="iris", output=folder / "out.csv")
    assert len(target.read_text().splitlines()) == len(rows) + 1
    job = client.submit((folder / "iris.jsonl").read_bytes(), "iris")
    assert b'"prediction"' in job.wait().result().read()
    for call in (batchserve.local, lambda: batchserve.convert, job.result().to_polars):
        try:
            call()
        except ImportError as error:
            print(error)
        else:
            raise AssertionError(call)
"""
TABLES = """
import batchserve, sys
import numpy as np, pandas as pd, polars as pl, pyarrow as pa
from pathlib import Path

url, folder = sys.argv[1], Path(sys.argv[2])
frame = pd.read_csv(folder / "iris.csv")
with batchserve.Client(url) as client:
    for table in (frame, pl.DataFrame(frame), pa.Table.from_pandas(frame)):
        out = client.predict(table, model="iris")
        assert type(out) is type(table), type(out)
        assert len(out) == len(frame)
    assert len(client.predict(frame.to_numpy(np.float32), model="iris")) == len(frame)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return client_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.slow
def test_the_wheel_has_the_client_and_nothing_of_the_service(wheel: Path) -> None:
    assert wheel.name == f"batchserve_client-{batchserve.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    own = {path.relative_to(ROOT).as_posix() for path in (ROOT / "batchserve" / "client").glob("*.py")}
    others = {"batchserve/__init__.py", "batchserve/errors.py", "batchserve/py.typed"}
    assert {name for name in names if not name.startswith("batchserve_client-")} == own | others


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_wheel_scores_on_a_server_from_an_empty_environment_of_20_megabytes(
    wheel: Path, server: str, iris_onnx: Path, tmp_path: Path
) -> None:
    iris = prepared(server, iris_onnx, tmp_path)
    python = new_environment(tmp_path / "venv")
    pinned = ("-c", ROOT / "constraints.txt")
    install(python, *pinned, wheel)
    installed = sum(path.stat().st_size for path in (tmp_path / "venv").rglob("*") if path.is_file())
    assert installed < LARGEST / 2, installed
    told = run(str(python), "-c", RECORDS, server, str(iris), cwd=tmp_path)
    assert told.count("needs the whole service") == 2
    assert "pip install 'batchserve-client[tables]'" in told
    install(python, *pinned, f"{wheel}[tables]", "pandas", "pyarrow")
    run(str(python), "-c", TABLES, server, str(iris), cwd=tmp_path)


def prepared(server: str, iris_onnx: Path, folder: Path) -> Path:
    """The model, its records and their labels, for a program that has no library to make them."""
    target = folder / "data"
    target.mkdir()
    shutil.copy(iris_onnx, target / "iris.onnx")
    frame = load_iris(as_frame=True).data
    frame.to_csv(target / "iris.csv", index=False)
    frame.to_json(target / "iris.jsonl", orient="records", lines=True)
    with Client(server) as client:
        client.models.add(iris_onnx, name="iris")
        labels = client.predict(frame, model="iris")["prediction"].tolist()
    (target / "labels.json").write_text(json.dumps(labels))
    return target
