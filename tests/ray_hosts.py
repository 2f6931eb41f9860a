"""A Ray cluster for the tests: network namespaces joined by a veth pair, because Ray listens on all interfaces.

Cutting the pair is a partition. All hosts share this machine's files, processes and users.
"""

import ctypes
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path

from waiting import until

from batchserve.engines import Engine, open_engine, ray_cluster
from batchserve.settings import Settings

PORT = 6379
START = 90.0
"""Seconds in which a host starts."""
_CLONE_NEWNET = 0x40000000

_numbers = count(os.getpid() % 200)


class NoCluster(Exception):
    """No cluster is available; the message has the reason."""


class NoNamespaces(NoCluster):
    """This machine lets no process make network namespaces."""


class Host:
    """A network namespace, and in it a raylet, where one is started."""

    def __init__(self, cluster: "Cluster", name: str, number: int) -> None:
        self._cluster, self.name = cluster, name
        self.namespace = f"bs{os.getpid()}-{cluster.number}{name}"
        self.address = f"10.213.{cluster.number}.{number}"
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
                ["ip", "netns", "exec", self.namespace, *command, *(role if head else joining)],
                env=self._cluster.environment | {"PYTHONPATH": paths} | environment,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._await_raylet(before=time.monotonic() + START)

    def stop(self) -> None:
        """Ends all its processes, as a power cut would."""
        for pid in self.processes():
            _kill(pid)
        if self._process is not None:
            self._process.wait(10)

    def processes(self, named: str = "") -> list[int]:
        """The IDs of its running processes, or of those with this in their command."""
        inside = Path("/run/netns", self.namespace).stat().st_ino
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdecimal() and (entry / "ns/net").stat().st_ino == inside:
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    if int(entry.name) != os.getpid() and named in command:
                        found.append(int(entry.name))
        return found

    def kill(self, named: str) -> None:
        """kill -9 for its processes with this in their command; there is at least one."""
        pids = self.processes(named)
        assert pids, f"no process {named!r} on host {self.name}"
        for pid in pids:
            _kill(pid)

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

    def __init__(self, folder: Path, object_store: int = 80_000_000, cpus: int = 2) -> None:
        """`object_store`, `cpus`: of each host, in bytes and as Ray counts them; it starts as many idle workers."""
        self.folder, self.object_store, self.cpus = folder, object_store, cpus
        self.number = next(_numbers)  # Ray refuses an address that another cluster of this machine has
        own = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHSERVE_", "RAY_"))}
        self.environment = own | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0",
            "BATCHSERVE_PROCESSES": "1",
            "BATCHSERVE_PROCESS_MEMORY": str(512 * 2**20),
        }
        self.head, self.other = self.hosts = Host(self, "a", 1), Host(self, "b", 2)

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
        os.environ.update({name: self.environment[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")})
        ray_cluster.join(self.head.address, PORT)  # once: joining takes seconds
        try:
            yield
        finally:
            ray_cluster.leave()
            os.environ.clear()
            os.environ.update(before)

    def lay(self) -> None:
        """Lays the cable between the hosts."""
        for host in self.hosts:
            _ip("netns", "add", host.namespace)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
        first, second = self.hosts
        _ip("link", "add", "eth0", "netns", first.namespace, "type", "veth", "peer", "eth0", "netns", second.namespace)
        for host in self.hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", "eth0")
        self.join()

    def cut(self) -> None:
        _ip("-n", self.other.namespace, "link", "set", "eth0", "down")

    def join(self) -> None:
        for host in self.hosts:
            _ip("-n", host.namespace, "link", "set", "eth0", "up")

    def close(self) -> None:
        for host in self.hosts:
            with suppress(OSError):
                host.stop()
            subprocess.run(["ip", "netns", "delete", host.namespace], check=False, capture_output=True, timeout=10)


@contextmanager
def running(**how: int) -> Iterator[Cluster]:
    """A cluster of which both hosts run. `how`: as `Cluster` takes it. Raises NoCluster where Ray is missing or this
    user may make no namespaces."""
    if find_spec("ray") is None:
        raise NoCluster("Ray is not installed: make test-ray")
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NoNamespaces("network namespaces need root and the command ip (iproute2)")
    folder = Path(tempfile.mkdtemp(prefix="bsray", dir="/tmp"))  # the paths of sockets must be short
    made = Cluster(folder, **how)
    try:
        try:
            made.lay()
        except subprocess.SubprocessError as error:
            raise NoNamespaces(f"no network namespaces here: {error}") from error
        made.head.start(head=True)
        made.other.start()
        yield made
    finally:
        made.close()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def inside(host: Host) -> Iterator[None]:
    """This thread, and those that it starts, are on that host."""
    with Path("/proc/thread-self/ns/net").open() as own, Path("/run/netns", host.namespace).open() as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


@contextmanager
def joined() -> Iterator[Cluster]:
    """A cluster that this thread has joined as a driver on its head. Raises NoCluster."""
    with running() as made, inside(made.head), made.joined():
        yield made


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is new in Python 3.12
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def main() -> None:
    """For benchmarks: prints the address of a cluster, the beginning of commands that run on its head and their
    environment, as JSON, and ends with standard input."""
    with running(object_store=1 << 30, cpus=3) as cluster:
        names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")
        own = {name: cluster.environment[name] for name in names}
        sys.stdout.write(json.dumps([cluster.url, ["ip", "netns", "exec", cluster.head.namespace], own]) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
