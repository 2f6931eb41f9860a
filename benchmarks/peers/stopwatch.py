"""The time of a stretch of a script, with the CPU time of every process that takes part in it."""

import os
import time
from contextlib import suppress
from pathlib import Path


class Stopwatch:
    """Printed, it gives what the harness reads: the seconds since it was made, and the CPU seconds in them."""

    def __init__(self) -> None:
        self._cpu = cpu_seconds(os.getpid())
        self._began = time.perf_counter()

    def __str__(self) -> str:
        seconds = time.perf_counter() - self._began
        return f"{seconds:.4f} {cpu_seconds(os.getpid()) - self._cpu:.2f}"


def cpu_seconds(root: int) -> float:
    """User and system time of a process and its descendants, living or waited for."""
    return sum(map(_cpu_seconds, family(root)))


def family(root: int) -> list[int]:
    """The ids of a process and its living descendants."""
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        with suppress(OSError):  # it has just ended
            for file in Path(f"/proc/{pid}/task").glob("*/children"):
                waiting += [int(child) for child in file.read_text().split()]
    return found


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
