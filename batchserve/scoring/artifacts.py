"""Models as scoring processes read them: from a file of this host where there is one, else through a cache on its disk.

All processes of a host share the cache, also those of other workers: without it each would fetch gigabytes of its own.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchserve.storage import Storage, Tagged, model_key

__all__ = ["read_artifact"]

_PARTIAL, _LONGEST = ".partial-", 3600.0
_MOST = 8 * 2**30
"""Bytes of all models in the cache; those that were used longest ago make room."""


def read_artifact(storage: Storage, digest: str) -> bytes:
    """The artifact of a model. Raises FileNotFoundError, and Unavailable also for one that is cached."""
    key = model_key(digest)
    if not isinstance(storage, Tagged) or (folder := _own_folder()) is None:
        return _read(storage, key)
    try:
        tag = storage.tag(key)
    except FileNotFoundError:
        return _read(storage, key)  # which tells a missing model from a missing storage
    file = folder / hashlib.sha256(f"{storage.address}\n{key}\n{tag}".encode()).hexdigest()
    with _alone(file.with_suffix(".lock")):  # the others wait for the one that fetches it
        with suppress(FileNotFoundError):
            data = file.read_bytes()
            os.utime(file)
            return data
        data = _read(storage, key)
        with suppress(OSError):  # such as a full disk: then it is fetched each time
            _make_room(folder, len(data))
            _write(file, data)
        return data


def _read(storage: Storage, key: str) -> bytes:
    with storage.open(key) as artifact:
        return artifact.read()


def _own_folder() -> Path | None:
    """A folder that no other user can write or read; None where there cannot be one."""
    folder = Path(tempfile.gettempdir()) / f"batchserve-models-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    is_own = folder.is_dir() and not folder.is_symlink() and status.st_uid == os.getuid()
    return folder if is_own and not status.st_mode & 0o077 else None


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds a lock, which ends with this process."""
    try:
        file = lock.open("w")
    except OSError:
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(file: Path, data: bytes) -> None:
    partial = file.with_suffix(f"{_PARTIAL}{os.getpid()}")
    try:
        partial.write_bytes(data)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _make_room(folder: Path, size: int) -> None:
    for path in folder.glob(f"*{_PARTIAL}*"):
        if path.stat().st_mtime < time.time() - _LONGEST:  # of a killed process
            path.unlink(missing_ok=True)
    kept = sorted((path.stat().st_mtime, path) for path in folder.iterdir() if not path.suffix)
    taken = size + sum(path.stat().st_size for _, path in kept)
    for _, path in kept:
        if taken <= _MOST:
            return
        taken -= path.stat().st_size
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
