"""Inputs as scoring processes read them, and what a process remembers of them."""

from dataclasses import dataclass
from functools import lru_cache

from batchserve.domain import Dialect, StoredInput
from batchserve.formats import get_format
from batchserve.formats.protocol import Format, Header
from batchserve.storage import Storage, open_storage


@dataclass(frozen=True, slots=True)
class Input:
    """Stored bytes to read as records."""

    storage: str
    key: str
    format: str
    dialect: Dialect

    @classmethod
    def of(cls, storage: str, stored: StoredInput) -> "Input":
        return cls(storage, stored.key, stored.format, stored.dialect)

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
    with storage_at(input.storage).open(input.key) as source:
        return input.reader.header(source)
