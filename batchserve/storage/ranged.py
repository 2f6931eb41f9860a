"""Objects of a storage without files, as files: each read fetches what it asks for, and nothing is fetched before."""

import errno
import io
import os
from dataclasses import dataclass

from batchserve.storage import Storage

__all__ = ["RangedObject", "RangedReader"]

_READ_AHEAD = 128 * 2**10
"""Bytes that a smaller read fetches: heads and lengths are read a few bytes at a time."""


@dataclass(frozen=True, slots=True)
class RangedObject:
    """An object by its storage, key and size. It can be opened as often as is needed, for it has nothing to close."""

    storage: Storage
    key: str
    size: int

    def open(self) -> "RangedReader":
        return RangedReader(self)

    def read(self, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`, fewer only where the object ends, in one request; in none where there are no bytes.

        Raises FileNotFoundError when the object was removed.
        """
        stop = min(stop, self.size)
        return self.storage.read(self.key, start, stop) if start < stop else b""


class RangedReader(io.BufferedReader):
    """What `Storage.open` gives where objects are no files: seekable, for one thread.

    Small reads share a fetch. Who knows which stretches are wanted takes `stored`, which fetches just those.
    """

    def __init__(self, stored: RangedObject) -> None:
        super().__init__(_Ranges(stored), _READ_AHEAD)
        self.stored = stored

    def read(self, size: int | None = -1, /) -> bytes:
        left = self.stored.size - self.tell()
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted <= _READ_AHEAD:
            return super().read(max(0, wanted))
        data = self.read1(wanted)  # what is buffered; the rest in one fetch, of which `read` would make two
        return data + self.read1(wanted - len(data)) if len(data) < wanted else data


class _Ranges(io.RawIOBase):
    """Every read is a request."""

    def __init__(self, stored: RangedObject) -> None:
        self._stored, self._position = stored, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._stored.size}[whence]
        if begin + offset < 0:  # as a file refuses it
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._stored.key)
        self._position = begin + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader hands on nothing else
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(self._stored.size)

    def _read(self, most: int) -> bytes:
        data = self._stored.read(self._position, self._position + most)
        self._position += len(data)
        return data
