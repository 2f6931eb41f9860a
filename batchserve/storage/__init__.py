"""Bytes. Inputs, parts, results and model artifacts are stored through seven methods; their rows are in the database.

Keys derive from server-generated IDs, never from client input.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO, Protocol, TypeGuard, runtime_checkable

from batchserve.domain import UNREAD
from batchserve.errors import InvalidOptions

__all__ = [
    "Composed",
    "Copies",
    "CreatesNew",
    "DeletesMany",
    "KeepsPartials",
    "ObjectInfo",
    "Occupied",
    "OnDisk",
    "OpensTagged",
    "Parts",
    "Piece",
    "ReadsAhead",
    "Span",
    "Storage",
    "Stored",
    "Tagged",
    "TakesParts",
    "TakesUploads",
    "Writer",
    "check_access",
    "copy_object",
    "delete_objects",
    "free_bytes",
    "is_in_row",
    "key_in_row",
    "key_in_storage",
    "local_path",
    "open_storage",
    "remove_partials",
    "require_key",
    "scratch_folder",
]

_IN_ROW = "rows/"
TARGETS = "targets/"
"""Beginning of the keys of results outside of the storage."""
ERRORS_SUFFIX = ".errors"
"""Suffix of the key of a part's or a result's errors list."""


@dataclass(frozen=True, slots=True)
class Composed:
    """A composed object: its length in bytes and its SHA-256 in hex.

    The digest is None where the store composed the object without reading its bytes, as an object store does. It is
    never the digest of anything else, such as of part digests: docs/decisions/digest-of-a-result.md.
    """

    bytes: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class Stored(Composed):
    """A written object. Its bytes passed through this process, so the digest is always known."""

    sha256: str


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes `start` (included) to `stop` (excluded) of the object `key`."""

    key: str
    start: int
    stop: int


Piece = bytes | Span
"""A piece of a composed object: literal bytes, or a span of a stored object."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One entry of a listing. `modified` is in seconds since the epoch, by the clock of the store; `tag` as by
    `Tagged.tag`, where the store has tags."""

    key: str
    bytes: int
    modified: float
    tag: str | None = None


class Occupied(FileExistsError):
    """Another object is under the key of a new one, and is not replaced."""

    def __init__(self, stored: Stored) -> None:
        """`stored`: what was written, and is discarded."""
        super().__init__(errno.EEXIST, os.strerror(errno.EEXIST))
        self.stored = stored


class Writer(Protocol):
    """An object being written. It is invisible until `commit` returns."""

    def write(self, data: bytes | memoryview) -> None: ...

    def commit(self) -> Stored:
        """Makes the object durable and visible under its key; returns its length and digest."""
        ...


class Storage(Protocol):
    """Seven methods over immutable objects; every backend passes tests/test_storage.py."""

    address: str
    """The argument of `open_storage`, by which a scoring process opens the same store."""

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
        """A URL that serves the object without credentials for some minutes. None: the store has no such URLs."""
        ...

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects whose key begins with `prefix`, in order of their keys."""
        ...

    def delete(self, key: str) -> None:
        """Removes the object; a missing one is not an error."""
        ...

    def compose(self, key: str, pieces: Iterable[Piece]) -> Composed:
        """Writes one object from pieces, durably, as `create` does; spans are copied by the operating system where
        possible. A folder computes the digest; an object store may not.
        """
        ...


@runtime_checkable
class OnDisk(Protocol):
    """Additional operations of a storage on a local disk; other backends need not have them."""

    root: Path
    """The root folder. Temporary files of any length belong there: they count as bytes of the storage."""

    def path(self, key: str) -> Path:
        """The path of an object, whether or not it exists."""
        ...

    def link(self, key: str, file: Path) -> bool:
        """Links an immutable file as an object, durably and without copying. False where that is impossible, as between
        two disks.
        """
        ...

    def free_bytes(self) -> int:
        """Bytes that an unprivileged process may still write."""
        ...

    def remove_partials(self, before: float) -> int:
        """See `KeepsPartials`."""
        ...


@runtime_checkable
class KeepsPartials(Protocol):
    """A storage in which a killed writer leaves something that is no object."""

    def remove_partials(self, before: float) -> int:
        """Removes what killed writers left, not written to since `before` (seconds since the epoch); returns the number
        of objects that it was to become.
        """
        ...


_on_disk: dict[type, bool] = {}
"""Whether storages of a class are on disk. A comparison with the members of a protocol takes long, for each upload."""


def _is_on_disk(storage: Storage) -> TypeGuard[OnDisk]:
    kind = type(storage)
    if kind not in _on_disk:
        _on_disk[kind] = isinstance(storage, OnDisk)
    return _on_disk[kind]


def local_path(storage: Storage, key: str) -> Path | None:
    """The path of an object; None in a storage without files on this host."""
    return storage.path(key) if _is_on_disk(storage) else None


def free_bytes(storage: Storage) -> int | None:
    """Bytes that may still be written; None where that is not known, as in an object store."""
    return storage.free_bytes() if _is_on_disk(storage) else None


def scratch_folder(storage: Storage) -> str | None:
    """See `OnDisk`. None: the system's folder for temporary files."""
    return str(storage.root) if _is_on_disk(storage) else None


