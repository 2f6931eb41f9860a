"""The cluster of docker-compose.yml with Ray under a killer, who also pauses drivers and cuts hosts off."""

import random
from functools import partial

from cluster.ray_services import NODES, RayCluster, on_ray

from chaos.cluster_site import ClusterSite, away
from chaos.site import SETTINGS

CUT = (2.0, 15.0)
"""Seconds for which a node is cut off, or a driver stopped: shorter and longer than what is taken for silence, and than
the lease."""
DRIVERS = ("ray-driver 1", "ray-driver 2")


class RaySite(ClusterSite):
    """An API and two drivers on PostgreSQL, an object store and Ray with a head and two nodes."""

    kinds = (
        *("api", "driver", "scoring process", "actor", "raylet", "node", "head", "database", "object store"),
        *("driver that is stopped", "node that is cut off"),
    )
    pause = (4.0, 12.0)
    patience = 240.0  # the nodes notice after a minute that their head was lost

    def started(self) -> RayCluster:
        settings = SETTINGS | {"BATCHSERVE_LEASE": "6.0", "BATCHSERVE_HEARTBEAT": "1.0"}
        self._ray = self.end.enter_context(on_ray(self.folder, drivers=len(DRIVERS), **settings))
        return self._ray

    def kill(self, kind: str, chance: random.Random) -> bool:
        node, driver = chance.choice(NODES), chance.choice(DRIVERS)
        match kind:
            case "driver":
                return self._ray.kill_process(driver, "batchserve worker")
            case "scoring process":
                return self._ray.kill_scoring_process(node)
            case "actor":
                return self._ray.kill_process(node, "ray::ScoringHost")
            case "raylet":
                return self._ray.kill_process(node, "raylet/raylet")
            case "node":
                self._ray.kill(node)
            case "head":
                self._ray.kill("ray-head")
            case "driver that is stopped":
                away(chance, partial(self._ray.pause, driver), partial(self._ray.go_on, driver), CUT)
            case "node that is cut off":
                away(chance, partial(self._ray.cut, node), partial(self._ray.join, node), CUT)
            case _:
                return super().kill(kind, chance)
        return True
