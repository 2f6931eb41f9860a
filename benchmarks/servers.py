"""Servers of the tests, for benchmarks: each runs in a process of its own until it is no longer needed."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryFile

from benchmarks.environments import Unavailable, last_line

_TESTS = Path(__file__).resolve().parent.parent / "tests"


@dataclass(frozen=True, slots=True)
class Bucket:
    address: str
    environment: dict[str, str] = field(repr=False)
    """Of processes that reach it."""


@dataclass(frozen=True, slots=True)
class RayCluster:
    """Two hosts, each with one scoring process."""

    address: str
    command: tuple[str, ...]
    """The beginning of commands that run on its head."""
    environment: dict[str, str] = field(repr=False)


@contextmanager
def database() -> Iterator[str]:
    """The address of a migrated database on a PostgreSQL server of its own. Raises Unavailable."""
    with _started("postgres", "no PostgreSQL server starts here") as said:
        yield said


@contextmanager
def bucket() -> Iterator[Bucket]:
    """A storage on an S3 server of its own. Raises Unavailable."""
    with _started("seaweed", "no S3 server starts here", "on-disk") as said:
        yield Bucket(*json.loads(said))


@contextmanager
def ray_cluster() -> Iterator[RayCluster]:
    """Raises Unavailable, also where Ray is not installed."""
    with _started("ray_hosts", "no Ray cluster starts here") as said:
        address, command, environment = json.loads(said)
        yield RayCluster(address, tuple(command), environment)


@contextmanager
def _started(module: str, otherwise: str, *arguments: str) -> Iterator[str]:
    """The line that such a server prints when it is ready."""
    command = [sys.executable, str(_TESTS / f"{module}.py"), *arguments]
    own = os.environ | {"PYTHONPATH": str(_TESTS.parent)}
    with (
        TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=own
        ) as server,
    ):
        assert server.stdin is not None
        assert server.stdout is not None
        try:
            said = server.stdout.readline().strip()
            if not said:
                server.wait()
                errors.seek(0)
                raise Unavailable(f"{otherwise}: {last_line(errors.read())}")
            yield said
        finally:
            server.stdin.close()  # by which it ends
