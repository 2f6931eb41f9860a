"""The cluster of docker-compose.yml under a killer: its servers are killed, too, and come back after a while."""

import random
import time
from collections.abc import Callable
from pathlib import Path

from cluster.compose import Compose
from cluster.services import Cluster

from chaos.audit import Verdict
from chaos.site import SETTINGS, Disturbed

AWAY = (0.0, 5.0)
"""Seconds that a killed server stays away."""


class ClusterSite(Disturbed):
    """An API and two workers on PostgreSQL and an object store."""

    kinds = ("api", "worker", "scoring process", "database", "object store")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._cluster = Cluster(Compose(folder), 2, **SETTINGS)

    @property
    def url(self) -> str:
        return self._cluster.url

    def start(self) -> None:
        self._cluster.start()

    def wait_until_ready(self) -> None:
        self._cluster.wait_until_ready()

    def start_missing(self) -> None:
        self._cluster.start_missing()

    def kill(self, kind: str, chance: random.Random) -> bool:
        worker = chance.choice(("worker 1", "worker 2"))
        match kind:
            case "api":
                self._cluster.kill("api")
            case "worker":
                self._cluster.kill(worker)
            case "scoring process":
                return self._cluster.kill_scoring_process(worker)
            case "database":
                self._away(chance, self._cluster.crash_database, self._cluster.start_database)
            case "object store":
                self._away(chance, self._cluster.kill_objects, self._cluster.start_objects)
        return True

    def _away(self, chance: random.Random, end: Callable[[], None], begin: Callable[[], None]) -> None:
        end()
        time.sleep(chance.uniform(*AWAY))
        begin()

    def check(self, verdict: Verdict) -> None:
        """The audit has compared what a client sees; PostgreSQL checks its own pages."""

    def stop(self) -> None:
        self._cluster.stop()
