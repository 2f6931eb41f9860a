"""Power cuts: a file system that loses, from one moment on, all that was not on its disk."""

import hashlib
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import httpx2
import pytest
from commands import FAST, Service

from faults.steps import LONG

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

CUTS = int(os.environ.get("FAULTS_CUTS", "4"))
CLIENTS = 4


class Disk:
    """A separate ext4 in a file, mounted in a folder."""

    def __init__(self, folder: Path) -> None:
        self.image, self.folder = folder / "disk.img", folder / "disk"
        self.folder.mkdir()
        with self.image.open("wb") as file:
            file.truncate(128 * 2**20)

    def format(self) -> None:
        self._run("mkfs.ext4", "-q", str(self.image))

    def mount(self) -> None:
        self._run("mount", "-o", "loop", str(self.image), str(self.folder))

    def mount_anew(self) -> None:
        """As the next start finds it: the journal is replayed. It is a copy, since another process of the machine may
        have its own view of all mounts, in which the file system without power goes on: the kernel would mount that."""
        copy = self.image.with_name(f"{time.monotonic_ns()}.img")
        self._run("cp", "--sparse=always", str(self.image), str(copy))
        self.image.unlink()
        self.image = copy
        self.mount()

    def cut_power(self) -> None:
        """From now on nothing reaches the disk, not even the part of the journal that is in memory."""
        self._run("xfs_io", "-x", "-c", "shutdown", str(self.folder))

    def unmount(self) -> None:
        self._run("umount", str(self.folder))

    @staticmethod
    def _run(*command: str) -> None:
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A mounted disk whose power can be cut."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a disk")
    if missing := [tool for tool in ("mkfs.ext4", "xfs_io", "mount") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    disk = Disk(tmp_path)
    try:
        disk.format()
        disk.mount()
    except OSError as error:
        pytest.skip(f"no disk can be mounted here: {error}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=False, capture_output=True)


class Acknowledged:
    """The responses that clients received, kept on another disk."""

    def __init__(self) -> None:
        self.inputs: dict[str, str] = {}
        """Digests of the uploads that were answered with 201."""
        self.queued: set[str] = set()
        self.results: dict[str, str] = {}
        """Digests of the results that were downloaded."""

    def collect(self, url: str, number: int, stopped: threading.Event) -> None:
        """Runs one client until its server no longer responds."""
        with httpx2.Client(base_url=url, timeout=5) as client:
            try:
                while not stopped.is_set():
                    number += 1
                    content = f"{LONG}{number % 10}.5,1,1,1\n".encode()
                    uploaded = client.post("/v1/upload", content=content)
                    # A real power cut would have ended the service: what it says from then on does not count.
                    if uploaded.status_code != 201 or stopped.is_set():
                        continue
                    job_id = uploaded.json()["id"]
                    self.inputs[job_id] = hashlib.sha256(content).hexdigest()
                    if (
                        client.post(f"/v1/predict/{job_id}", params={"model": "iris"}).is_success
                        and not stopped.is_set()
                    ):
                        self.queued.add(job_id)
                    client.get(f"/v1/jobs/{job_id}", params={"wait": 1})
                    result = client.get(f"/v1/download/{job_id}")
                    if result.status_code == 200 and not stopped.is_set():
                        self.results[job_id] = hashlib.sha256(result.content).hexdigest()
            except httpx2.TransportError:
                return

    def require_all(self, url: str) -> None:
        """Everything acknowledged exists completely, queued jobs complete, and equal inputs have equal results."""
        by_input: dict[str, set[str]] = defaultdict(set)
        with httpx2.Client(base_url=url, timeout=60) as client:
            for job_id, sha256 in self.inputs.items():
                stored = client.get(f"/v1/download/{job_id}/input")
                assert stored.status_code == 200, f"{job_id} was acknowledged and is lost"
                assert hashlib.sha256(stored.content).hexdigest() == sha256, f"{job_id} holds other bytes"
            for job_id in self.queued:
                job = client.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()
                while job["state"] in ("queued", "running"):
                    job = client.get(f"/v1/jobs/{job_id}", params={"wait": 60}).json()
                assert job["state"] == "completed", job
                result = client.get(f"/v1/download/{job_id}")
                digest = hashlib.sha256(result.content).hexdigest()
                assert digest == job["result"]["sha256"], f"the result of {job_id} is damaged"
                assert self.results.setdefault(job_id, digest) == digest, f"the result of {job_id} has changed"
                by_input[self.inputs[job_id]].add(digest)
        assert all(len(digests) == 1 for digests in by_input.values())


def test_everything_acknowledged_before_a_power_cut_survives_it(
    disk: Disk, tmp_path: Path, iris_onnx: Path, tried: Counter[str]
) -> None:
    seed = int(os.environ.get("FAULTS_SEED", time.time_ns() % 10**6))
    print(f"FAULTS_SEED={seed}")  # noqa: T201
    chance = random.Random(seed)
    acknowledged = Acknowledged()
    settings = FAST | {"BATCHSERVE_STORAGE": str(disk.folder / "storage"), "BATCHSERVE_FREE_BYTES": "0"}
    for cut in range(CUTS):
        service = Service(tmp_path, "serve", "--port", "0", settings=settings)
        stopped = threading.Event()
        try:
            url = service.wait_for(r" at (http://\S+) ")[1]
            assert httpx2.put(f"{url}/v1/models/iris", content=iris_onnx.read_bytes(), timeout=60).is_success
            acknowledged.require_all(url)
            before = len(acknowledged.inputs)
            with ThreadPoolExecutor(CLIENTS) as pool:
                for number in range(CLIENTS):
                    pool.submit(acknowledged.collect, url, 1000 * cut + 100 * number, stopped)
                time.sleep(chance.uniform(0.5, 2.0))
                # Before it: ext4 reports success for a sync during the shutdown whose bytes it drops. A program that
                # only writes and syncs met that in 12 of 120 shutdowns, each time with its last sync.
                stopped.set()
                disk.cut_power()
                service.end(signal.SIGKILL)
            assert len(acknowledged.inputs) > before, "nothing was acknowledged that could have been lost"
        finally:
            stopped.set()
            service.end(signal.SIGKILL)
        disk.unmount()
        disk.mount_anew()
        with closing(sqlite3.connect(disk.folder / "storage" / "batchserve.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    service = Service(tmp_path, "serve", "--port", "0", settings=settings)
    try:
        acknowledged.require_all(service.wait_for(r" at (http://\S+) ")[1])
    finally:
        service.end(signal.SIGTERM)
    tried[f"power cuts (seed {seed}, {len(acknowledged.inputs)} uploads, {len(acknowledged.queued)} jobs)"] += CUTS
