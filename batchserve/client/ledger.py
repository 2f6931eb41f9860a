"""What is known of the files that were predicted into a folder: a log in that folder, of which the last line about a
file counts. It is what a later run continues from, whatever ended the one before."""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from batchserve.errors import Conflict

__all__ = ["LEDGER", "Entry", "FileBytes", "Ledger", "bytes_of"]

LEDGER = ".batchserve.jsonl"
_SETTLED = 2.0
"""Seconds without a change after which a further one gives a file another status, however coarse its times are."""


@dataclass(frozen=True, slots=True)
class FileBytes:
    """The bytes of a file."""

    sha256: str
    status: tuple[int, ...] | None = None
    """Of the file that holds them: length, times of modification and change, inode. None where a change of the file
    might not show in it."""


def bytes_of(path: Path, known: FileBytes | None = None, *, settled: float = _SETTLED) -> FileBytes:
    """The bytes of a file, which is read unless it has the status of the known ones."""
    with path.open("rb") as file:
        before = _status(file.fileno())
        if known is not None and known.status == before:
            return known
        begun = time.time_ns()
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        is_certain = before == _status(file.fileno()) and begun - before[1] >= settled * 1e9
    return FileBytes(digest, before if is_certain else None)


def _status(descriptor: int) -> tuple[int, ...]:
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@dataclass(frozen=True, slots=True)
class Entry:
    """How far a file has come: what was asked, under which key; its job, once there is one; its result, once it is
    whole."""

    input: FileBytes
    model: str
    """`name@version`."""
    asked: str
    """A digest of the model's bytes and of the options: equal ones give equal results."""
    key: str
    """The Idempotency-Key of its job."""
    job: str | None = None
    result: str | None = None
    """The path of the result in the folder; of an earlier one, while `saved` is None."""
    errors: str | None = None
    """That of the list of failed records."""
    saved: FileBytes | None = None
    """The bytes of the whole result."""
    rows: int = 0
    failed: int = 0


class Ledger:
    """The log of one folder, for one run at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / LEDGER
        self._entries, is_clean = _read(self._path)
        if not is_clean:
            self._rewrite()
        self._file = self._path.open("a", encoding="ascii")
        self._lock = threading.Lock()

    @classmethod
    @contextmanager
    def opened(cls, folder: Path) -> Iterator[Self]:
        """The log of a folder, which is made. Raises Conflict while another run has it."""
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            held.enter_context(_locked(folder))
            ledger = cls(folder)
            held.callback(ledger.close)
            yield ledger

    def get(self, name: str) -> Entry | None:
        with self._lock:
            return self._entries.get(name)

    def put(self, name: str, entry: Entry, *, durable: bool = False) -> None:
        """Writes a line, which survives the end of this process; if `durable`, also a power cut."""
        line = _line(name, entry)
        with self._lock:
            self._entries[name] = entry
            self._file.write(line)
            self._file.flush()
            if durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def among(self, paths: Iterable[Path]) -> set[Path]:
        """Those of the paths that are results or lists of errors in this folder."""
        names = {name for entry in self._entries.values() for name in (entry.result, entry.errors) if name}
        own = {os.path.abspath(self._folder / name) for name in names}  # noqa: PTH100 - `absolute` leaves `..`
        return {path for path in paths if os.path.abspath(path) in own}  # noqa: PTH100

    def _rewrite(self) -> None:
        part = self._path.with_name(f"{LEDGER}.part")
        with part.open("w", encoding="ascii") as file:
            file.writelines(_line(name, entry) for name, entry in self._entries.items())
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder, as long as this process lives."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                f"another run predicts into {str(folder)!r}: wait for its end, or name another folder"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _line(name: str, entry: Entry) -> str:
    return json.dumps({"file": name, **asdict(entry)}) + "\n"


def _read(path: Path) -> tuple[dict[str, Entry], bool]:
    """The entries of a log, and whether it has a line for each and nothing else. A line that a power cut has damaged is
    skipped: its file is scored again, or its job found by its key."""
    entries: dict[str, Entry] = {}
    if not path.exists():
        return entries, True
    content = path.read_bytes()
    lines = content.splitlines()
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            values = json.loads(line)
            name = values.pop("file")
            entries[name] = _entry(values)
    return entries, len(entries) == len(lines) and content.endswith(b"\n")


def _entry(values: dict[str, Any]) -> Entry:
    for name in ("input", "saved"):
        if (value := values[name]) is not None:
            values[name] = FileBytes(value["sha256"], tuple(value["status"]) if value["status"] else None)
    return Entry(**values)
