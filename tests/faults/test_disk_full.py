"""A disk without space: refused requests leave nothing, jobs wait, and continue by themselves when there is space."""

import os
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from io import RawIOBase
from pathlib import Path

import pytest
from service import Api, problem, running

from faults.steps import HEADER, ROWS

pytestmark = [pytest.mark.faults, pytest.mark.timeout(120)]

MEBI = 2**20
TABLE = HEADER + "".join(ROWS) * 30_000  # 1.5 MB, 180 chunks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 32 MiB."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(tmp_path)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.fixture
def api(disk: Path, iris_onnx: Path) -> Iterator[Api]:
    with running(disk / "storage", chunk_records=500, rescue=0.2) as api:
        api.register("iris", iris_onnx)
        yield api


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fills the disk to the last byte."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for block in (MEBI, 4096, 1):
            with pytest.raises(OSError, match="No space left"):
                _write_forever(file, block)
    try:
        yield
    finally:
        ballast.unlink()


def _write_forever(file: RawIOBase, block: int) -> None:
    while True:
        file.write(bytes(block))


def test_an_upload_that_does_not_fit_is_refused_and_leaves_nothing(api: Api, tried: Counter[str]) -> None:
    with api.unchanged():
        problem(api.http.post("/v1/upload", content=(TABLE * 30).encode()), 507, "insufficient-storage")
    assert api.upload(TABLE)["state"] == "uploaded"
    tried["full disks"] += 1


def test_uploads_are_refused_while_nothing_fits_and_accepted_afterwards(
    api: Api, disk: Path, tried: Counter[str]
) -> None:
    before = api.upload(TABLE)
    with full(disk), api.unchanged():
        for _ in range(3):
            problem(api.http.post("/v1/upload", content=TABLE.encode()), 507, "insufficient-storage")
            problem(api.http.post("/v1/predict?model=iris", content=TABLE.encode()), 507, "insufficient-storage")
    after = api.upload(TABLE)
    assert before["input"]["sha256"] == after["input"]["sha256"]
    tried["full disks"] += 1


def test_a_running_job_waits_for_space_and_completes_by_itself(api: Api, disk: Path, tried: Counter[str]) -> None:
    undisturbed = api.run(TABLE, "iris")
    assert api.http.delete(undisturbed["links"]["self"]).status_code == 204
    job = api.http.post("/v1/predict", params={"model": "iris", "reuse": False}, content=TABLE.encode()).json()
    while api.job(job["id"])["chunks"]["done"] == 0:
        time.sleep(0.01)
    with full(disk):
        time.sleep(1)
        waiting = api.job(job["id"])
        assert waiting["state"] == "running", waiting
        time.sleep(1)
        assert api.job(job["id"])["chunks"] == waiting["chunks"], "no job continues without space"
    done = api.finished(job["id"])
    assert (done["state"], done["attempt"]) == ("completed", 1), done
    assert done["result"]["sha256"] == undisturbed["result"]["sha256"]
    tried["full disks"] += 1
