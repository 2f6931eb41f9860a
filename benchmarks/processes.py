"""The measured programs: servers and scripts, with the peak memory of every process that they start."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.environments import Unavailable

START_TIMEOUT = 60.0
STOP_TIMEOUT = 30.0
STEP = 1.01
"""Growth of resident memory after which the shares of the processes are read again."""


@dataclass
class Peaks:
    """The peak of the memory of all processes together, in bytes, and the observed processes.

    It is resident memory, in which shared pages are divided among their processes (PSS), so that they count once.
    """

    together: int = 0
    largest: int = 0
    """The peak memory of the largest process."""
    seen: dict[int, str] = field(default_factory=dict)
    """The start time of each process by its id, because an id may be reused."""


@contextmanager
def watched(root: int, pause: float = 0.05) -> Iterator[Peaks]:
    """Samples the memory of a process and its descendants while the block runs."""
    peaks, ended = Peaks(), threading.Event()

    def sample() -> None:
        highest = 0.0
        while not ended.wait(pause):
            family = _family(root)
            resident = sum(map(_resident, family))
            # The system walks all pages to find those that are shared: each time, that would slow down the program.
            if resident > STEP * highest:
                highest = resident
                shares = [_share(pid) for pid in family]
                peaks.together = max(peaks.together, sum(shares))
                peaks.largest = max(peaks.largest, *shares)
            for pid in family:
                if pid not in peaks.seen:
                    peaks.seen[pid] = _began(pid)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peaks
    finally:
        ended.set()
        sampler.join()


@dataclass(frozen=True, slots=True)
class Server:
    url: str
    pid: int


@contextmanager
def batchserve(folder: Path) -> Iterator[Server]:
    """The real server with its defaults and its data in `folder`, when it is ready."""
    with started([sys.executable, "-m", "batchserve", "serve", "--port", "0"], folder) as server:
        yield server


@contextmanager
def bare(folder: Path, **environment: str) -> Iterator[Server]:
    """The application in bare.py on uvicorn with the options of ours; its log is in `folder`."""
    home = folder / "bare"
    home.mkdir()
    options = ["--port", "0", "--http", "httptools", "--loop", "uvloop", "--no-access-log", "--no-server-header"]
    command = [sys.executable, "-m", "uvicorn", "benchmarks.bare:app", *options]
    root = Path(__file__).resolve().parent.parent
    with started(command, home, PYTHONPATH=str(root), **environment) as server:
        yield server


@contextmanager
def started(command: Sequence[str], folder: Path, **environment: str) -> Iterator[Server]:
    """A server that prints the address at which it listens; its working directory is `folder`."""
    log = folder / "server.log"
    own = {name: value for name, value in os.environ.items() if not name.startswith("BATCHSERVE_")}
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=own | environment) as process,
    ):
        try:
            yield Server(_address(process, log), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def timed_script(python: Path, script: Path, *arguments: object, timeout: float) -> tuple[float, Peaks]:
    """The seconds that a script prints as its last line, and its memory. Its remaining processes are killed.

    Raises Unavailable when it fails or takes longer than `timeout` seconds.
    """
    command = [str(python), str(script), *map(str, arguments)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=script.parent) as process,
        watched(process.pid) as peaks,
    ):
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"took more than {timeout:.0f} s") from None
        finally:
            _end(peaks, process.pid)
    if process.returncode:
        raise Unavailable(f"ended with {process.returncode}: {_last_line(errors)}")
    return float(_last_line(output)), peaks


def _end(peaks: Peaks, root: int) -> None:
    for pid in (root, *peaks.seen):
        if pid == root or _began(pid) == peaks.seen[pid] != "":
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _last_line(output: bytes) -> str:
    return output.decode(errors="replace").strip().rpartition("\n")[2]


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.05)
    raise Unavailable(f"the server did not start:\n{log.read_text()}")


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


def cpu_seconds(root: int) -> float:
    """User and system time of a process and its living descendants."""
    return sum(map(_cpu_seconds, _family(root)))


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _share(pid: int) -> int:
    """The PSS of a process in bytes."""
    try:
        found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return 1024 * int(found[1]) if found else 0


def _began(pid: int) -> str:
    """The start time in ticks since boot; empty if the process does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
