"""The server of a run: a separate process on an empty folder, with keys and models."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import orjson
from commands import FAST, Service

from batchserve import keys
from batchserve.access import Scope
from batchserve.runtime import open_database
from batchserve.settings import Settings
from fuzz.models import registered

SETTINGS = FAST | {
    "BATCHSERVE_CHUNK_RECORDS": "100",
    "BATCHSERVE_LEASE": "30",
    "BATCHSERVE_HEARTBEAT": "1",
    "BATCHSERVE_PROCESS_MEMORY": str(700 * 2**20),
    "BATCHSERVE_ADMISSION_TIMEOUT": "10",
    "BATCHSERVE_ONLINE_TIMEOUT": "10",
    "BATCHSERVE_CHUNK_TIMEOUT": "20",
    "BATCHSERVE_HEAD_TIMEOUT": "5",
    "BATCHSERVE_BODY_IDLE": "5",
    "BATCHSERVE_FREE_BYTES": "0",
    "BATCHSERVE_LOG_FORMAT": "json",
    "BATCHSERVE_LOG_LEVEL": "warning",
}
TENANTS = ("blue", "red")
DOCTOR = ("storage", "database", "database file", "stored bytes", "stuck jobs")
"""The checks of doctor that concern the data of a run; the others concern the host."""


class Site:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.service = Service(folder, "serve", "--port", "0", settings=SETTINGS | {"BATCHSERVE_LOG_LEVEL": "info"})
        self.keys: dict[str, str] = {}

    def open(self) -> None:
        """Returns when the server is ready, with active keys and all models."""
        self.url = self.service.wait_for(r" at (http://[^\s\"]+)")[1]
        self.port = int(self.url.rpartition(":")[2])
        with open_database(Settings(storage=str(self.folder / "storage"))) as database:
            for name in (*TENANTS, "admin"):
                scope, tenant = (Scope.ADMIN, "*") if name == "admin" else (Scope.USER, name)
                with database.write() as connection:
                    self.keys[name] = keys.create(connection, name, scope, tenant, time.time())[1]
        headers = {"authorization": f"Bearer {self.keys['admin']}"}
        for name, model in registered().items():
            answer = httpx2.put(f"{self.url}/v1/models/{name}", content=model, headers=headers, timeout=60)
            answer.raise_for_status()

    @property
    def runs(self) -> bool:
        return self.service.process.poll() is None

    def resident(self) -> int:
        """The resident memory of the server, in bytes."""
        pages = Path(f"/proc/{self.service.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def faults_in_log(self) -> list[str]:
        """The lines of the log with an error of the server."""
        lines = self.service.log.read_text(errors="replace").splitlines()
        return [line for line in lines if "Traceback" in line or "internal-error" in line]

    def examined(self) -> list[str]:
        """The findings of `batchserve doctor`."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BATCHSERVE_")}
        done = subprocess.run(
            [sys.executable, "-m", "batchserve", "doctor", "--deep", "--json"],
            cwd=self.folder, env=environment | SETTINGS, capture_output=True, text=True, check=False, timeout=300,
        )  # fmt: skip
        try:
            findings = orjson.loads(done.stdout)
        except orjson.JSONDecodeError:
            return [f"doctor does not answer: {done.stderr[-2000:]}"]
        return [
            f"{finding['check']}: {finding['detail']} {finding['faults'][:3]}"
            for finding in findings
            if finding["status"] != "ok" and finding["check"] in DOCTOR
        ]

    def close(self) -> bool:
        """Whether the server ended after SIGTERM."""
        self.service.process.send_signal(signal.SIGTERM)
        try:
            return self.service.process.wait(40) in (0, -signal.SIGTERM)
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.service.end()
