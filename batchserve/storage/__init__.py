"""Bytes. Inputs, parts, results and model artifacts live behind seven methods; rows about them live in the database.

Keys are functions of server-made IDs, never of anything a client sent.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

from batchserve.errors import InvalidOptions

__all__ = [
    "Composed",
    "ObjectInfo",
    "OnDisk",
    "Piece",
    "Span",
    "Storage",
    "Stored",
    "Writer",
    "free_bytes",
    "local_path",
    "open_storage",
    "remove_partials",
    "scratch_folder",
]

ERRORS_SUFFIX = ".errors"
"""Of the errors list of a part or a result."""


@dataclass(frozen=True, slots=True)
class Composed:
    """What a composition left: its length in bytes, and the SHA-256 of them in hex.

    None where the store put the object together out of others and no bytes were read, as an object store does. It is
    never the digest of anything else, such as of the digests of parts: docs/decisions/digest-of-a-result.md.
    """

    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Stored(Composed):
    """What a finished write left. Its bytes went through our hands, so the digest is always known."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` (included) to `stop` (excluded) of the object `key`."""

    key: str
    start: int
    stop: int


Piece = bytes | Span
"""A stretch of a composed object: literal bytes, or a span of an object that is already stored."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One entry of a listing. `modified` is in seconds since the epoch, by the clock of the store."""

    key: str
    bytes: int
    modified: float


class Writer(Protocol):
    """An object on its way in. Nobody sees it until `commit` returns."""

    def write(self, data: bytes | memoryview) -> None: ...

    def commit(self) -> Stored:
        """Makes the object durable and visible under its key, then says what it holds."""
        ...


class Storage(Protocol):
    """Seven methods over immutable objects; every backend passes tests/test_storage.py."""

    address: str
    """What `open_storage` was called with, so that a scoring process can open the same store."""

    def create(self, key: str) -> AbstractContextManager[Writer]:
        """A writer for `key`. Leaving the block without a commit, or with an exception, leaves nothing behind.

        Raises InsufficientStorage when the store is full.
        """
        ...

    def open(self, key: str) -> BinaryIO:
        """A seekable reader. A folder gives a real file (with `name` and `fileno`), any other store a
        `ranged.RangedReader`, which fetches only what is read. Raises FileNotFoundError."""
        ...

    def read(self, key: str, start: int, stop: int) -> bytes:
        """Bytes `start` to `stop`, fewer only where the object ends. Raises FileNotFoundError."""
        ...

    def url(self, key: str) -> str | None:
        """Where a client fetches the object itself, without our credentials, for the next minutes. None: only here."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose key begins with `prefix`, in order of their keys."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; one that does not exist is no error."""
        ...

    def compose(self, key: str, pieces: Iterable[Piece]) -> Composed:
        """Writes one object from pieces, durably, as `create` does; spans are copied by the system where it can.

        A folder knows the digest of what it composed; an object store may not.
        """
        ...


@runtime_checkable
class OnDisk(Protocol):
    """What a storage on a disk of this host can do besides. No other backend has to."""

    root: Path
    """The folder of all. Temporary files of any length belong there: their bytes count among those of the storage."""

    def path(self, key: str) -> Path:
        """The file of an object, whether it is there or not."""
        ...

    def link(self, key: str, file: Path) -> bool:
        """Makes a file, which never changes, an object of this storage too: durably, without a copy of its bytes.

        False where that cannot be done, as between two disks.
        """
        ...

    def free_bytes(self) -> int:
        """Bytes that an unprivileged process may still write."""
        ...

    def remove_partials(self, before: float) -> int:
        """Removes what writers that were killed left behind: not written to since `before`, in seconds since the epoch.

        Returns how many there were.
        """
        ...


def local_path(storage: Storage, key: str) -> Path | None:
    """The file of an object; None in a storage that has no files on this host."""
    return storage.path(key) if isinstance(storage, OnDisk) else None


def free_bytes(storage: Storage) -> int | None:
    """Bytes that may still be written; None where that is not known, as in an object store."""
    return storage.free_bytes() if isinstance(storage, OnDisk) else None


def scratch_folder(storage: Storage) -> str | None:
    """See `OnDisk`. None: where the system has its temporary files."""
    return str(storage.root) if isinstance(storage, OnDisk) else None


def remove_partials(storage: Storage, before: float) -> int:
    """See `OnDisk`. An object store forgets what was not committed."""
    return storage.remove_partials(before) if isinstance(storage, OnDisk) else 0


def open_storage(address: str) -> Storage:
    """The storage at an address: a folder's path. Raises InvalidOptions for any other."""
    if "://" in address:
        raise InvalidOptions(f"BATCHSERVE_STORAGE is {address!r}; expected the path of a folder")
    from batchserve.storage.local import LocalStorage

    return LocalStorage(address)


def input_key(job_id: str) -> str:
    return f"inputs/{job_id}"


def part_key(job_id: str, first_record: int, attempt: int) -> str:
    """A part is named by its attempt too: a worker that lost its lease never overwrites a committed part."""
    return f"{parts_prefix(job_id)}{first_record:015d}-{attempt}"


def parts_prefix(job_id: str) -> str:
    return f"parts/{job_id}/"


def errors_part_key(job_id: str, first_record: int, attempt: int) -> str:
    return f"{part_key(job_id, first_record, attempt)}{ERRORS_SUFFIX}"


def result_key(job_id: str, attempt: int) -> str:
    """Each attempt has its own, found by its number and never listed: docs/decisions/flat-keys-of-results.md."""
    return f"results/{job_id}-{attempt}"


def errors_key(job_id: str, attempt: int) -> str:
    return f"{result_key(job_id, attempt)}{ERRORS_SUFFIX}"


def model_key(digest: str) -> str:
    """The model as admitted; its name is the digest of what was uploaded."""
    return f"models/{digest}.onnx"


def digest_of_model(key: str) -> str:
    """The digest in the key of a model."""
    return key.removeprefix("models/").removesuffix(".onnx")
