"""A server as a child process for the time of a block; used by the demo and the examples."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchserve.errors import Unavailable

TIMEOUT = 60.0
"""Seconds for a start, and for a graceful stop."""
_ADDRESS = re.compile(r" at (http://\S+) ")


@contextmanager
def serving(log: Path, **environment: str) -> Iterator[str]:
    """A server on a free port of this host that logs to `log`; yields its address when it answers. `environment`
    overrides the settings of this process. Raises Unavailable, with the end of its log, if it does not start.
    """
    command = [sys.executable, "-m", "batchserve", "serve", "--port", "0"]
    with (
        log.open("wb") as messages,
        subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stderr=messages, env=os.environ | environment
        ) as process,
    ):
        try:
            yield _address_of(process, log)
        finally:
            process.terminate()
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()


def _address_of(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """The address in the server's ready message."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if found := _ADDRESS.search(log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.05)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise Unavailable(f"the server did not start; its log {log} ends with:\n{end}")
