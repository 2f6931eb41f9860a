"""promtool of Prometheus, which checks metrics, rules and their tests."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["NoPromtool", "Promtool", "found"]


class NoPromtool(Exception):
    """It is not installed."""


class Promtool:
    def __init__(self, program: str) -> None:
        self._program = program

    def run(self, *arguments: str | Path, input: str | None = None) -> str:
        """Its output. Fails the test where it finds anything."""
        command = [self._program, *map(str, arguments)]
        done = subprocess.run(command, input=input, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr


@contextmanager
def found() -> Iterator[Promtool]:
    """Raises NoPromtool."""
    program = shutil.which("promtool")
    if program is None:
        raise NoPromtool("promtool is not installed. On Debian it is in the package prometheus")
    yield Promtool(program)
