"""Hundreds of requests generated from the OpenAPI document: valid, invalid, and in the order of a job's life."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import httpx2
import pytest

from batchserve import keys
from batchserve.access import EVERY_TENANT, Scope
from batchserve.db.connect import Database

CHECKS = (
    "not_a_server_error,status_code_conformance,content_type_conformance,"
    "response_headers_conformance,response_schema_conformance,use_after_free,ignored_auth"
)
SECONDS = 40
CSV = b"sepal length (cm),sepal width (cm),petal length (cm),petal width (cm)\n5.1,3.5,1.4,0.2\n"
FAULTY = CSV + b"wide,3.5,1.4,0.2\n"
HOOKS = Path(__file__).with_name("openapi_hooks.py")
FOLLOWED = 10
"""Kinds of links that a run follows at least."""
LINKS = re.compile(r"API Links:\s+(\d+) covered / (\d+) selected")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("phases", ["examples,coverage,fuzzing", "stateful"])
@pytest.mark.parametrize("who", ["tenant", "admin"])
def test_a_running_server_with_keys_answers_as_its_openapi_document_says(
    who: str,
    phases: str,
    tmp_path: Path,
    iris_onnx: Path,
    start_server: Callable[..., AbstractContextManager[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with start_server(tmp_path, BATCHSERVE_PROCESSES="1", BATCHSERVE_FREE_BYTES="0") as url:
        admin, tenant = keys_in(tmp_path)
        register(url, admin, iris_onnx)
        key = admin if who == "admin" else tenant
        schedule = {"name": "nightly", "cron": "0 0 29 2 *", "action": "uploaded", "request": {"model": "iris"}}
        assert httpx2.post(f"{url}/v1/schedules", json=schedule, headers=bearer(tenant)).status_code == 201
        done = requests_made_of(url, key, phases, jobs_in(url, tenant), tmp_path)
        assert httpx2.get(f"{url}/readyz").json()["status"] == "ok"
        assert httpx2.get(f"{url}/v1/jobs", headers=bearer(key)).status_code == 200
        register(url, admin, iris_onnx)  # an admin may have removed it
        finished = httpx2.post(f"{url}/v1/predict?model=iris&reuse=false", content=CSV, timeout=60,
                               headers=bearer(tenant) | {"prefer": "wait=30"})  # fmt: skip
        assert finished.json().get("state") == "completed", finished.text
    with capsys.disabled():
        sys.stdout.write(done.stdout[done.stdout.find("API Operations:") :])
    assert done.returncode == 0, done.stdout
    summary = re.search(r"(\d+) generated", done.stdout)
    assert summary is not None
    assert int(summary[1]) > (50 if phases == "stateful" else 500)
    if phases == "stateful":
        links = LINKS.search(done.stdout)
        assert links is not None, done.stdout
        assert int(links[1]) >= FOLLOWED, links[0]


def requests_made_of(
    url: str, key: str, phases: str, jobs: list[str], folder: Path
) -> subprocess.CompletedProcess[str]:
    """The output of schemathesis when its time is over."""
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"]
    options = {"--checks": CHECKS, "--phases": phases, "--max-time": str(SECONDS), "--seed": "1",
               "--request-timeout": "30", "--header": f"Authorization: Bearer {key}"}  # fmt: skip
    return subprocess.run(
        [*command, "--no-color", "--no-shrink", *(word for option in options.items() for word in option)],
        check=False,
        cwd=folder,
        env=os.environ | {"SCHEMATHESIS_HOOKS": str(HOOKS), "OPENAPI_JOBS": ",".join(jobs)},
        capture_output=True,
        text=True,
    )


def keys_in(folder: Path) -> tuple[str, str]:
    """A key of an admin of all tenants, and one of a tenant; from now on every request needs one."""
    database = Database(f"sqlite:///{folder / 'storage' / 'batchserve.db'}")
    try:
        with database.write() as connection:
            admin = keys.create(connection, "admin", Scope.ADMIN, EVERY_TENANT, time.time())[1]
            return admin, keys.create(connection, "red", Scope.USER, "red", time.time())[1]
    finally:
        database.close()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def register(url: str, admin: str, model: Path) -> None:
    assert httpx2.put(f"{url}/v1/models/iris", content=model.read_bytes(), headers=bearer(admin)).is_success


def jobs_in(url: str, key: str) -> list[str]:
    """The IDs of jobs of a tenant that have ended, in whatever state."""
    query = {"model": "iris", "reuse": "false"}
    bodies = [(CSV, {}), (CSV, {"format": "parquet"}), (FAULTY, {}), (FAULTY, {"on_row_error": "fail"})]
    headers = bearer(key) | {"prefer": "wait=30"}
    answers = [
        httpx2.post(f"{url}/v1/predict", params=query | more, content=body, headers=headers, timeout=60)
        for body, more in bodies
    ]
    states = {answer.json()["state"] for answer in answers}
    assert states == {"completed", "failed"}
    return [answer.json()["id"] for answer in answers]
