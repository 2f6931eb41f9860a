"""The processes of the run, which a killer ends and a supervisor restarts."""

import os
import random
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx2
from commands import FAST, Service

from chaos.audit import Verdict, check_database

SETTINGS = {
    **FAST,
    "BATCHSERVE_CHUNK_RECORDS": "2000",
    "BATCHSERVE_LEASE": "2.0",
    "BATCHSERVE_HEARTBEAT": "0.5",
    "BATCHSERVE_CRASHES": "1000000",  # kills alone must never fail a job
    "BATCHSERVE_FREE_BYTES": "0",
}
PAUSE = (1.5, 4.0)
"""Seconds from one kill to the next."""
KINDS = ("server", "worker", "scoring process")


class Site:
    """A server and two workers on the data of one folder."""

    kinds = KINDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.commands = {
            "server": ("serve", "--no-worker", "--port", str(self.port)),
            "worker 1": ("worker",),
            "worker 2": ("worker",),
        }
        self.services: dict[str, Service] = {}
        self.kills: Counter[str] = Counter()
        self._round: list[str] = []

    def check(self, verdict: Verdict) -> None:
        """After the end: the database is whole."""
        check_database(self.folder / "storage" / "batchserve.db", verdict)

    def start(self) -> None:
        """Starts the processes that are not running."""
        for name, command in self.commands.items():
            service = self.services.get(name)
            if service is None or service.process.poll() is not None:
                self.services[name] = Service(self.folder, *command, settings=SETTINGS)
                if service is not None:
                    service.log.unlink()

    def wait_until_ready(self, seconds: float = 60.0) -> None:
        """Waits until the server responds and every worker has started."""
        deadline = time.monotonic() + seconds
        while not self._is_ready():
            assert time.monotonic() < deadline, self.services["server"].log.read_text()[-4000:]
            self.start()
            time.sleep(0.1)
        for name, service in self.services.items():
            if name != "server":
                service.wait_for("Worker is ready", seconds)

    def _is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=5.0).is_success
        except httpx2.TransportError:
            return False

    def disturb(self, seconds: float, seed: int) -> None:
        """Kills a process every few seconds, and restarts those that have ended."""
        chance = random.Random(seed)
        end = time.monotonic() + seconds
        next_kill = time.monotonic() + chance.uniform(*PAUSE)
        while time.monotonic() < end:
            if time.monotonic() >= next_kill:
                self._kill(chance)
                next_kill = time.monotonic() + chance.uniform(*PAUSE)
            self.start()
            time.sleep(0.1)

    def _kill(self, chance: random.Random) -> None:
        """The next kind of process to kill: each once in a round, in a random order."""
        if not self._round:
            self._round = chance.sample(KINDS, len(KINDS))
        server, worker = self.services["server"], self.services[chance.choice(("worker 1", "worker 2"))]
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            victims = {
                "server": [server.process.pid],
                "worker": [worker.process.pid],
                "scoring process": chance.choice((worker, server)).scoring_processes(nicer=0),
            }
            kind = self._round[-1]
            if victims[kind]:  # a process that is starting has no scoring process yet: it is killed later
                os.kill(chance.choice(victims[kind]), signal.SIGKILL)
                self.kills[kind] += 1
                self._round.pop()

    def stop(self) -> None:
        """Kills all of them at once."""
        for service in self.services.values():
            service.process.terminate()
        for service in self.services.values():
            try:
                service.process.wait(30)
            finally:
                service.end(signal.SIGKILL)
