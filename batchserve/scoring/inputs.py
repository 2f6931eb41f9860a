"""Inputs as scoring processes read them, and what a process remembers of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import BinaryIO

from batchserve.domain import Dialect, StoredInput
from batchserve.errors import BatchserveError, InputChanged
from batchserve.formats import get_format
from batchserve.formats.protocol import Format, Header
from batchserve.storage import Storage, open_storage
from batchserve.storage.locations import open_at, require_unchanged
from batchserve.storage.ranged import RangedObject, RangedReader


@dataclass(frozen=True)  # without slots: see `Chunk`
class Input:
    """Stored bytes to read as records."""

    storage: str
    key: str
    format: str
    dialect: Dialect
    content: bytes | None = None
    """The bytes themselves, of an input that is in a row of the database."""
    version: str | None = None
    """Of an input that is read where its owner keeps it; its key is then its address."""

    @classmethod
    def of(cls, storage: str, stored: StoredInput) -> "Input":
        return cls(storage, stored.key, stored.format, stored.dialect, stored.content, stored.version)

    def open(self) -> BinaryIO:
        """Raises FileNotFoundError, for an object that is fetched by range perhaps only when it is read; InputChanged
        for one that its owner has changed."""
        if self.content is not None:
            return BytesIO(self.content)
        if self.version is not None:
            return open_at(self.key, self.version)
        known = _known.get((self.storage, self.key))
        if known is not None:
            return known.open()
        source = storage_at(self.storage).open(self.key)
        if isinstance(source, RangedReader):  # to open it is a request, and stored bytes never change
            if len(_known) >= _MOST_KNOWN:
                del _known[next(iter(_known))]
            _known[self.storage, self.key] = source.stored
        return source

    @contextmanager
    def reading(self) -> Iterator[BinaryIO]:
        """Opens it to read it. Raises InputChanged, also when its owner has changed it meanwhile: what was read may be
        of two states of it."""
        try:
            with self.open() as source:
                yield source
        except Exception as error:
            # What fails in a file that was cut off meanwhile is no fault of the file.
            if (changed := self._change()) is not None:
                raise changed from error
            raise
        if self.version is not None:
            require_unchanged(self.key, self.version)

    def _change(self) -> InputChanged | None:
        """What its owner has changed, as far as that can be told."""
        try:
            if self.version is not None:
                require_unchanged(self.key, self.version)
        except InputChanged as changed:
            return changed
        except (BatchserveError, OSError):  # out of reach, say
            return None
        return None

    @property
    def reader(self) -> Format:
        return get_format(self.format, self.dialect)


_known: dict[tuple[str, str], RangedObject] = {}
"""The objects that this process has opened last, by storage and key."""
_MOST_KNOWN = 32


@lru_cache(maxsize=4)
def storage_at(address: str) -> Storage:
    """The storage of an address, opened once in a process."""
    return open_storage(address)


@lru_cache(maxsize=32)
def header_of(input: Input) -> Header:
    """What the beginning of an input tells, read once in a process: stored bytes never change."""
    with input.reading() as source:
        return input.reader.header(source)
