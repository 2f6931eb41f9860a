"""A stand-in for an object store: a folder behind it, and nothing of what only a disk can do."""

import io
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

from batchserve.storage import Composed, ObjectInfo, Piece, Storage, Writer, open_storage


class RemoteStorage:
    """Its objects are no files, it is on no disk, and it composes without a look at the bytes."""

    def __init__(self, address: str, site: str | None = None) -> None:
        """`site`: where clients find the objects themselves; None: nowhere."""
        self.address = address
        self._folder: Storage = open_storage(address)
        self._site = site

    def create(self, key: str) -> AbstractContextManager[Writer]:
        return self._folder.create(key)

    def open(self, key: str) -> BinaryIO:
        with self._folder.open(key) as file:
            return io.BytesIO(file.read())

    def read(self, key: str, start: int, stop: int) -> bytes:
        return self._folder.read(key, start, stop)

    def url(self, key: str) -> str | None:
        return f"{self._site}/{key}" if self._site else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._folder.list(prefix)

    def delete(self, key: str) -> None:
        self._folder.delete(key)

    def compose(self, key: str, pieces: Iterable[Piece]) -> Composed:
        return Composed(self._folder.compose(key, pieces).bytes, None)
