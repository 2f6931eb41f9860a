"""A PostgreSQL server and an object store for the hosts of a Ray cluster, each with its own way to the store."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import postgres
import seaweed
from bench import SHORT, Bench
from proxy import Proxy
from ray_hosts import Cluster

from batchserve.runtime import Runtime
from batchserve.settings import Settings


class NoServers(Exception):
    """One of them is not available; the message has the reason."""


@dataclass(frozen=True)
class Servers:
    database: postgres.Server
    store: seaweed.Server
    ways: Mapping[str, Proxy]
    """By the names of the hosts."""

    def places(self) -> dict[str, str]:
        """The settings of a service: a new database with this release's schema, and a storage without objects."""
        return {"storage": self.store.new_address(), "database": self.database.migrated()}


@contextmanager
def serving(cluster: Cluster) -> Iterator[Servers]:
    """On the host of this thread, whose process and its children reach the store as well. Raises NoServers."""
    with ExitStack() as end:
        try:
            database = end.enter_context(postgres.serving())
            store = end.enter_context(seaweed.serving())
        except (postgres.NoServer, seaweed.NoServer) as error:
            raise NoServers(str(error)) from error
        end.enter_context(patch.dict(os.environ, store.environment()))
        yield Servers(database, store, end.enter_context(cluster.reaching(store)))


@contextmanager
def bench_on(engine: str, places: Mapping[str, str], **settings: Any) -> Iterator[Bench]:
    """A worker's runtime with that engine and these places."""
    chosen = Settings(engine=engine, **(SHORT | {"lease": 30.0} | settings | dict(places)))
    with Runtime.open(chosen) as runtime:
        yield Bench(runtime.settings, runtime.database, runtime.storage, runtime.engine)


def worker_environment(cluster: Cluster, places: Mapping[str, str], way: Proxy | None = None) -> dict[str, str]:
    """Of a worker that is to run a chunk for each record. `way`: by which it reaches the store, if it is elsewhere."""
    own = {f"BATCHSERVE_{name.upper()}": value for name, value in places.items()}
    own |= {"BATCHSERVE_ENGINE": cluster.url, "BATCHSERVE_CHUNK_RECORDS": "1"}
    return os.environ | own | cluster.token | ({"AWS_ENDPOINT_URL": way.endpoint} if way else {})
