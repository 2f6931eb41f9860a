"""Inputs as scoring processes read them, and what a process remembers of them."""

from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import BinaryIO

from batchserve.domain import Dialect, StoredInput
from batchserve.formats import get_format
from batchserve.formats.protocol import Format, Header
from batchserve.storage import Storage, open_storage


@dataclass(frozen=True)  # without slots: see `Chunk`
class Input:
    """Stored bytes to read as records."""

    storage: str
    key: str
    format: str
    dialect: Dialect
    content: bytes | None = None
    """The bytes themselves, of an input that is in a row of the database."""

    @classmethod
    def of(cls, storage: str, stored: StoredInput) -> "Input":
        return cls(storage, stored.key, stored.format, stored.dialect, stored.content)

    def open(self) -> BinaryIO:
        """Raises FileNotFoundError."""
        return storage_at(self.storage).open(self.key) if self.content is None else BytesIO(self.content)

    @property
    def reader(self) -> Format:
        return get_format(self.format, self.dialect)


@lru_cache(maxsize=4)
def storage_at(address: str) -> Storage:
    """The storage of an address, opened once in a process."""
    return open_storage(address)


@lru_cache(maxsize=32)
def header_of(input: Input) -> Header:
    """What the beginning of an input tells, read once in a process: stored bytes never change."""
    with input.open() as source:
        return input.reader.header(source)
