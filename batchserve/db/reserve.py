"""A reserve of disk space for an SQLite database, so that deletions can be written on a full disk.

It is a file with allocated blocks. A deletion or cancellation on a full disk frees a slice of it and writes into that;
when there is space again, the reserve is refilled. Meanwhile, work that takes space is refused.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MOST = 8 << 20
LEAST = 256 << 10
_SHARE = 64
"""Divisor of the disk's size that gives the size of the reserve."""
_STEP = 64 << 10
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Reserve:
    """The file `<database>-reserve`; processes of one host share it."""

    def __init__(self, database: Path) -> None:
        self.path = database.with_name(f"{database.name}-reserve")

    def target(self) -> int:
        """Size of a complete reserve: less on a small disk."""
        status = os.statvfs(self.path.parent)
        return min(MOST, max(LEAST, status.f_blocks * status.f_frsize // _SHARE // _STEP * _STEP))

    def bytes(self) -> int:
        try:
            return self.path.stat().st_size
        except FileNotFoundError:
            return 0

    def is_whole(self) -> bool:
        return self.bytes() >= self.target()

    def refill(self) -> bool:
        """Refills the reserve as far as there is space, unless a slice is in use. True: it is complete. Costs one
        `stat` when it is.
        """
        if self.is_whole():
            return True
        with suppress(OSError), self._opened(fcntl.LOCK_EX | fcntl.LOCK_NB) as file:
            target, size = self.target(), os.fstat(file).st_size
            while size < target and _take(file, size, count := min(_STEP, target - size)):
                size += count
            os.ftruncate(file, size)
            return size >= target
        return False  # in use, or not accessible

    @contextmanager
    def slices(self) -> Iterator[Iterator[int]]:
        """Frees a slice at each step, each twice as large as the previous one, until none is left: concurrent writers
        cannot take all of it. Refilling is blocked meanwhile."""
        with self._opened(fcntl.LOCK_EX) as file:
            yield _slices(file)

    @contextmanager
    def _opened(self, lock: int) -> Iterator[int]:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, lock)
            yield file
        finally:
            os.close(file)


def _slices(file: int) -> Iterator[int]:
    size, count = os.fstat(file).st_size, LEAST // 2
    while size > 0:
        size -= min(count, size)
        os.ftruncate(file, size)
        os.fsync(file)  # some file systems free blocks when they write their journal
        yield size
        count *= 2


def _take(file: int, offset: int, count: int) -> bool:
    """Extends the file by allocated blocks. False when the disk is full."""
    try:
        if not _allocate(file, offset, count):
            written = os.pwrite(file, os.urandom(count), offset)  # incompressible
            os.fsync(file)
            return written == count
    except OSError as error:
        if error.errno in _FULL:
            return False
        raise
    return True


def _allocate(file: int, offset: int, count: int) -> bool:
    """False where the operating system or the file system does not support it."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(file, offset, count)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True
