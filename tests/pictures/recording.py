"""A recording of two terminals: a job runs, its server is killed at 60 % and started again, and the result has the
bytes of a run that nothing disturbed. Everything in it happens, and is shown faster, with shorter pauses."""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
from commands import clean_environment

from pictures.film import Frame, film
from pictures.terminals import Terminal

ROWS = 2_000_000
KILLED_AT = 0.6
URL = "http://127.0.0.1:8000"
PREDICT = "batchserve predict flights.csv --model flights --passthrough all --no-reuse -o again.csv"
_STEP = 0.1
"""Seconds between two looks at the terminals."""
_TIMEOUT = 300.0


def take(folder: Path, images: Path) -> Iterator[Path]:
    """Yields the file when it is written. Raises SystemExit when the digests differ."""
    if _answers():
        raise SystemExit(f"{URL} is in use: stop that server first")
    demo = [sys.executable, "-m", "batchserve", "demo", "--rows", str(ROWS), "--json"]
    subprocess.run(demo, cwd=folder, env=clean_environment(), stdout=subprocess.DEVNULL, check=True)
    (folder / "storage" / "demo" / "flights.csv").rename(folder / "flights.csv")
    (folder / "storage" / "demo" / "predictions.csv").rename(folder / "undisturbed.csv")
    target = images / "kill.svg"
    target.write_text(film(_Recording(folder).frames(), ("server", "client")), encoding="utf-8")
    digests = {_digest(folder / name) for name in ("undisturbed.csv", "again.csv")}
    if len(digests) > 1:
        raise SystemExit("the two results differ")
    yield target


class _Recording:
    """Two shells in one folder, and what they showed."""

    def __init__(self, folder: Path) -> None:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = clean_environment() | {"PATH": path, "PS1": "$ ", "TERM": "xterm-256color", "HISTFILE": ""}
        del own["NO_COLOR"], own["COLUMNS"]
        self._server, self._client = (Terminal(folder, own, lines) for lines in (9, 8))
        self._taken: list[Frame] = []

    def frames(self) -> list[Frame]:
        try:
            self._play()
        finally:
            for terminal in (self._server, self._client):
                terminal.close()
        return self._taken

    def _play(self) -> None:
        self._until(lambda: self._server.is_waiting and self._client.is_waiting)
        self._type(self._server, "batchserve serve &")
        self._until(_answers)
        self._type(self._client, PREDICT)
        self._until(lambda: _progress() >= KILLED_AT)
        self._type(self._server, "kill -9 %1", quick=True)
        self._until(lambda: not _answers())
        self._type(self._server, "batchserve serve &")
        self._until(lambda: self._client.is_waiting)
        self._type(self._client, "sha256sum undisturbed.csv again.csv")
        self._until(lambda: self._client.is_waiting)
        self._type(self._server, "kill $!", quick=True)
        self._until(lambda: not _answers(), shown=False)

    def _type(self, terminal: Terminal, line: str, *, quick: bool = False) -> None:
        for letter in line:
            terminal.send(letter)
            if not quick:
                time.sleep(0.03)
                self._look()
        terminal.send("\n")
        time.sleep(2 * _STEP)

    def _until(self, holds: Callable[[], bool], *, shown: bool = True) -> None:
        deadline = time.monotonic() + _TIMEOUT
        while not holds():
            if time.monotonic() > deadline:
                raise SystemExit(
                    "\n".join(["the recording did not go on:", *self._client.text(), *self._server.text()])
                )
            time.sleep(_STEP)
            if shown:
                self._look()
        if shown:
            self._look()

    def _look(self) -> None:
        self._taken.append(Frame(time.monotonic(), (self._server.screen(), self._client.screen())))


def _answers() -> bool:
    try:
        return httpx2.get(f"{URL}/livez", timeout=2.0).is_success
    except httpx2.TransportError:
        return False


def _progress() -> float:
    jobs = httpx2.get(f"{URL}/v1/jobs?state=running", timeout=5.0).json()["jobs"]
    return float(jobs[0]["progress"]) if jobs else 0.0


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
