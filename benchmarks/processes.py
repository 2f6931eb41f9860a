"""Programs under measurement: a server of ours, or a script; with the peak memory of every process they start."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

MIB = 2**20


@dataclass
class Peaks:
    """Peak resident memory in bytes by process, and the peak of their sum."""

    by_process: dict[int, int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)
    together: int = 0

    def named(self, name: str) -> int:
        """The highest peak of the processes of this name; 0 when there was none."""
        return max((peak for pid, peak in self.by_process.items() if self.names[pid] == name), default=0)


@contextmanager
def watched(root: int, pause: float = 0.05) -> Iterator[Peaks]:
    """Samples the memory of a process and its descendants while the block runs."""
    peaks, ended = Peaks(), threading.Event()

    def sample() -> None:
        while not ended.wait(pause):
            together = 0
            for pid in _family(root):
                resident = _resident(pid)
                together += resident
                peaks.by_process[pid] = max(peaks.by_process.get(pid, 0), resident)
                peaks.names.setdefault(pid, "server" if pid == root else "scoring process")
            peaks.together = max(peaks.together, together)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peaks
    finally:
        ended.set()
        sampler.join()


@dataclass(frozen=True)
class Server:
    url: str
    pid: int


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """The real server with its defaults, its data in `folder`, ready to answer."""
    log = folder / "server.log"
    own = {name: value for name, value in os.environ.items() if not name.startswith("BATCHSERVE_")}
    command = [sys.executable, "-m", "batchserve", "serve", "--port", "0"]
    with log.open("wb") as stderr, subprocess.Popen(command, cwd=folder, stderr=stderr, env=own) as process:
        try:
            yield Server(_address(process, log), process.pid)
        finally:
            process.terminate()


def timed_script(script: Path, *arguments: str) -> tuple[float, Peaks]:
    """Seconds and memory of a Python script, imports included: that is what its user waits for."""
    started = time.perf_counter()
    with subprocess.Popen([sys.executable, str(script), *arguments]) as process, watched(process.pid) as peaks:
        code = process.wait()
    if code:
        raise SystemExit(f"{script.name} ended with {code}")
    return time.perf_counter() - started, peaks


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r" at (http://\S+) ", log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"the server did not start:\n{log.read_text()}")


def _family(root: int) -> list[int]:
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for file in Path(f"/proc/{pid}/task").glob("*/children"):
            try:
                waiting += [int(child) for child in file.read_text().split()]
            except OSError:
                continue
    return found


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0
