"""Processes of the cluster: started, killed and started again."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx2
import postgres
import psycopg
import seaweed
from commands import Service

from cluster.compose import Compose, clean

_START = 60.0


class Cluster:
    """PostgreSQL, an object store, an API and workers. Each may be killed, and started again."""

    def __init__(self, compose: Compose, workers: int, **settings: str) -> None:
        """`settings`: more environment of the API and the workers."""
        self.compose = compose
        self.settings = settings
        self._workers = workers
        # Elsewhere: the user that runs it when root runs this enters no folder of root.
        self._data = tempfile.TemporaryDirectory(prefix="batchserve-postgres-")
        self._postgres = postgres.Installation(Path(self._data.name))
        self._objects: subprocess.Popen[bytes] | None = None
        self.services: dict[str, Service] = {}

    @property
    def url(self) -> str:
        return self.compose.url

    def start(self) -> None:
        """All of it, in the order of the file."""
        self._make_database()
        self.start_objects()
        done = subprocess.run(
            [sys.executable, "-m", "batchserve", *self.compose.command("migrate")],
            env=clean() | self.compose.environment("migrate"), cwd=self.compose.folder, check=False,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.start_missing()
        self.wait_until_ready()

    def names(self) -> list[str]:
        return ["api", *(f"worker {number}" for number in range(1, self._workers + 1))]

    def start_missing(self) -> None:
        """Starts those of the API and the workers that are not running."""
        for name in self.names():
            service = self.services.get(name)
            if service is None or service.process.poll() is not None:
                kind = name.partition(" ")[0]
                environment = self.compose.environment(kind) | self.settings
                self.services[name] = Service(self.compose.folder, *self.compose.command(kind), settings=environment)
                if service is not None:
                    service.log.unlink()

    def wait_until_ready(self, seconds: float = _START) -> None:
        deadline = time.monotonic() + seconds
        while not self.is_ready():
            assert time.monotonic() < deadline, self.services["api"].log.read_text()[-4000:]
            self.start_missing()
            time.sleep(0.1)

    def is_ready(self) -> bool:
        with suppress(httpx2.TransportError):
            return httpx2.get(f"{self.url}/readyz", timeout=10.0).is_success
        return False

    def kill(self, name: str) -> None:
        """-9 for the API or a worker; its scoring processes end with it."""
        self.services[name].end(signal.SIGKILL)

    def kill_scoring_process(self, name: str) -> bool:
        """Whether the worker had one."""
        for pid in self.services[name].scoring_processes(nicer=0)[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
        return False

    # --- servers ---

    def _make_database(self) -> None:
        given = self.compose.environment("postgres")
        password = Path(given["POSTGRES_PASSWORD_FILE"])
        copy = self._postgres.folder / "password"  # which the user that runs the server may read
        copy.write_bytes(password.read_bytes())
        copy.chmod(0o644)
        where = f"listen_addresses='{self.compose.servers}'", f"port={self.compose.postgres}"
        self._postgres.make(
            "-U", given["POSTGRES_USER"], "-A", "scram-sha-256", f"--pwfile={copy}",
            settings=(*where, "unix_socket_directories=''"),
        )  # fmt: skip
        with (self._postgres.folder / "data" / "pg_hba.conf").open("a") as rules:
            rules.write("host all all all scram-sha-256\n")  # as the image of the file has it
        self._postgres.start()
        with psycopg.connect(
            host=self.compose.servers, port=self.compose.postgres, user=given["POSTGRES_USER"],
            password=password.read_text(), dbname="postgres", autocommit=True,
        ) as connection:  # fmt: skip
            connection.execute(f"CREATE DATABASE {given['POSTGRES_DB']}".encode())

    def crash_database(self) -> None:
        self._postgres.stop()

    def start_database(self) -> None:
        self._postgres.start()

    def restart_database(self) -> None:
        self.crash_database()
        self.start_database()

    def restart_objects(self) -> None:
        self.kill_objects()
        self.start_objects()

    def start_objects(self) -> None:
        (self.compose.folder / "objects").mkdir(exist_ok=True)
        master, volume, filer, admin = seaweed.free_ports(4)
        ports = (
            f"-s3.port={self.compose.s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}",
            f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0",
        )  # fmt: skip
        log = (self.compose.folder / "objects.log").open("ab")
        with log:
            self._objects = subprocess.Popen(
                [seaweed.program(), "-logtostderr=true", *self.compose.command("seaweedfs"), *ports],
                cwd=self.compose.folder, env=clean(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + _START
        while not listens(self.compose.servers, self.compose.s3):
            assert time.monotonic() < deadline, "the object store did not start"
            time.sleep(0.05)

    def kill_objects(self) -> None:
        assert self._objects is not None
        self._objects.kill()
        self._objects.wait()

    def stop(self) -> None:
        for service in self.services.values():
            service.process.terminate()
        for service in self.services.values():
            with suppress(subprocess.TimeoutExpired):
                service.process.wait(30)
            service.end(signal.SIGKILL)
        if self._objects is not None:
            self.kill_objects()
        with suppress(postgres.NoServer):  # it is stopped already
            self.crash_database()
        self._data.cleanup()


@contextmanager
def running(folder: Path, workers: int = 2, **settings: str) -> Iterator[Cluster]:
    """A cluster with all its data in `folder`, ready."""
    with ExitStack() as end:
        cluster = Cluster(Compose(folder), workers, **settings)
        end.callback(cluster.stop)
        cluster.start()
        yield cluster


def listens(host: str, port: int) -> bool:
    with socket.socket() as tried:
        tried.settimeout(1.0)
        return tried.connect_ex((host, port)) == 0


__all__ = ["Cluster", "listens", "running"]
