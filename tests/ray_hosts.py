"""A Ray cluster for the tests: its hosts are network namespaces, because Ray listens on all interfaces.

Cutting one off is a partition. All hosts share this machine's files, processes and users.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import seaweed
from namespaces import Namespace, Network, inside, network
from proxy import Proxy
from waiting import until

from batchserve.engines import Engine, open_engine, ray_cluster
from batchserve.settings import Settings

PORT = 6379
WAYS = 9000
"""The port of the head by which its host reaches the object store; the other host has the next one."""
START = 90.0
"""Seconds in which a host starts."""


class NoCluster(Exception):
    """No cluster is available; the message has the reason."""


class Host:
    """A host on which a raylet runs, where one is started."""

    def __init__(self, cluster: "Cluster", name: str, place: Namespace) -> None:
        self._cluster, self.name, self.place = cluster, name, place
        self.address = place.address
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, head: bool = False, path: Path | None = None, **environment: str) -> None:
        """Starts its raylet, and with it the head's processes. `path`: a folder before all others of Python."""
        if self._process is not None:  # what is left of one that was killed
            self._process.kill()
            self._process.wait(10)
        ray = Path(sys.executable).with_name("ray")
        role = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={self._cluster.folder}"]
        joining = [f"--address={self._cluster.head.address}:{PORT}"]
        ips = [
            f"--node-ip-address={self.address}",
            f"--num-cpus={self._cluster.cpus}",
            f'--resources={{"{self.name}": 1}}',
        ]
        store = f"--object-store-memory={self._cluster.object_store}"
        command = [str(ray), "start", "--block", "--disable-usage-stats", store, *ips]
        before = [str(path)] if path else []
        paths = os.pathsep.join([*before, str(Path(__file__).parent)])
        with (self._cluster.folder / f"{self.name}.log").open("ab") as log:
            self._process = subprocess.Popen(
                self.place.command(*command, *(role if head else joining)),
                env=self._cluster.environment | {"PYTHONPATH": paths, "AWS_ENDPOINT_URL": self._way()} | environment,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._await_raylet(before=time.monotonic() + START)

    def _way(self) -> str:
        return f"http://{self._cluster.head.address}:{self._cluster.ways[self.name]}"

    def stop(self) -> None:
        """Ends all its processes, as a power cut would."""
        self.place.stop()
        if self._process is not None:
            self._process.wait(10)

    def processes(self) -> list[int]:
        """The IDs of its running processes."""
        return self.place.processes()

    def kill(self, named: str) -> None:
        """kill -9 for its processes with this in their command; there is at least one."""
        self.place.kill(named)

    def _await_raylet(self, before: float) -> None:
        """Until Ray says that it runs."""
        log = self._cluster.folder / f"{self.name}.log"
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if time.monotonic() > before or (self._process and self._process.poll() is not None):
                raise NoCluster(f"the host {self.name} did not start: {log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        log.write_text("")


class Cluster:
    """Two hosts, `a` with the head and `b`. Each has one scoring process of 512 MiB."""

    def __init__(self, folder: Path, network: Network, object_store: int = 80_000_000, cpus: int = 2) -> None:
        """`object_store`, `cpus`: of each host, in bytes and as Ray counts them; it starts as many idle workers."""
        self.folder, self.network, self.object_store, self.cpus = folder, network, object_store, cpus
        self.ways = {name: WAYS + place for place, name in enumerate(network.hosts)}
        of_others = ("BATCHSERVE_", "RAY_", "AWS_")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(of_others)}
        self.environment |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "BATCHSERVE_PROCESSES": "1",
            "BATCHSERVE_PROCESS_MEMORY": str(512 * 2**20),
            **self._keys(),
        }
        self.head, self.other = (Host(self, name, place) for name, place in network.hosts.items())

    @contextmanager
    def engine(self, folder: Path, processes: int = 2, capacity: int | None = None, **_: int) -> Iterator[Engine]:
        """An engine of the hosts, started in this process: of both, or for one process of the first. What a process may
        take are settings of the hosts. `capacity`: where it is to have another one."""
        reserved = {"CPU": 0.1} | ({self.head.name: 0.1} if processes == 1 else {})
        settings = Settings(storage=str(folder), engine=self.url, ray_reserved=reserved)
        with closing(open_engine(settings)) as engine:
            engine.start()
            until(lambda: engine.capacity == (capacity or processes))
            yield engine

    @property
    def url(self) -> str:
        return f"ray://{self.head.address}:{PORT}"

    @contextmanager
    def joined(self) -> Iterator[None]:
        """This process, on the host of the head, is a driver with the token of the cluster."""
        before = dict(os.environ)
        os.environ.update(self.token)
        ray_cluster.join(self.head.address, PORT)  # once: joining takes seconds
        try:
            yield
        finally:
            ray_cluster.leave()
            os.environ.clear()
            os.environ.update(before)

    @property
    def token(self) -> dict[str, str]:
        """That of its drivers."""
        return {name: self.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}

    def _keys(self) -> dict[str, str]:
        """Those of the object store, in files, as a container has them."""
        given = seaweed.keys()
        for name, value in given.items():
            (self.folder / name).write_text(value)
        return {f"{name}_FILE": str(self.folder / name) for name in given} | seaweed.PLACE

    @contextmanager
    def reaching(self, store: seaweed.Server) -> Iterator[dict[str, Proxy]]:
        """Each host reaches a store of this thread's host by a way of its own."""
        with ExitStack() as end:
            ways = {}
            for name, port in self.ways.items():
                with inside(self.head.place):
                    listener = socket.create_server((self.head.address, port))
                ways[name] = end.enter_context(closing(Proxy(store.port, listener)))
            yield ways

    def cut(self) -> None:
        self.network.cut(self.other.place)

    def join(self) -> None:
        self.network.join(self.other.place)

    def close(self) -> None:
        for host in (self.head, self.other):
            host.stop()


@contextmanager
def running(**how: int) -> Iterator[Cluster]:
    """A cluster of which both hosts run. `how`: as `Cluster` takes it. Raises NoCluster where Ray is missing, and
    NoNamespaces."""
    if find_spec("ray") is None:
        raise NoCluster("Ray is not installed: make test-ray")
    folder = Path(tempfile.mkdtemp(prefix="bsray", dir="/tmp"))  # the paths of sockets must be short
    try:
        with network("a", "b") as made:
            cluster = Cluster(folder, made, **how)
            try:
                cluster.head.start(head=True)
                cluster.other.start()
                yield cluster
            finally:
                cluster.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def joined() -> Iterator[Cluster]:
    """A cluster that this thread has joined as a driver on its head. Raises NoCluster and NoNamespaces."""
    with running() as made, inside(made.head.place), made.joined():
        yield made


def main() -> None:
    """For benchmarks: prints the address of a cluster, the beginning of commands that run on its head and their
    environment, as JSON, and ends with standard input."""
    with running(object_store=1 << 30, cpus=3) as cluster:
        sys.stdout.write(json.dumps([cluster.url, cluster.head.place.command(), cluster.token]) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
