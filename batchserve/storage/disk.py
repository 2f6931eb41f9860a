"""Durable folders, and the errors of a disk that is full or out of reach."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from batchserve.errors import InsufficientStorage, Unavailable

__all__ = ["full_disk_named", "make_folder", "outage_of", "sync_folder"]

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OUTAGE = (
    *(errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
)
"""Of a disk that fails, or of a share whose server does not answer: no fault of what is read or written."""


def make_folder(folder: Path) -> None:
    """Creates a folder durably: its own entry is synced into its parent, or a power cut could take it away."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with suppress(FileExistsError):
        folder.mkdir()
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Syncs the entries of a folder."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def full_disk_named() -> Iterator[None]:
    """Raises InsufficientStorage where the operating system reports a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise InsufficientStorage("the storage is full: free some space, or let results expire") from error
        raise


def outage_of(error: BaseException) -> Unavailable | None:
    """The error of a storage that is out of reach, if this is one: any access to a file may raise it."""
    if isinstance(error, Unavailable):
        return error
    if isinstance(error, OSError) and error.errno in _OUTAGE:
        return Unavailable(f"the storage does not respond: {os.strerror(error.errno)}; try again in a moment")
    return None
