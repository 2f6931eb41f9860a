"""The data folder of the tests of faults, and the number of faults they tried, reported at the end."""

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

_TRIED = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="session")
def tried(pytestconfig: pytest.Config) -> Counter[str]:
    """Faults by name; the summary of the run prints them."""
    return pytestconfig.stash.setdefault(_TRIED, Counter())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if tried := config.stash.get(_TRIED, None):
        terminalreporter.section("faults")
        for name, times in tried.items():
            terminalreporter.write_line(f"{times:5} {name}")
        terminalreporter.write_line(f"{tried.total():5} faults in all")


@pytest.fixture(scope="module")
def fast_folder() -> Iterator[Path]:
    """A folder in memory if possible: a killed process leaves the same files there, and fsync costs nothing."""
    memory = Path("/dev/shm")  # noqa: S108 - the folder in it is made for us alone
    folder = Path(tempfile.mkdtemp(prefix="batchserve-faults-", dir=memory if os.access(memory, os.W_OK) else None))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)  # a process that a failed test left may still write
