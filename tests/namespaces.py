"""Hosts for the tests: network namespaces around a switch, which is one as well. Cutting one off is a partition.

All share this machine's files, processes and users. Nothing outside reaches them.
"""

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path

_CLONE_NEWNET = 0x40000000
_numbers = count(os.getpid() % 200)


class NoNamespaces(Exception):
    """This machine lets no process make network namespaces; the message has the reason."""


class Namespace:
    """A host, with loopback and one address that the others reach."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address

    def command(self, *words: str) -> list[str]:
        """That which runs these words there."""
        return ["ip", "netns", "exec", self.name, *words]

    def processes(self, named: str = "") -> list[int]:
        """The IDs of its running processes, or of those with this in their command."""
        inside = Path("/run/netns", self.name).stat().st_ino
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

    def stop(self) -> None:
        """Ends all its processes, as a power cut would."""
        for pid in self.processes():
            _kill(pid)


class Network:
    """Namespaces that reach each other through a switch."""

    def __init__(self, number: int, *names: str) -> None:
        """`number` is in all addresses."""
        self._prefix = f"bs{os.getpid()}-{number}"
        self.switch = Namespace(f"{self._prefix}s", f"10.213.{number}.254")
        self.hosts = {
            name: Namespace(f"{self._prefix}h{place}", f"10.213.{number}.{place}")
            for place, name in enumerate(names, 1)
        }

    def lay(self) -> None:
        """Makes all of it."""
        for host in (self.switch, *self.hosts.values()):
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        _ip("-n", self.switch.name, "link", "add", "switch", "type", "bridge")
        _ip("-n", self.switch.name, "addr", "add", f"{self.switch.address}/24", "dev", "switch")
        _ip("-n", self.switch.name, "link", "set", "switch", "up")
        for place, host in enumerate(self.hosts.values()):
            end = f"port{place}"
            _ip("link", "add", "eth0", "netns", host.name, "type", "veth", "peer", end, "netns", self.switch.name)
            _ip("-n", self.switch.name, "link", "set", end, "master", "switch", "up")
            _ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", "eth0")
            self.join(host)

    def cut(self, host: Namespace) -> None:
        _ip("-n", host.name, "link", "set", "eth0", "down")

    def join(self, host: Namespace) -> None:
        _ip("-n", host.name, "link", "set", "eth0", "up")
        # A program takes the address of this way for that of the host.
        _ip("-n", host.name, "route", "replace", "default", "via", self.switch.address)

    def close(self) -> None:
        for host in (*self.hosts.values(), self.switch):
            with suppress(OSError):
                host.stop()
            subprocess.run(["ip", "netns", "delete", host.name], check=False, capture_output=True, timeout=10)


@contextmanager
def network(*names: str) -> Iterator[Network]:
    """A network of hosts with these names. Raises NoNamespaces."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        raise NoNamespaces("network namespaces need root and the command ip (iproute2)")
    with ExitStack() as end:
        made = Network(next(_numbers), *names)  # Ray refuses an address that another cluster of this machine has
        end.callback(made.close)
        try:
            made.lay()
        except subprocess.SubprocessError as error:
            raise NoNamespaces(f"no network namespaces here: {error}") from error
        yield made


@contextmanager
def inside(host: Namespace) -> Iterator[None]:
    """This thread, and those that it starts, are on that host."""
    with Path("/proc/thread-self/ns/net").open() as own, Path("/run/netns", host.name).open() as other:
        _enter(other.fileno())
        try:
            yield
        finally:
            _enter(own.fileno())


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns is new in Python 3.12
    if libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=10)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
