"""Commands of batchserve: in separate processes, to be awaited or killed, or in the process of the test."""

import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from itertools import count
from pathlib import Path
from unittest.mock import patch

import postgres
from typer.testing import CliRunner

from batchserve.cli import main

Done = subprocess.CompletedProcess[str]
Run = Callable[..., Done]

FAST = {
    "BATCHSERVE_CHUNK_BYTES": "40000",  # hundreds of chunks, so that a kill comes in the middle
    "BATCHSERVE_LEASE": "1.0",
    "BATCHSERVE_HEARTBEAT": "0.2",
    "BATCHSERVE_RESCUE": "0.2",
    "BATCHSERVE_POLL": "0.1",
    "BATCHSERVE_PROCESSES": "2",
    "BATCHSERVE_GRACE": "5",
}


def clean_environment() -> dict[str, str]:
    """That of the test without settings of batchserve, for a terminal of 200 columns without colours."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("BATCHSERVE_")}
    return own | {"COLUMNS": "200", "NO_COLOR": "1"}


def in_a_process(folder: Path, *arguments: str | Path, input: str | None = None, **environment: str) -> Done:
    """Runs `batchserve` with these arguments, in this folder."""
    return subprocess.run(
        [sys.executable, "-m", "batchserve", *map(str, arguments)],
        cwd=folder,
        env=clean_environment() | environment,
        input=input,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )


def in_this_process(folder: Path, *arguments: str | Path, input: str | None = None, **environment: str) -> Done:
    """The same without the half second in which a process imports what it needs. For commands that end by themselves
    and leave the process as it was, which those that serve do not."""
    command = ["batchserve", *map(str, arguments)]
    cleared = {name: None for name in os.environ if name.startswith("BATCHSERVE_")}
    own = cleared | clean_environment() | environment
    with chdir(folder), patch.object(sys, "argv", command), CliRunner().isolation(input, own) as (stdout, stderr, _):
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        else:
            code = 0
        assert isinstance(code, int)
        sys.stdout.flush()
        return subprocess.CompletedProcess(command, code, stdout.getvalue().decode(), stderr.getvalue().decode())


def on_terminal(arguments: list[str], folder: Path, server: str, until: str, number: int | None) -> tuple[int, str]:
    """Runs a command on a terminal of 80 columns; sends a signal once a text was shown. Its code, and all it showed."""
    ours, its = pty.openpty()
    environment = clean_environment() | {"BATCHSERVE_URL": server, "COLUMNS": "80", "TERM": "xterm"}
    command = [sys.executable, "-m", "batchserve", *arguments]
    shown = b""
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=its, stderr=its) as process:
        os.close(its)
        with suppress(OSError):  # it has ended
            while block := os.read(ours, 65536):
                shown += block
                if number is not None and until.encode() in shown:
                    process.send_signal(number)
                    number = None
    os.close(ours)
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())


def lowest_free_descriptor(pid: int) -> int:
    """The lowest free file descriptor of another process. With it as the limit, that process can open no file."""
    used = {int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir()}
    return next(number for number in count() if number not in used)


class Service:
    """A `batchserve` command in a separate process, on the data of one folder."""

    def __init__(
        self, folder: Path, *arguments: str, settings: Mapping[str, str] = FAST, open_files: int | None = None
    ) -> None:
        own = {name: value for name, value in os.environ.items() if not name.startswith("BATCHSERVE_")}
        own |= postgres.chosen_environment(Path(settings.get("BATCHSERVE_STORAGE", folder / "storage")))
        self.log = folder / f"{arguments[0]}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as stderr:
            command = [sys.executable, "-m", "batchserve", *arguments]
            if open_files is not None:
                command = ["bash", "-c", f'ulimit -n {open_files} && exec "$@"', "limited", *command]
            self.process = subprocess.Popen(command, cwd=folder, stderr=stderr, env=own | dict(settings))
        self.url = ""

    def wait_for(self, pattern: str, seconds: float = 60.0) -> re.Match[str]:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(pattern, self.log.read_text()):
                return found
            time.sleep(0.02)
        raise AssertionError(f"{pattern!r} did not come:\n{self.log.read_text()[-4000:]}")

    def scoring_processes(self, nicer: int = 10) -> list[int]:
        """The processes that score chunks of jobs; with `nicer=0`, also those for interactive calls."""
        nice = min(os.getpriority(os.PRIO_PROCESS, self.process.pid) + nicer, 19)
        found = []
        for file in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            for pid in map(int, file.read_text().split()):
                with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                    spawned = b"--multiprocessing-fork" in Path(f"/proc/{pid}/cmdline").read_bytes()
                    if spawned and os.getpriority(os.PRIO_PROCESS, pid) >= nice:
                        found.append(pid)
        return found

    def memory(self) -> int:
        """The resident memory of the server process, in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(status.partition("VmRSS:")[2].split()[0])

    def files(self) -> int:
        """Its open files and connections, but for those to the database, of which each thread that reads keeps one:
        files of SQLite, Unix sockets to PostgreSQL."""
        table = Path(f"/proc/{self.process.pid}/net/unix").read_text().splitlines()[1:]
        local = {f"socket:[{line.split()[6]}]" for line in table}
        found = 0
        for descriptor in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # it has just been closed
                target = str(descriptor.readlink())
                found += "batchserve.db" not in target and target not in local
        return found

    def end(self, number: int = signal.SIGKILL) -> int:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.process.wait(30)
