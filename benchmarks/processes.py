"""The measured programs: servers and scripts, with the peak memory of every process that they start."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from benchmarks.environments import Unavailable, last_line
from benchmarks.peers.stopwatch import family

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
            pids = family(root)
            resident = sum(map(_resident, pids))
            # The system walks all pages to find those that are shared: each time, that would slow down the program.
            if resident > STEP * highest:
                highest = resident
                shares = [_share(pid) for pid in pids]
                peaks.together = max(peaks.together, sum(shares))
                peaks.largest = max(peaks.largest, *shares)
            for pid in pids:
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
def batchserve(folder: Path, before: Sequence[str] = (), **variables: str) -> Iterator[Server]:
    """The real server with its defaults and its data in `folder`, when it is ready.

    `before`: the beginning of its command, such as a tracer. `variables`: of its environment.
    """
    command = [*before, sys.executable, "-m", "batchserve", "serve", "--port", "0"]
    with started(command, folder, **variables) as server:
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
def started(command: Sequence[str], folder: Path, **variables: str) -> Iterator[Server]:
    """A server that prints the address at which it listens; its working directory is `folder`."""
    log = folder / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment() | variables) as process,
    ):
        try:
            yield Server(_address(process, log), process.pid)
        finally:
            process.terminate()
            try:
                process.wait(STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def environment() -> dict[str, str]:
    """The variables of this process without settings of the service."""
    return {name: value for name, value in os.environ.items() if not name.startswith("BATCHSERVE_")}


@dataclass(frozen=True, slots=True)
class Taken:
    """What a script took: the seconds and CPU seconds that it measured itself, without its imports, and its memory."""

    seconds: float
    cpu: float | None
    peaks: Peaks


def timed_script(
    python: Path,
    script: Path,
    *arguments: object,
    timeout: float,
    before: Sequence[str] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Taken:
    """Runs a script whose last line is its seconds, and its CPU seconds if it measures them.

    Its remaining processes are killed. `before`: the beginning of its command. `variables`: of its environment, with
    those of this process. Raises Unavailable when it fails or takes longer than `timeout` seconds.
    """
    command, own = [*before, str(python), str(script), *map(str, arguments)], os.environ | dict(variables)
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=script.parent, env=own
        ) as process,
        watched(process.pid) as peaks,
    ):
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"took more than {timeout:.0f} s") from None
        finally:
            _end(peaks, process.pid)
    if process.returncode:
        raise Unavailable(f"ended with {process.returncode}: {last_line(errors.decode(errors='replace'))}")
    seconds, *cpu = map(float, last_line(output.decode()).split())
    return Taken(seconds, cpu[0] if cpu else None, peaks)


def _end(peaks: Peaks, root: int) -> None:
    for pid in (root, *peaks.seen):
        if pid == root or _began(pid) == peaks.seen[pid] != "":
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def _address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            return found[0]
        time.sleep(0.05)
    raise Unavailable(f"the server did not start:\n{log.read_text()}")


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
