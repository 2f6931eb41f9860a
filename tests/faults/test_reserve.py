"""On a disk that is full to the last byte, writes that free space still succeed: deletes, cancels, a start."""

import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from commands import FAST, Service
from service import Api, ok, problem, running

from batchserve.db import migrate
from batchserve.db.connect import Database
from faults.steps import HEADER, ROWS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

TABLE = HEADER + "".join(ROWS) * 100
SETTINGS: dict[str, Any] = {"chunk_records": 100, "rescue": 0.2, "worker": False}


@contextmanager
def mounted(folder: Path, kibibytes: int) -> Iterator[Path]:
    """A disk of that size, mounted at a new folder."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    made = subprocess.run(command, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no small disk can be mounted here: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path, name: str = "ballast") -> Path:
    """Occupies every free byte, also those that are freed meanwhile."""
    ballast = disk / name
    with ballast.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert os.statvfs(disk).f_bavail == 0
    return ballast


def cancelled(api: Api, job: dict[str, Any]) -> str:
    state: str = ok(api.http.post(job["links"]["cancel"]), 202)["state"]
    return state


@pytest.mark.parametrize("kibibytes", [2048, 4096, 32768])
def test_operations_that_free_space_work_on_a_full_disk(
    tmp_path: Path, iris_onnx: Path, kibibytes: int, tried: Counter[str]
) -> None:
    with mounted(tmp_path / "disk", kibibytes) as disk, running(disk / "storage", **SETTINGS) as api:
        model = api.register("iris", iris_onnx)
        uploads = [api.upload(TABLE) for _ in range(12)]
        queued = ok(api.http.post(f"/v1/predict/{uploads[-1]['id']}", params={"model": "iris"}), 202)
        ballast = fill(disk)
        problem(api.http.post("/v1/upload", content=TABLE), 507, "insufficient-storage")
        assert cancelled(api, queued) == "cancelled"
        assert cancelled(api, uploads[0]) == "cancelled"
        for job in uploads:
            fill(disk)  # another program uses the freed space at once
            assert api.http.delete(job["links"]["self"]).status_code == 204
        fill(disk)
        assert api.http.delete(model["links"]["self"]).status_code == 204
        assert not any(key.startswith(("inputs/", "models/")) for key in api.stored())
        ballast.unlink()
        assert api.upload(TABLE)["state"] == "uploaded"
        assert (disk / "storage" / "batchserve.db-reserve").stat().st_size >= 256 << 10
    tried["full disks"] += 1


@pytest.mark.parametrize("full", ["database", "storage", "both"])
def test_database_and_storage_may_be_on_two_disks(
    tmp_path: Path, iris_onnx: Path, full: str, tried: Counter[str]
) -> None:
    with mounted(tmp_path / "rows", 2048) as rows, mounted(tmp_path / "bytes", 4096) as stored:
        address = f"sqlite:///{rows / 'batchserve.db'}"
        with closing(Database(address)) as database:
            migrate.upgrade(database)
        with running(stored, database=address, **SETTINGS, inline_bytes=0) as api:
            api.register("iris", iris_onnx)
            uploads = [api.upload(TABLE) for _ in range(30)]
            disks = [rows] * (full != "storage") + [stored] * (full != "database")
            for disk in disks:
                fill(disk)
            problem(api.http.post("/v1/upload", content=TABLE), 507, "insufficient-storage")
            assert cancelled(api, uploads[0]) == "cancelled"
            for job in uploads:
                for disk in disks:
                    fill(disk)
                assert api.http.delete(job["links"]["self"]).status_code == 204
            for disk in disks:
                (disk / "ballast").unlink()
            assert api.upload(TABLE)["state"] == "uploaded"
    tried["full disks"] += len(disks)


def test_a_server_starts_on_a_full_disk_and_frees_it(tmp_path: Path, tried: Counter[str]) -> None:
    """After a crash as well: replaying the log of the database needs space."""
    with mounted(tmp_path / "disk", 4096) as disk:
        settings = FAST | {"BATCHSERVE_STORAGE": str(disk / "storage"), "BATCHSERVE_FREE_BYTES": "0"}
        for number in (signal.SIGKILL, signal.SIGTERM):
            service = Service(tmp_path, "serve", "--port", "0", settings=settings)
            url = service.wait_for(r" at (http://\S+) ")[1]
            with httpx2.Client(base_url=url, timeout=30) as http:
                ok(http.post("/v1/upload", content=TABLE), 201)
            service.end(number)
            ballast = fill(disk)
            service = Service(tmp_path, "serve", "--port", "0", settings=settings)
            url = service.wait_for(r" at (http://\S+) ")[1]
            try:
                with httpx2.Client(base_url=url, timeout=30) as http:
                    for job in http.get("/v1/jobs").json()["jobs"]:
                        assert http.delete(job["links"]["self"]).status_code == 204
                    problem(http.post("/v1/upload", content=TABLE * 500), 507, "insufficient-storage")
                    ballast.unlink()
                    ok(http.post("/v1/upload", content=TABLE), 201)
            finally:
                service.end(signal.SIGTERM)
    tried["full disks"] += 2


def test_a_running_job_that_waits_for_space_is_cancelled(tmp_path: Path, iris_onnx: Path, tried: Counter[str]) -> None:
    with mounted(tmp_path / "disk", 8192) as disk, running(disk / "storage", chunk_records=100, rescue=0.2) as api:
        api.register("iris", iris_onnx)
        query: dict[str, Any] = {"model": "iris", "reuse": False}
        job = ok(api.http.post("/v1/predict", params=query, content=TABLE * 100), 202)
        while api.job(job["id"])["chunks"]["done"] == 0:
            time.sleep(0.01)
        ballast = fill(disk)
        ok(api.http.post(job["links"]["cancel"]), 202)
        assert api.finished(job["id"])["state"] == "cancelled"
        fill(disk)
        assert api.http.delete(job["links"]["self"]).status_code == 204
        ballast.unlink()
    tried["full disks"] += 1


def test_expired_bytes_are_removed_on_a_full_disk(tmp_path: Path, tried: Counter[str]) -> None:
    with mounted(tmp_path / "disk", 2048) as disk, running(disk / "storage", keep_inputs=0.5, worker=False) as api:
        for _ in range(5):
            api.upload(TABLE)
        fill(disk)
        with running(disk / "storage", keep_inputs=0.5, sweep_age=0.2):  # a worker next to the server
            deadline = time.monotonic() + 30
            while any(key.startswith("inputs/") for key in api.stored()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
    tried["full disks"] += 1
