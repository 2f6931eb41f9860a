"""The cluster of docker-compose.yml under a killer: its servers are killed, too, and come back after a while."""

import random
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from cluster.services import Cluster, running

from chaos.audit import Verdict
from chaos.site import SETTINGS, Disturbed

AWAY = (0.0, 5.0)
"""Seconds that a killed server stays away."""


class ClusterSite(Disturbed):
    """An API and two workers on PostgreSQL and an object store."""

    kinds: tuple[str, ...] = ("api", "worker", "scoring process", "database", "object store")

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.end = folder, ExitStack()
        self._cluster: Cluster | None = None

    def started(self) -> Cluster:
        return self.end.enter_context(running(self.folder, 2, **SETTINGS))

    @property
    def cluster(self) -> Cluster:
        assert self._cluster is not None
        return self._cluster

    @property
    def url(self) -> str:
        return self.cluster.url

    def start(self) -> None:
        self._cluster = self.started()

    def wait_until_ready(self) -> None:
        self.cluster.wait_until_ready()

    def start_missing(self) -> None:
        self.cluster.start_missing()

    def kill(self, kind: str, chance: random.Random) -> bool:
        worker = chance.choice(("worker 1", "worker 2"))
        match kind:
            case "api":
                self.cluster.kill("api")
            case "worker":
                self.cluster.kill(worker)
            case "scoring process":
                return self.cluster.kill_scoring_process(worker)
            case "database":
                away(chance, self.cluster.crash_database, self.cluster.start_database)
            case "object store":
                away(chance, self.cluster.kill_objects, self.cluster.start_objects)
        return True

    def check(self, verdict: Verdict) -> None:
        """The audit has compared what a client sees; PostgreSQL checks its own pages."""

    def stop(self) -> None:
        self.end.close()


def away(
    chance: random.Random, end: Callable[[], None], begin: Callable[[], None], seconds: tuple[float, float] = AWAY
) -> None:
    """Ends something, and begins it again after a while."""
    end()
    time.sleep(chance.uniform(*seconds))
    begin()
