"""Processes that each run one step of the service (steps.py), with a tracer that makes their system calls fail."""

import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import orjson
import postgres

from faults import steps

CALLS = ("fsync", "fdatasync", "rename", "write", "pwrite64", "copy_file_range", "unlink", "rmdir")
"""The system calls by which the service writes to the disk or removes something from it."""
TIMEOUT = 60.0
_children = threading.Lock()
"""Two threads must not wait for the same process."""


@dataclass(frozen=True)
class Fault:
    """The fault at the `number`-th call of a name, counted from the beginning of a step: `signal=KILL`, `error=EIO`."""

    call: str
    number: int
    effect: str

    def __str__(self) -> str:
        return f"{self.effect} at {self.call} {self.number}"


@dataclass
class Ended:
    """A step that has ended, regularly or not."""

    exitcode: int
    events: list[dict[str, Any]]
    trace: list[str] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        return any(event["event"] == "done" for event in self.events)

    @property
    def met_its_fault(self) -> bool:
        return any("(INJECTED)" in line or "killed by SIGKILL" in line for line in self.trace)

    def all(self, name: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == name]

    def the(self, name: str) -> dict[str, Any]:
        (event,) = self.all(name)
        return event


class Step:
    """A process that is ready to run one step, and starts it at `begin`."""

    def __init__(self, name: str, storage: Path, **arguments: Any) -> None:
        self._channel, theirs = socket.socketpair()
        settings = {**postgres.chosen_database(storage), **arguments.pop("settings", {})}
        with theirs, _children:
            self.process: BaseProcess = _forks().Process(
                target=steps.perform, args=(name, str(storage), theirs, arguments, settings), name=name, daemon=True
            )
            self.process.start()
        self._channel.settimeout(TIMEOUT)
        self._told = self._channel.recv(1 << 16)
        assert b"ready" in self._told, self._told.decode()
        self.thread: int = orjson.loads(self._told)["thread"]

    def begin(self) -> "Step":
        self._channel.sendall(b"!")
        return self

    def end(self) -> Ended:
        """Waits for the end of the process."""
        told = self._told
        with self._channel:
            try:
                while block := self._channel.recv(1 << 20):
                    told += block
            except ConnectionResetError:  # it was killed with our byte unread
                pass
            except TimeoutError:
                self.process.kill()
                raise AssertionError(f"{self.process.name} did not end in {TIMEOUT:g} s: {told!r}") from None
        with _children:
            self.process.join(TIMEOUT)
            exitcode = self.process.exitcode
            assert exitcode is not None
            self.process.close()
        return Ended(exitcode, [orjson.loads(line) for line in told.splitlines()])


@cache
def _forks() -> multiprocessing.context.ForkServerContext:
    """A server that has imported the steps, and forks. Threads do not survive a fork, but it has none that matter."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([steps.__name__])
    path = os.environ.get("PYTHONPATH")
    here = str(Path(__file__).parents[1])
    changed = {"PYTHONPATH": here + (os.pathsep + path if path else ""), "POLARS_MAX_THREADS": "1"}
    before = {name: os.environ.get(name) for name in changed}
    os.environ.update(changed)
    try:
        context.Process(target=int).start()  # the server starts with its first process, in this environment
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def take(name: str, storage: Path, **arguments: Any) -> Ended:
    """A step without faults."""
    ended = Step(name, storage, **arguments).begin().end()
    assert ended.is_done, f"{name} ended with {ended.exitcode}: {ended.events[-1].get('error', ended.events)}"
    return ended


def take_traced(name: str, storage: Path, fault: Fault | None, **arguments: Any) -> Ended:
    """A step under strace, which counts its calls or makes one of them fail."""
    step = Step(name, storage, **arguments)
    with traced(step.thread, storage.with_suffix(".trace"), fault) as trace:
        ended = step.begin().end()
    ended.trace = trace.read_text(errors="replace").splitlines()
    trace.unlink()
    return ended


@contextmanager
def traced(thread: int, log: Path, fault: Fault | None = None) -> Iterator[Path]:
    """Counts begin after the start-up, and are those of one thread, so that they are the same in every run."""
    command = ["strace", "-y", "-s", "0", "-o", str(log), "-p", str(thread), "-e", f"trace={','.join(CALLS)}"]
    if fault is not None:
        command += ["-e", f"inject={fault.call}:{fault.effect}:when={fault.number}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        said = strace.stderr.readline()
        assert "attached" in said, said
        try:
            yield log
        finally:
            strace.communicate(timeout=TIMEOUT)


def disk_calls(trace: list[str], storage: Path) -> list[tuple[str, int]]:
    """The calls that touched a file of the storage: name, and number among the calls of that name, as strace counts.

    Other calls of that name wake up threads, for example.
    """
    numbers: Counter[str] = Counter()
    found = []
    for line in trace:
        if (call := re.match(r"\w+(?=\()", line)) is not None:
            numbers[call[0]] += 1
            if str(storage) in line:
                found.append((call[0], numbers[call[0]]))
    return found


@cache
def why_not_traced() -> str | None:
    """The reason why nothing can be traced on this host."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        command = ["strace", "-e", "trace=none", "-p", str(sleeper.pid)]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
            assert strace.stderr is not None
            said = strace.stderr.readline().strip()
            sleeper.kill()
    return None if "attached" in said else f"strace may not trace here: {said}"
