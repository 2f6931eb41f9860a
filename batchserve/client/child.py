"""A server of one's own: a child process on a free port of this host, which ends with the block or the program."""

import os
import re
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

from batchserve.client.extras import require_service
from batchserve.client.sync import Client
from batchserve.errors import Unavailable

START_TIMEOUT = 60.0
STOP_TIMEOUT = 60.0
"""Seconds for an end that does not need force."""
_ADDRESS = re.compile(r" at (http://\S+) ")
_LOG_LINES = 5


def local(storage: str | os.PathLike[str] | None = None, **settings: object) -> Client:
    """A server on this host and a client of it, for a `with` block, or until `close()`; a program that ends, in
    whatever way, takes its server along.

    `storage`: a folder that keeps models, jobs and results; None: they are gone with the server. `settings`: those of
    docs/settings.md in small letters, as `processes=2`; the others are those of the environment. Raises TypeError for a
    setting that does not exist, Unavailable with the end of the server's log if it does not start, and ImportError
    where only the client is installed.
    """
    require_service("a server")
    _require_known(settings)
    folder = tempfile.TemporaryDirectory(prefix="batchserve-", ignore_cleanup_errors=True)
    own = Path(folder.name)
    chosen = {f"BATCHSERVE_{name.upper()}": str(value) for name, value in settings.items()}
    # The database is in the storage; nothing of a temporary one is worth to be waited for.
    environment = {"BATCHSERVE_DATABASE": "", **({"BATCHSERVE_GRACE": "1"} if storage is None else {}), **chosen}
    kept = own / "storage" if storage is None else Path(storage).absolute()
    try:
        server = _Server(own / "log", "--storage", str(kept), environment=os.environ | environment)
    except BaseException:
        folder.cleanup()
        raise
    return _LocalClient(server, folder)


def _require_known(names: Iterable[str]) -> None:
    from batchserve.settings import Settings

    known = Settings.model_fields
    for name in names:
        if name not in known:
            close = get_close_matches(name.lower(), known, n=3, cutoff=0.6)
            meant = f" (close: {', '.join(map(repr, close))})" if close else ""
            raise TypeError(
                f"local() has no setting {name!r}{meant}; docs/settings.md lists them, which are written here in small "
                "letters and without BATCHSERVE_"
            )


@contextmanager
def serving(log: Path, **environment: str) -> Iterator[str]:
    """The address of a server for as long as a block runs, with its messages in `log`. It has the settings of this
    process, and those of `environment` instead. Raises Unavailable if it does not start."""
    server = _Server(log, environment=os.environ | environment)
    try:
        yield server.url
    finally:
        server.stop()


class _Server:
    """The child process. `stop` ends it, and so does the end of this process: it reads from a pipe that closes then."""

    def __init__(self, log: Path, *arguments: str, environment: Mapping[str, str]) -> None:
        command = [sys.executable, "-m", "batchserve", "serve", "--port", "0", "--until-stdin-closes", *arguments]
        with log.open("wb") as messages:
            # In a session of its own: Ctrl-C is for the program, whose block ends the server in order.
            process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.PIPE, stderr=messages, env=dict(environment), start_new_session=True
            )
        self.stop = weakref.finalize(self, _stop, process)
        try:
            self.url = _address_of(process, log)
        except BaseException:
            self.stop()
            raise


class _LocalClient(Client):
    """A client whose server ends when it is closed."""

    def __init__(self, server: _Server, folder: "tempfile.TemporaryDirectory[str]") -> None:
        super().__init__(server.url)
        self._server, self._folder = server, folder

    def close(self) -> None:
        super().close()
        self._server.stop()
        self._folder.cleanup()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _address_of(process: "subprocess.Popen[bytes]", log: Path) -> str:
    """What the server says when it is ready."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        if found := _ADDRESS.search(log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.02)
    end = "\n".join(log.read_text(errors="replace").splitlines()[-_LOG_LINES:])
    raise Unavailable(f"the server did not start; its log ends with:\n{end}")
