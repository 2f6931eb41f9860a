"""The cluster of docker-compose.yml under a killer: its servers are killed, too, and come back after a while."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from cluster.compose import Compose
from cluster.services import Cluster

from chaos.audit import Verdict
from chaos.site import PAUSE, SETTINGS

AWAY = (0.0, 5.0)
"""Seconds that a killed server stays away."""


class ClusterSite:
    """An API and two workers on PostgreSQL and an object store."""

    kinds = ("api", "worker", "scoring process", "database", "object store")

    def __init__(self, folder: Path) -> None:
        self._cluster = Cluster(Compose(folder), 2, **SETTINGS)
        self.kills: Counter[str] = Counter()
        self._round: list[str] = []

    @property
    def url(self) -> str:
        return self._cluster.url

    def start(self) -> None:
        self._cluster.start()

    def wait_until_ready(self) -> None:
        self._cluster.wait_until_ready()

    def disturb(self, seconds: float, seed: int) -> None:
        """Kills a process or a server every few seconds, and starts what has ended."""
        chance = random.Random(seed)
        end = time.monotonic() + seconds
        next_kill = time.monotonic() + chance.uniform(*PAUSE)
        while time.monotonic() < end:
            if time.monotonic() >= next_kill:
                self._kill(chance)
                next_kill = time.monotonic() + chance.uniform(*PAUSE)
            self._cluster.start_missing()
            time.sleep(0.1)

    def _kill(self, chance: random.Random) -> None:
        """The next kind: each once in a round, in a random order."""
        if not self._round:
            self._round = chance.sample(self.kinds, len(self.kinds))
        kind = self._round[-1]
        worker = chance.choice(("worker 1", "worker 2"))
        act: dict[str, Callable[[], bool | None]] = {
            "api": lambda: self._cluster.kill("api"),
            "worker": lambda: self._cluster.kill(worker),
            "scoring process": lambda: self._cluster.kill_scoring_process(worker),
            "database": lambda: self._away(chance, self._cluster.crash_database, self._cluster.start_database),
            "object store": lambda: self._away(chance, self._cluster.kill_objects, self._cluster.start_objects),
        }
        if act[kind]() is not False:  # a worker that is starting has no scoring process yet
            self.kills[kind] += 1
            self._round.pop()

    def _away(self, chance: random.Random, end: Callable[[], None], begin: Callable[[], None]) -> None:
        end()
        time.sleep(chance.uniform(*AWAY))
        begin()

    def check(self, verdict: Verdict) -> None:
        """The audit has compared what a client sees; PostgreSQL checks its own pages."""

    def stop(self) -> None:
        self._cluster.stop()
