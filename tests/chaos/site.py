"""The processes of the run, which a killer ends and a supervisor restarts."""

import os
import random
import signal
import socket
import time
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress
from pathlib import Path

import httpx2
from commands import FAST, Service

from chaos import nightly
from chaos.audit import Verdict, check_database

SETTINGS = {
    **FAST,
    "BATCHSERVE_CHUNK_RECORDS": "2000",
    "BATCHSERVE_LEASE": "2.0",
    "BATCHSERVE_HEARTBEAT": "0.5",
    "BATCHSERVE_CRASHES": "1000000",  # kills alone must never fail a job
    "BATCHSERVE_FREE_BYTES": "0",
}


class Disturbed(ABC):
    """Processes that are killed, and what starts them again."""

    kinds: tuple[str, ...]
    pause = (1.5, 4.0)
    """Seconds from one kill to the next."""
    patience = 60.0
    """Seconds after the last kill in which all jobs end."""
    inputs: Path | None = None
    """A folder that clients write to and the service reads; None: they share none."""

    def __init__(self) -> None:
        self.kills: Counter[str] = Counter()
        self._round: list[str] = []

    def disturb(self, seconds: float, seed: int) -> None:
        """Kills something every few seconds, and starts what has ended."""
        chance = random.Random(seed)
        end = time.monotonic() + seconds
        next_kill = time.monotonic() + chance.uniform(*self.pause)
        while time.monotonic() < end:
            if time.monotonic() >= next_kill:
                self._kill_next(chance)
                next_kill = time.monotonic() + chance.uniform(*self.pause)
            self.start_missing()
            time.sleep(0.1)

    def _kill_next(self, chance: random.Random) -> None:
        """The next kind: each once in a round, in a random order. What cannot be killed yet is killed later."""
        if not self._round:
            self._round = chance.sample(self.kinds, len(self.kinds))
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if self.kill(self._round[-1], chance):
                self.kills[self._round.pop()] += 1

    @abstractmethod
    def kill(self, kind: str, chance: random.Random) -> bool:
        """Whether there was one."""

    @abstractmethod
    def start_missing(self) -> None:
        """Starts the processes that are not running."""


class Site(Disturbed):
    """A server and two workers on the data of one folder."""

    kinds = ("server", "worker", "scoring process")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.inputs = folder, folder / "inputs"
        self.inputs.mkdir()
        self.settings = SETTINGS | nightly.settings(self.inputs)
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

    def check(self, verdict: Verdict) -> None:
        """After the end: the database is whole."""
        check_database(self.folder / "storage" / "batchserve.db", verdict)

    def start(self) -> None:
        self.start_missing()

    def start_missing(self) -> None:
        for name, command in self.commands.items():
            service = self.services.get(name)
            if service is None or service.process.poll() is not None:
                self.services[name] = Service(self.folder, *command, settings=self.settings)
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

    def kill(self, kind: str, chance: random.Random) -> bool:
        server, worker = self.services["server"], self.services[chance.choice(("worker 1", "worker 2"))]
        victims = {
            "server": [server.process.pid],
            "worker": [worker.process.pid],
            "scoring process": chance.choice((worker, server)).scoring_processes(nicer=0),
        }
        if victims[kind]:  # a process that is starting has no scoring process yet
            os.kill(chance.choice(victims[kind]), signal.SIGKILL)
        return bool(victims[kind])

    def stop(self) -> None:
        """Kills all of them at once."""
        for service in self.services.values():
            service.process.terminate()
        for service in self.services.values():
            try:
                service.process.wait(30)
            finally:
                service.end(signal.SIGKILL)