def remove_partials(storage: Storage, before: float) -> int:
    """See `KeepsPartials`."""
    return storage.remove_partials(before) if isinstance(storage, KeepsPartials) else 0


@runtime_checkable
class ReadsAhead(Protocol):
    """A storage whose reads are requests, of which several may be under way."""

    def read_ahead(self, key: str, size: int) -> None:
        """Begins to fetch an object of this size, if it is small, which will be opened soon."""
        ...


@runtime_checkable
class Copies(Protocol):
    """A storage that copies an object on its side."""

    def copy(self, source: str, target: str) -> None:
        """Raises FileNotFoundError."""
        ...


def copy_object(storage: Storage, source: str, target: str, size: int) -> None:
    """A second object with the bytes of one; they pass through this process only where they must."""
    if isinstance(storage, Copies):
        storage.copy(source, target)
    else:
        storage.compose(target, [Span(source, 0, size)])


@runtime_checkable
class DeletesMany(Protocol):
    """A storage that removes many objects by one request."""

    def delete_many(self, keys: Sequence[str]) -> None:
        """Removes the objects; missing ones are not an error."""
        ...


def delete_objects(storage: Storage, keys: Sequence[str]) -> None:
    """Removes objects, by few requests where each takes one."""
    if isinstance(storage, DeletesMany):
        storage.delete_many(keys)
    else:
        for key in keys:
            storage.delete(key)


