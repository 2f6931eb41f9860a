"""The services of the profile `ray`, each on a host of its own: a network namespace, whose processes end together."""

import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path

import orjson
from namespaces import Namespace, Network, inside, network
from ray_hosts import PORT, NoCluster

from cluster.compose import Compose, clean
from cluster.services import Cluster, listens

HEAD, NODES = "ray-head", ("ray-node 1", "ray-node 2")
_START = 180.0
"""Seconds in which all are there: longer than the nodes wait for a lost head."""
_ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
"""Ray starts no second head where it sees processes of the first one's nodes."""
_MORE = {
    # All hosts share the memory and the files of this machine, and the paths of sockets must be short.
    "ray-head": ("--object-store-memory=80000000", "--temp-dir={folder}"),
    "ray-node": ("--object-store-memory=80000000",),
}


class Container:
    """A service of the file with its host, which is as if just switched on."""

    def __init__(self, host: Namespace, words: list[str], environment: Mapping[str, str], log: Path) -> None:
        host.stop()  # what is left of the one before
        self.host, self.log = host, log
        with log.open("wb") as said:
            self.process = subprocess.Popen(
                host.command(*_ALONE, *words), env=dict(environment),
                stdin=subprocess.DEVNULL, stdout=said, stderr=said,
            )  # fmt: skip

    def end(self) -> None:
        """As a power cut does."""
        self.host.stop()
        self.process.wait(30)


class RayCluster(Cluster):
    """PostgreSQL, an object store and an API on the switch of a network, and the services of the profile `ray` on its
    hosts: a head, two nodes that score, and drivers. This thread is on the switch."""

    def __init__(self, folder: Path, network: Network, **settings: str) -> None:
        """`network` has a host for each service, in the order of their start. `settings`: more environment of the API,
        the drivers and the nodes."""
        self._network, self._head = network, network.hosts[HEAD]
        self._sockets = tempfile.TemporaryDirectory(prefix="bsray", dir="/tmp", ignore_cleanup_errors=True)
        super().__init__(Compose(folder, network.switch.address, ray_head=self._head.address), 0, **settings)
        self._containers: dict[str, Container] = {}

    def start_missing(self) -> None:
        """Starts what is not running, as `restart: unless-stopped` does, and nothing that needs the head before it."""
        super().start_missing()
        for name, host in self._network.hosts.items():
            container = self._containers.get(name)
            if container is None or container.process.poll() is not None:
                if host is not self._head and not listens(self._head.address, PORT):
                    return
                self._containers[name] = self._started(name)

    def _started(self, name: str) -> Container:
        kind = name.partition(" ")[0]
        words = self.compose.command(kind) + [word.format(folder=self._sockets.name) for word in _MORE.get(kind, ())]
        # As many scoring processes as those of one host that has them all.
        processes = {"BATCHSERVE_PROCESSES": str(max(1, (os.cpu_count() or 1) // len(NODES)))}
        path = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        environment = clean() | path | self.compose.environment(kind) | self.settings | processes
        return Container(self._network.hosts[name], words, environment, self.compose.folder / f"{name}.log")

    def is_ready(self) -> bool:
        drivers = [name for name in self._containers if name.startswith("ray-driver")]
        return super().is_ready() and bool(drivers) and all(self._joined(name) == len(NODES) for name in drivers)

    def wait_until_ready(self, seconds: float = _START) -> None:
        super().wait_until_ready(seconds)

    def _joined(self, driver: str) -> int:
        """The number of hosts on which it has chunks scored. One that is started again has the name of the one before,
        whose loss may be told later."""
        joined: Counter[str] = Counter()
        silent: Counter[str] = Counter()
        for line in (self.compose.folder / f"{driver}.log").read_bytes().splitlines():
            match orjson.loads(line) if line.startswith(b"{") and line.endswith(b"}") else None:
                case {"action": "host_join", "event": event, "host": host}:
                    joined[host] += 1
                    silent[host] -= event == "Host answers again"
                case {"action": "host_silent", "host": host}:
                    joined[host] -= 1
                    silent[host] += 1
                case {"action": "host_lost", "host": host}:
                    (silent if silent[host] else joined)[host] -= 1
        return joined.total()

    def kill(self, name: str) -> None:
        """-9 for the API, or for all processes of a host."""
        if name in self._containers:
            self._containers[name].end()
        else:
            super().kill(name)

    def kill_process(self, name: str, process: str) -> bool:
        """-9 for the processes of a host with this in their command. Whether there was one."""
        if is_there := bool(self._network.hosts[name].processes(process)):
            self._network.hosts[name].kill(process)
        return is_there

    def kill_scoring_process(self, name: str) -> bool:
        return self.kill_process(name, "--multiprocessing-fork")

    def pause(self, driver: str) -> None:
        self._signal(driver, signal.SIGSTOP)

    def go_on(self, driver: str) -> None:
        self._signal(driver, signal.SIGCONT)

    def _signal(self, driver: str, number: signal.Signals) -> None:
        for pid in self._network.hosts[driver].processes("batchserve worker"):
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def cut(self, name: str) -> None:
        self._network.cut(self._network.hosts[name])

    def join(self, name: str) -> None:
        self._network.join(self._network.hosts[name])

    def stop(self) -> None:
        for container in self._containers.values():
            container.end()
        super().stop()
        self._sockets.cleanup()


@contextmanager
def on_ray(folder: Path, drivers: int = 1, **settings: str) -> Iterator[RayCluster]:
    """Such a cluster with all its data in `folder`, ready. Raises NoCluster and NoNamespaces."""
    if find_spec("ray") is None:
        raise NoCluster("Ray is not installed: pip install 'batchserve[ray]'")
    services = (HEAD, *NODES, *(f"ray-driver {number}" for number in range(1, drivers + 1)))
    with ExitStack() as end:
        made = end.enter_context(network(*services))
        end.enter_context(inside(made.switch))
        cluster = RayCluster(folder, made, **settings)
        end.callback(cluster.stop)
        cluster.start()
        yield cluster
