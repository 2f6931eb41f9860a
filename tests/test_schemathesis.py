"""Requests made of the OpenAPI document, in the hundreds: valid, invalid, and in the order of a job's life."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance,use_after_free"
)
SECONDS = 60
CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
FAULTY = CSV + b"wide,3.5,1.4,0.2\n"
HOOKS = Path(__file__).with_name("openapi_hooks.py")


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_running_server_answers_as_its_openapi_document_says(
    tmp_path: Path,
    iris_onnx: Path,
    start_server: Callable[..., AbstractContextManager[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with start_server(tmp_path, BATCHSERVE_PROCESSES="1", BATCHSERVE_FREE_BYTES="0") as url:
        assert httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes()).is_success
        environment = os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS), "OPENAPI_JOBS": ",".join(jobs_in(url))}
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
        options = [
            "--checks",
            CHECKS,
            "--max-time",
            str(SECONDS),
            "--seed",
            "1",
            "--no-color",
            "--no-shrink",
            "--request-timeout",
            "30",
        ]
        done = subprocess.run(
            [*command, *options], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert httpx2.get(f"{url}/readyz").json()["status"] == "ok"
    with capsys.disabled():
        sys.stdout.write(done.stdout[done.stdout.find("API Operations:") :])
    assert done.returncode == 0, done.stdout
    summary = re.search(r"(\d+) generated", done.stdout)
    assert summary is not None
    assert int(summary[1]) > 1000


def jobs_in(url: str) -> list[str]:
    """IDs of jobs that have ended, well or not."""
    query = {"model": "iris", "reuse": "false"}
    bodies = [(CSV, {}), (CSV, {"format": "parquet"}), (FAULTY, {}), (FAULTY, {"on_row_error": "fail"})]
    answers = [
        httpx2.post(f"{url}/v1/predict", params=query | more, content=body, headers={"prefer": "wait=30"}, timeout=60)
        for body, more in bodies
    ]
    states = {answer.json()["state"] for answer in answers}
    assert states == {"completed", "failed"}
    return [answer.json()["id"] for answer in answers]