@runtime_checkable
class TakesUploads(Protocol):
    """A storage to which clients send objects themselves, by URLs that need no credentials."""

    def upload_url(self, key: str, size: int, seconds: float) -> str:
        """A URL that takes the bytes of an object by PUT, again and again until `seconds` have passed. Raises
        PayloadTooLarge for more than the store takes in one request."""
        ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Where a client sends an object in parts: `part_bytes` of it to each URL, the rest to the last. `id`: by which the
    store knows them."""

    id: str
    part_bytes: int
    urls: tuple[str, ...]


@runtime_checkable
class TakesParts(Protocol):
    """A storage to which clients send the parts of an object, which are none before they are joined."""

    def begin_parts(self, key: str, size: int, seconds: float) -> Parts | None:
        """None where one request is enough, or where this host cannot sign requests for parts."""
        ...

    def join_parts(self, key: str, parts_id: str, size: int) -> int:
        """Makes an object of the parts if they have `size` bytes together; returns how many they have. No effect on
        parts that are joined already. Raises FileNotFoundError for parts that cannot be joined."""
        ...

    def abort_parts(self, key: str, parts_id: str) -> None:
        """Removes the parts that are not joined; missing ones are not an error."""
        ...


@runtime_checkable
class Tagged(Storage, Protocol):
    """A storage that is not on this host, and tells cheaply whether a copy on its disk is still right."""

    def tag(self, key: str) -> str:
        """A text that differs for different bytes under a key, and ends with their number. Raises
        FileNotFoundError."""
        ...


@runtime_checkable
class OpensTagged(Tagged, Protocol):
    """A storage that opens an object in one version only."""

    def open_tagged(self, key: str, tag: str) -> BinaryIO:
        """As `open`. Raises FileNotFoundError also when the object has another tag."""
        ...


@runtime_checkable
class CreatesNew(Protocol):
    """A storage that creates an object only where none is."""

    def create_new(self, key: str) -> AbstractContextManager[Writer]:
        """As `create`. The commit raises Occupied where there is an object by then."""
        ...


@runtime_checkable
class Checked(Protocol):
    """A storage that may refuse, or be out of reach."""

    def check(self) -> None:
        """Raises InvalidOptions where it refuses its bucket or credentials, Unavailable where it does not respond."""
        ...


def check_access(storage: Storage) -> None:
    """See `Checked`. Other storages show by a listing that they respond; a folder raises OSError."""
    if isinstance(storage, Checked):
        storage.check()
    else:
        next(iter(storage.list("models/")), None)


def open_storage(address: str) -> Storage:
    """The storage at an address: the path of a folder, or `s3://bucket/prefix`. Raises InvalidOptions for any other,
    and where the extra of an object store is not installed."""
    if "://" not in address:
        from batchserve.storage.local import LocalStorage

        return LocalStorage(address)
    if not address.startswith("s3://"):
        raise InvalidOptions(f"BATCHSERVE_STORAGE is {address!r}; expected the path of a folder, or s3://bucket/prefix")
    if find_spec("obstore") is None:
        raise InvalidOptions(f"the storage {address} needs the extra s3: pip install 'batchserve[s3]'")
    from batchserve.storage.s3 import S3Storage

    return S3Storage(address)


def require_key(key: str) -> None:
    """Raises ValueError for what could name something outside of a storage, or one object in two ways."""
    if "\0" in key or not {"", ".", ".."}.isdisjoint(key.split("/")):
        raise ValueError(f"not a storage key: {key!r}")


def key_in_row(key: str) -> str:
    """The key of the same object if it is small and in a row of the database (`jobs.contents`), not in a storage."""
    return f"{_IN_ROW}{key}"


def is_in_row(key: str) -> bool:
    return key.startswith(_IN_ROW)


def key_in_storage(key: str) -> str:
    """The key that an object has, or would have, in a storage."""
    return key.removeprefix(_IN_ROW)


def input_key(job_id: str) -> str:
    return f"inputs/{job_id}"


def query_key(job_id: str) -> str:
    """Key of the rows of a query until they are read; then the job has an input under `input_key`."""
    return f"{UNREAD}{job_id}"


def sent_key(upload_id: str) -> str:
    """Key of what a client has sent by a direct upload. It may replace the object while its URL is valid."""
    return f"uploads/{upload_id}"


def part_key(job_id: str, first_record: int, attempt: int) -> str:
    """A part is named by its attempt too: a worker that lost its lease never overwrites a committed part."""
    return f"{parts_prefix(job_id)}{first_record:015d}-{attempt}"


def parts_prefix(job_id: str) -> str:
    return f"parts/{job_id}/"


def errors_part_key(job_id: str, first_record: int, attempt: int) -> str:
    return f"{part_key(job_id, first_record, attempt)}{ERRORS_SUFFIX}"


def result_key(job_id: str, attempt: int) -> str:
    """Each attempt has its own result, addressed by its number and never listed:
    docs/decisions/flat-keys-of-results.md."""
    return f"results/{job_id}-{attempt}"


def errors_key(job_id: str, attempt: int) -> str:
    return f"{result_key(job_id, attempt)}{ERRORS_SUFFIX}"


def target_key(job_id: str, attempt: int) -> str:
    """Of a result that is outside of the storage: under the address in the options of its job."""
    return f"{TARGETS}{job_id}-{attempt}"


def is_elsewhere(key: str) -> bool:
    """Whether a result is outside of the storage (`target_key`)."""
    return key.startswith(TARGETS)


def model_key(digest: str) -> str:
    """Key of an admitted model, named by the digest of the upload."""
    return f"models/{digest}.onnx"


def digest_of_model(key: str) -> str:
    """The digest in the key of a model."""
    return key.removeprefix("models/").removesuffix(".onnx")
