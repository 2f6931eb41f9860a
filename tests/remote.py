"""A substitute for an object store: it stores in a folder, without the features that only a disk has."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO

from batchserve.storage import Composed, ObjectInfo, Piece, Storage, Writer, open_storage
from batchserve.storage.ranged import RangedObject


class RemoteStorage:
    """Its objects are not files, it is on no disk, and it composes objects without reading the bytes."""

    def __init__(self, address: str, site: str | None = None) -> None:
        """`site`: the address where clients can fetch the objects themselves; None: nowhere."""
        self.address = address
        self._folder: Storage = open_storage(address)
        self._site = site
        self.fetched: Counter[str] = Counter()
        """Bytes that were read of each object."""
        self.outage: Exception | None = None
        """What every access raises."""

    def create(self, key: str) -> AbstractContextManager[Writer]:
        return self._reached().create(key)

    def open(self, key: str) -> BinaryIO:
        with self._reached().open(key) as file:
            return RangedObject(self, key, os.fstat(file.fileno()).st_size).open()

    def read(self, key: str, start: int, stop: int) -> bytes:
        data = self._reached().read(key, start, stop)
        self.fetched[key] += len(data)
        return data

    def url(self, key: str) -> str | None:
        return f"{self._site}/{key}" if self._site else None

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._reached().list(prefix)

    def delete(self, key: str) -> None:
        self._reached().delete(key)

    def compose(self, key: str, pieces: Iterable[Piece]) -> Composed:
        return Composed(self._reached().compose(key, pieces).bytes, None)

    def _reached(self) -> Storage:
        if self.outage is not None:
            raise self.outage
        return self._folder
