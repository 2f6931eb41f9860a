"""Waits for what other threads and processes do."""

import time
from collections.abc import Callable
from pathlib import Path

__all__ = ["is_alive", "until"]


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Returns when it holds; fails the test if that takes longer."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"not so after {seconds:.0f} s"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether the process runs: one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter when it ends while it is read
        return False
